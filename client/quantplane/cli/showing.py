"""How commands show what lists and logs deliver."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from quantplane.cli.running import say

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from quantplane.follow import Follower

PAGE = 1_000  # rows that are asked for at a time


def show(messages: Sequence[Any], table: Callable[..., None], as_json: bool) -> None:
    """Print one message or more: as a table, or a JSON object a line."""
    from quantplane.tables import message_json

    if as_json:
        for message in messages:
            print(message_json(message))
    else:
        table(sys.stdout, messages)
    sys.stdout.flush()


def show_page(
    response: Any, name: str, table: Callable[[IO[str], Any], None], as_json: bool
) -> None:
    """Print the rows of a page, its field `name`, and say whether there are more."""
    rows = getattr(response, name)
    if rows:
        show(rows, table, as_json)
    else:
        say(f"no {name} are like that")
    if response.next_page_token:
        _say_more(name, "latest")


async def show_pages(
    method: Callable[[Any], Awaitable[Any]],
    request: Any,
    name: str,
    table: Callable[[IO[str], Any], None],
    limit: int,
    as_json: bool,
    order: str = "first",
) -> None:
    """Print up to `limit` rows of a list, however many pages these are.

    `order` says which of them come first.
    """
    rows: list[Any] = []  # a table's, which has to know all of them
    left = limit
    while left > 0:
        request.page_size = min(left, PAGE)
        page = await method(request)
        found = getattr(page, name)
        left -= len(found)
        if as_json:
            show(found, table, as_json)
        else:
            rows += found
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    if rows:
        show(rows, table, as_json)
    if left == limit:
        say(f"no {_said(name)} are like that")
    if request.page_token:
        _say_more(_said(name), order)


def _said(name: str) -> str:
    return name.replace("_", " ")


def _say_more(name: str, order: str) -> None:
    say(f"more {name} are like that: these are the {order}; see --limit")


async def watch(
    stream: "Follower[Any]",
    events: Callable[[Any], list["Message"]],
    line: Callable[[Any], str],
    **words: str,
) -> None:
    """Print the events of a log's stream, one a line, for ever.

    `words` are those of `event_lines`.
    """
    from quantplane.tables import event_lines

    async with stream:
        async for response in stream:
            for text in event_lines(response.event, **words):
                say(text)
            for event in events(response):
                print(line(event))
            sys.stdout.flush()
