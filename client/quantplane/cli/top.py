"""The command that shows how a server is doing."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from quantplane.cli.parameters import JsonOption, TargetOption
from quantplane.cli.running import run, say

if TYPE_CHECKING:
    from quantplane.client import Client
    from quantplane.tables import Change, Sample

EVERY_S = 1.0
ANSWER_S = 5.0

Show = Callable[["Change", str], None]  # a change, and why there is no newer one


def top(
    once: Annotated[
        bool, typer.Option("--once", help="Show it once, after a second.")
    ] = False,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Show how the server is doing, and its streams, the slowest first.

    Of several server processes, the one that answers. Ctrl-C ends it.
    """

    async def work(client: "Client") -> None:
        if once or as_json or not sys.stdout.isatty():
            show = _printing(client.target, as_json, once)
            await _follow(client, show, once)
        else:
            with _drawing(client.target) as draw:
                await _follow(client, draw)

    run(target, work)


async def _follow(client: "Client", show: Show, once: bool = False) -> None:
    """Show what is new after a second, and unless `once` each second, for ever.

    Raises AioRpcError, but goes on where an answer is all that is missing.
    """
    import grpc

    from quantplane.tables import Change

    away = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
    change = Change(None, await _sample(client))
    if not once:
        show(change, "")
    while True:
        try:
            change = await _next(client, change.now)
            show(change, "")
            if once:
                return
        except grpc.aio.AioRpcError as error:
            if once or error.code() not in away:
                raise
            show(change, "does not answer")
            await asyncio.sleep(EVERY_S)


async def _next(client: "Client", before: "Sample") -> "Change":
    from quantplane.tables import Change

    await asyncio.sleep(EVERY_S)
    return Change(before, await _sample(client))


async def _sample(client: "Client") -> "Sample":
    """Ask for the status and all streams. Raises AioRpcError."""
    from quantplane import v1 as pb
    from quantplane.tables import Sample

    subscriptions: list[pb.Subscription] = []
    request = pb.ListSubscriptionsRequest()
    while True:
        page = await client.admin.ListSubscriptions(request, timeout=ANSWER_S)
        subscriptions += page.subscriptions
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    status = await client.admin.GetServerStatus(
        pb.GetServerStatusRequest(), timeout=ANSWER_S
    )
    return Sample(status, subscriptions)


def _printing(target: str, as_json: bool, once: bool) -> Show:
    """Return what prints: all of it once, else a line each time."""
    from quantplane.tables import status_json, status_line, status_view
    from quantplane.tables.rows import console_of, room_of

    def show(change: "Change", silent: str) -> None:
        if silent:
            say(f"{target} {silent}")
        elif as_json:
            print(status_json(change), flush=True)
        elif once:
            view = status_view(change, target, room_of(sys.stdout))
            console_of(sys.stdout).print(view)
        else:
            print(status_line(change), flush=True)

    return show


@contextmanager
def _drawing(target: str) -> Iterator[Show]:
    """Give what redraws the screen."""
    from rich.console import Console
    from rich.live import Live

    from quantplane.tables import status_view

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def show(change: "Change", silent: str) -> None:
            size = console.size
            view = status_view(change, target, size.width, size.height, silent)
            live.update(view, refresh=True)

        yield show
