"""How commands show what lists and logs deliver."""

import sys
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from quantplane.cli.running import say

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from quantplane.follow import Follower


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
        say(f"more {name} are like that: these are the latest; see --limit")


async def watch(
    stream: "Follower[Any]",
    events: Callable[[Any], list["Message"]],
    line: Callable[[Any], str],
) -> None:
    """Print the events of a log's stream, one a line, for ever."""
    from quantplane.tables import event_lines

    async with stream:
        async for response in stream:
            for text in event_lines(response.event):
                say(text)
            for event in events(response):
                print(line(event))
            sys.stdout.flush()
