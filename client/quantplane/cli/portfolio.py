"""Commands of the portfolio."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import (
    EndOption,
    JsonOption,
    StartOption,
    TargetOption,
    time_of,
)
from quantplane.cli.running import FAILED, run, say

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client

AUDIT_S = 3_600.0
PAGE = 10_000  # rows


def portfolio(
    context: typer.Context,
    strategy: Annotated[
        str, typer.Option(help="Only what its orders did.", show_default="all")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on with what changes.")
    ] = False,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Show value, cash, P&L and open positions.

    Ctrl-C ends --watch.
    """
    from quantplane import v1 as pb

    if context.invoked_subcommand is not None:
        _refuse_options(context)
    elif watch:
        watched = pb.WatchPortfolioRequest(strategy_id=strategy)
        run(target, lambda client: _watch(client, watched, as_json))
    else:
        request = pb.GetPortfolioRequest(strategy_id=strategy)
        run(target, lambda client: _show(client, request, as_json))


def snapshots(
    start: StartOption = None,
    end: EndOption = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List the snapshots of the account.

    As a table, only the first and the last of more than 40.
    """
    from quantplane import v1 as pb

    request = pb.ListSnapshotsRequest(
        start_time=time_of(start, "--start"),
        end_time=time_of(end, "--end"),
        page_size=PAGE,
    )
    run(target, lambda client: _list_snapshots(client, request, as_json))


def audit(as_json: JsonOption = False, target: TargetOption = None) -> None:
    """Check what is stored against all executions.

    Takes time with their number. The exit code is 1 where something differs.
    """
    run(target, lambda client: _audit(client, as_json))


# --- working ------------------------------------------------------------------


def _refuse_options(context: typer.Context) -> None:
    """Refuse options before the name of a command, where they would do nothing."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"options go behind `portfolio {context.invoked_subcommand}`"
            )


async def _show(
    client: "Client", request: "pb.GetPortfolioRequest", as_json: bool
) -> None:
    from quantplane.tables import message_json, print_portfolio

    found = await client.portfolio.GetPortfolio(request)
    if as_json:
        print(message_json(found))
    else:
        print_portfolio(sys.stdout, found.summary, found.positions)


async def _watch(
    client: "Client", request: "pb.WatchPortfolioRequest", as_json: bool
) -> None:
    from quantplane import v1 as pb
    from quantplane.tables import event_lines

    now = pb.PortfolioSummary()
    positions: dict[str, pb.Position] = {}
    stream = client.follow(client.portfolio.WatchPortfolio, request)
    with _showing(as_json) as show:
        async with stream:
            async for response in stream:
                for text in event_lines(response.event):
                    say(text)
                if response.event.HasField("gap"):
                    positions.clear()  # all of them follow
                if response.HasField("summary"):
                    now = response.summary
                positions |= {each.symbol: each for each in response.positions}
                if response.HasField("summary") or response.positions:
                    show(response, now, positions)


Show = Callable[
    ["pb.WatchPortfolioResponse", "pb.PortfolioSummary", dict[str, Any]], None
]


@contextmanager
def _showing(as_json: bool) -> Iterator[Show]:
    """Give what shows a change: on a terminal in place, elsewhere as a line."""
    from rich.console import Console
    from rich.live import Live

    from quantplane.tables import message_json, portfolio_line, portfolio_view

    def line(response: Any, summary: Any, positions: dict[str, Any]) -> None:
        response.ClearField("resume_token")
        print(
            message_json(response) if as_json else portfolio_line(summary), flush=True
        )

    if as_json or not sys.stdout.isatty():
        yield line
        return
    console = Console()
    with Live(console=console, auto_refresh=False) as live:

        def redraw(response: Any, summary: Any, positions: dict[str, Any]) -> None:
            shown = [positions[symbol] for symbol in sorted(positions)]
            live.update(portfolio_view(summary, shown, console.width), refresh=True)

        yield redraw


async def _list_snapshots(
    client: "Client", request: "pb.ListSnapshotsRequest", as_json: bool
) -> None:
    from quantplane.tables import TableSnapshots, message_json

    table, empty = TableSnapshots(), True
    while True:
        page = await client.portfolio.ListSnapshots(request)
        for snapshot in page.snapshots:
            empty = False
            if as_json:
                print(message_json(snapshot))
            else:
                table.add(snapshot)
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    if empty:
        say("there are no snapshots in that time")
    elif not as_json:
        table.print(sys.stdout)


async def _audit(client: "Client", as_json: bool) -> None:
    from quantplane import v1 as pb
    from quantplane.tables import message_json, print_drifts

    request = pb.AuditPositionsRequest()
    found = await client.portfolio.AuditPositions(request, timeout=AUDIT_S)
    if as_json:
        print(message_json(found))
    elif found.drifts:
        print_drifts(sys.stdout, found.drifts)
    counts = (
        f"executions: {found.n_executions:,}, orders: {found.n_orders:,}, "
        f"positions: {found.n_positions:,}"
    )
    if found.drifts:
        say(f"{counts}; not what the executions give: {len(found.drifts):,}")
        raise typer.Exit(FAILED)
    say(f"{counts}; all agree")
