"""Commands that show quotes, bars and symbols."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from quantplane.cli.parameters import (
    JsonOption,
    StartOption,
    TargetOption,
    interval_s,
    time_of,
)
from quantplane.cli.running import run, say

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client
    from quantplane.tables import BarWriter


def watch_quotes(
    symbols: Annotated[list[str], typer.Argument(help="What to watch.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many quotes.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Every quote, even if they come late.")
    ] = False,
    as_json: JsonOption = False,
    start: StartOption = None,
    target: TargetOption = None,
) -> None:
    """Print quotes as they come, one a line; with --start the recorded ones before."""
    from quantplane import v1 as pb
    from quantplane.tables import quote_json, quote_line

    request = pb.StreamQuotesRequest(
        symbols=symbols,
        delivery=pb.DELIVERY_LOSSLESS if lossless else pb.DELIVERY_LATEST,
        start_time=time_of(start, "--start"),
    )
    show = quote_json if as_json else quote_line
    run(target, lambda client: _watch(client, request, show, count))


def bars(
    symbol: Annotated[str, typer.Argument(help="What to list.")],
    start: StartOption = None,
    end: Annotated[
        str | None, typer.Option(metavar="TIME", help="Exclusive; as --start.")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTH",
            help="Of the bars: 30s, 1m, 5m, 1h, 1d, ...",
            show_default="as stored",
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="All bars, as CSV.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="All bars, a JSON object a line.")
    ] = False,
    target: TargetOption = None,
) -> None:
    """List the bars of a symbol.

    As a table, only the first and the last of more than 40.
    """
    from quantplane import v1 as pb
    from quantplane.tables import CsvBars, JsonBars, TableBars

    if as_csv and as_json:
        raise typer.BadParameter("use one of --csv and --json")
    request = pb.StreamBarsRequest(
        symbols=[symbol],
        start_time=time_of(start, "--start"),
        end_time=time_of(end, "--end"),
    )
    if interval is not None:
        request.interval.FromSeconds(interval_s(interval))
    kind = CsvBars if as_csv else JsonBars if as_json else TableBars
    writer = kind(sys.stdout)
    run(target, lambda client: _list_bars(client, request, writer))


def symbols(target: TargetOption = None) -> None:
    """List the symbols that have recorded data."""
    run(target, _list_symbols)


async def _watch(
    client: "Client",
    request: "pb.StreamQuotesRequest",
    show: Callable[["pb.Quote"], str],
    count: int | None,
) -> None:
    from quantplane.tables import event_lines

    shown = 0
    async with client.follow(client.market_data.StreamQuotes, request) as stream:
        async for response in stream:
            for line in event_lines(response.event):
                say(line)
            for quote in response.quotes:
                print(show(quote), flush=True)
                shown += 1
                if shown == count:
                    return


async def _list_bars(
    client: "Client", request: "pb.StreamBarsRequest", writer: "BarWriter"
) -> None:
    from quantplane.tables import bar_rows

    empty = True
    async for response in client.follow(client.market_data.StreamBars, request):
        if response.columns.time_us:
            empty = False
            writer.write(bar_rows(response.columns))
    writer.close()
    if empty:
        say(f"{request.symbols[0]} has no bars in that time")


async def _list_symbols(client: "Client") -> None:
    from quantplane import v1 as pb
    from quantplane.tables import print_symbols

    request = pb.ListSymbolsRequest(page_size=10_000)
    found: list[pb.Symbol] = []
    while True:
        response = await client.market_data.ListSymbols(request)
        found += response.symbols
        request.page_token = response.next_page_token
        if not request.page_token:
            break
    print_symbols(sys.stdout, found)
    if not found:
        say("nothing is recorded yet")
