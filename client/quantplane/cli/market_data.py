"""Commands that show quotes, bars and symbols."""

import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
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
    from quantplane.follow import Follower
    from quantplane.latency import Latency
    from quantplane.tables import BarWriter


def watch_quotes(
    symbols: Annotated[list[str], typer.Argument(help="What to watch.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many quotes.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Every quote, even if they come late.")
    ] = False,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Instead of the quotes, how long they are on their way, leg by leg.",
        ),
    ] = False,
    as_json: JsonOption = False,
    start: StartOption = None,
    target: TargetOption = None,
) -> None:
    """Print quotes as they come, one a line; with --start the recorded ones before.

    With --latency, a table that is kept up on a terminal, and printed at the end
    elsewhere.
    """
    from quantplane import v1 as pb
    from quantplane.tables import quote_json, quote_line

    request = pb.StreamQuotesRequest(
        symbols=symbols,
        delivery=pb.DELIVERY_LOSSLESS if lossless else pb.DELIVERY_LATEST,
        start_time=time_of(start, "--start"),
    )
    if latency:
        run(target, lambda client: _watch_latency(client, request, count, as_json))
    else:
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
    async with client.follow(client.market_data.StreamQuotes, request) as stream:
        async for quote in _quotes(stream, count):
            print(show(quote), flush=True)


async def _watch_latency(
    client: "Client",
    request: "pb.StreamQuotesRequest",
    count: int | None,
    as_json: bool,
) -> None:
    async with client.follow(client.market_data.StreamQuotes, request) as stream:
        with _shown(stream.latency, as_json):
            async for _ in _quotes(stream, count):
                pass


async def _quotes(
    stream: "Follower[pb.StreamQuotesResponse]", count: int | None
) -> AsyncIterator["pb.Quote"]:
    """Yield the quotes of a stream, at most `count`; say what else happens."""
    from quantplane.tables import event_lines

    yielded = 0
    async for response in stream:
        for line in event_lines(response.event):
            say(line)
        for quote in response.quotes:
            yield quote
            yielded += 1
            if yielded == count:
                return


@contextmanager
def _shown(latency: "Latency", as_json: bool) -> Iterator[None]:
    """Show it in place on a terminal, elsewhere at the end."""
    from rich.live import Live
    from rich.text import Text

    if sys.stdout.isatty() and not as_json:
        with Live(get_renderable=lambda: Text(str(latency))):
            yield
        return
    try:
        yield
    finally:
        print(json.dumps(latency.to_dict()) if as_json else latency)


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
