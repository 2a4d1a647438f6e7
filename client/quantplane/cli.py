"""The command `quantplane`: by hand what a strategy or a feed does in code."""

import asyncio
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("the command quantplane needs typer: pip install 'quantplane[cli]'")

# What takes long to import is imported where it is used, so that --help is quick.
if TYPE_CHECKING:
    import grpc
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.console import RenderableType

    from quantplane import v1 as pb
    from quantplane.client import Client
    from quantplane.files import Report
    from quantplane.publish import QuotePublisher
    from quantplane.tables import BarWriter

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130  # exit codes
PROBE_S = 5.0
BATCHES_IN_FLIGHT = 8
# In a row, to reach a server that goes away while it stores bars: about 10 s.
TRIES = 8
LAST_FLUSH_S = 5.0
INTERVALS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    help="Watch, import, replay and list the market data of a quantplane server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
import_app = typer.Typer(
    help="Store a CSV or Parquet file.", no_args_is_help=True, rich_markup_mode=None
)
quotes_app = typer.Typer(
    help="Live quotes.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(import_app, name="import")
app.add_typer(quotes_app, name="quotes")

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        envvar="QUANTPLANE_TARGET",
        metavar="HOST:PORT",
        help="The server.",
        show_default="127.0.0.1:50051",
    ),
]
FileArgument = Annotated[
    Path, typer.Argument(help="A CSV (also .csv.gz) or Parquet file.")
]
SymbolOption = Annotated[str, typer.Option("--symbol", help="What the rows are of.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="Which column is which field, by its name or (time=0,bid=1) by its number "
        "from 0; with numbers alone, a CSV file has no header line.",
        show_default="the columns named as the fields",
    ),
]
TimeFormatOption = Annotated[
    str,
    typer.Option(
        "--time-format",
        metavar="FORMAT",
        help="iso; s, ms, us or ns since 1970; or as of strptime: '%Y%m%d %H%M%S%f'.",
    ),
]
ZoneOption = Annotated[
    str,
    typer.Option(
        "--tz",
        metavar="ZONE",
        help="Of times that carry none: America/New_York, -05:00, ...",
    ),
]
DelimiterOption = Annotated[
    str, typer.Option("--delimiter", help="One character, or tab.")
]
StartOption = Annotated[
    str | None,
    typer.Option("--start", metavar="TIME", help="ISO; UTC unless it says else."),
]


@import_app.command("bars")
def import_bars(
    file: FileArgument,
    symbol: SymbolOption,
    columns: ColumnsOption = None,
    time_format: TimeFormatOption = "iso",
    tz: ZoneOption = "UTC",
    delimiter: DelimiterOption = ",",
    target: TargetOption = None,
) -> None:
    """Store a file's bars.

    Fields: time open high low close volume vwap bid ask bid_size ask_size. Without
    a close, it is the middle of bid and ask. Exits with 1 if rows were refused.
    """
    source = Source(file, symbol, columns, time_format, tz, delimiter)
    _import(source.bars, store_bars, target)


@import_app.command("quotes")
def import_quotes(
    file: FileArgument,
    symbol: SymbolOption,
    columns: ColumnsOption = None,
    time_format: TimeFormatOption = "iso",
    tz: ZoneOption = "UTC",
    delimiter: DelimiterOption = ",",
    target: TargetOption = None,
) -> None:
    """Store a file's quotes.

    Fields: time bid ask bid_size ask_size last volume. Exits with 1 if rows were
    refused.
    """
    source = Source(file, symbol, columns, time_format, tz, delimiter)
    _import(source.quotes, _store_quotes, target)


@app.command()
def replay(
    file: FileArgument,
    symbol: SymbolOption,
    speed: Annotated[
        float,
        typer.Option(
            min=0, help="Times as fast as the quotes came; 0: as fast as it goes."
        ),
    ] = 1.0,
    feed: Annotated[
        str | None,
        typer.Option(help="The feed's name.", show_default="a new one"),
    ] = None,
    columns: ColumnsOption = None,
    time_format: TimeFormatOption = "iso",
    tz: ZoneOption = "UTC",
    delimiter: DelimiterOption = ",",
    target: TargetOption = None,
) -> None:
    """Publish a file's quotes as live ones.

    They keep their times, and come in the rhythm of these times. Fields: as for
    `import quotes`. Ctrl-C ends it.
    """
    source = Source(file, symbol, columns, time_format, tz, delimiter)

    async def publish(
        client: "Client", batches: Iterator[list["pb.Quote"]], tally: "Tally"
    ) -> None:
        await _replay(client, batches, tally, speed, feed)

    _import(source.quotes, publish, target, done="published")


@quotes_app.command("watch")
def watch_quotes(
    symbols: Annotated[list[str], typer.Argument(help="What to watch.")],
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many quotes.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Every quote, even if they come late.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line.")
    ] = False,
    start: StartOption = None,
    target: TargetOption = None,
) -> None:
    """Print quotes as they come, one a line; with --start the recorded ones before."""
    from quantplane import v1 as pb
    from quantplane.tables import quote_json, quote_line

    request = pb.StreamQuotesRequest(
        symbols=symbols,
        delivery=pb.DELIVERY_LOSSLESS if lossless else pb.DELIVERY_LATEST,
        start_time=_time(start, "--start"),
    )
    show = quote_json if as_json else quote_line
    _run(target, lambda client: _watch(client, request, show, count))


@app.command()
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
        start_time=_time(start, "--start"),
        end_time=_time(end, "--end"),
    )
    if interval is not None:
        request.interval.FromSeconds(_interval_s(interval))
    kind = CsvBars if as_csv else JsonBars if as_json else TableBars
    writer = kind(sys.stdout)
    _run(target, lambda client: _list_bars(client, request, writer))


@app.command()
def symbols(target: TargetOption = None) -> None:
    """List the symbols that have recorded data."""
    _run(target, _list_symbols)


# --- files --------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file, and what the command line says of it."""

    path: Path
    symbol: str
    columns: str | None
    time_format: str
    tz: str
    delimiter: str

    def bars(self, report: "Report") -> Iterator[list["pb.Bar"]]:
        from quantplane.files import read_bars

        return read_bars(self.path, self.symbol, **self._layout(), report=report)

    def quotes(self, report: "Report") -> Iterator[list["pb.Quote"]]:
        from quantplane.files import read_quotes

        return read_quotes(self.path, self.symbol, **self._layout(), report=report)

    def _layout(self) -> dict[str, Any]:
        from quantplane.files import parse_columns

        return {
            "columns": None if self.columns is None else parse_columns(self.columns),
            "time_format": self.time_format,
            "tz": self.tz,
            "delimiter": self.delimiter,
        }


@dataclass
class Tally:
    """How far a file has come."""

    report: "Report"
    begun: bool = False
    done: int = 0  # rows that the server has stored, or in a replay accepted
    note: str = ""  # why it does not go on
    _sent: deque[tuple[int, int]] = field(default_factory=deque)

    def sent(self, batch: int, rows: int) -> None:
        self._sent.append((batch, rows))

    def settle(self, through: int) -> None:
        """Count the rows of every batch up to this number as done."""
        while self._sent and self._sent[0][0] <= through:
            self.done += self._sent.popleft()[1]


Store = Callable[["Client", Iterator[list[Any]], Tally], Awaitable[None]]


def _import(
    read: Callable[["Report"], Iterator[list[Any]]],
    store: Store,
    target: str | None,
    done: str = "stored",
) -> None:
    from quantplane.files import Report

    tally = Tally(Report())
    with _in_words(target):
        batches = read(tally.report)
        # A file that can't be used is told before a server is looked for.
        first = next(batches, [])
    if first:
        batches = chain([first], batches)

    async def work(client: "Client") -> None:
        tally.begun = True
        await store(client, batches, tally)

    try:
        with _progress(tally):
            _run(target, work)
    finally:
        if tally.begun:
            _summarise(tally, done)
    if tally.report.refused:
        raise typer.Exit(FAILED)


def _summarise(tally: Tally, done: str) -> None:
    report = tally.report
    for refusal in report.refusals:
        _say(f"{report.unit} {refusal.line}: {refusal.reason}")
    if more := report.refused - len(report.refusals):
        _say(f"... and {more:,} more")
    left = report.read - report.refused - tally.done
    typer.echo(
        f"{report.read:,} rows read, {tally.done:,} {done}, {report.refused:,} refused"
        + (f", {left:,} not {done}" if left else "")
    )


@contextmanager
def _progress(tally: Tally) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(
        get_renderable=lambda: _progress_line(tally),
        console=Console(stderr=True),
        refresh_per_second=8,
        transient=True,
    ):
        yield


def _progress_line(tally: Tally) -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_row(
        ProgressBar(total=1.0, completed=tally.report.progress, width=40),
        f"{tally.report.progress:4.0%}",
        f"{tally.done:,} of {tally.report.read:,} rows",
        tally.note,
    )
    return line


async def store_bars(
    client: "Client", batches: Iterator[list["pb.Bar"]], tally: Tally
) -> None:
    """Store the bars, again and again from the first that may not be stored."""
    import grpc

    from quantplane.errors import describe, is_transient
    from quantplane.follow import Backoff

    unstored: deque[list[pb.Bar]] = deque()
    backoff, tries = Backoff(), 0
    while True:
        before = tally.done
        try:
            await _send_bars(client, batches, unstored, tally, is_retry=tries > 0)
            return
        except grpc.aio.AioRpcError as error:
            if tally.done > before:
                backoff, tries = Backoff(), 0
            tries += 1
            if tries == TRIES or not is_transient(error):
                raise
            tally.note = describe(error)
        await asyncio.sleep(backoff.next())


async def _send_bars(
    client: "Client",
    batches: Iterator[list["pb.Bar"]],
    unstored: deque[list["pb.Bar"]],
    tally: Tally,
    is_retry: bool,
) -> None:
    """Store `unstored`, then `batches`, on one connection.

    Where a write meets the end of the call, gRPC says INTERNAL in place of what the
    server said. So a retry has nothing to write while it waits for its first answer.
    """
    import grpc

    from quantplane import v1 as pb

    call: Any = client.market_data.PublishBars()
    sent = through = 0
    while True:
        room = 1 if is_retry and not through else BATCHES_IN_FLIGHT
        while sent < through + room:
            if sent - through == len(unstored):
                if not (bars := next(batches, [])):
                    break
                unstored.append(bars)
            request = pb.PublishBarsRequest(
                batch=sent + 1, bars=unstored[sent - through]
            )
            with suppress(asyncio.InvalidStateError):  # it has ended; `read` tells
                await call.write(request)
            sent += 1
        if not unstored:
            await call.done_writing()
            return
        response = await call.read()
        if response is grpc.aio.EOF:
            raise _ended()
        tally.note = ""
        for _ in range(response.durable_through - through):
            tally.done += len(unstored.popleft())
        through = response.durable_through


def _ended() -> Exception:
    import grpc

    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, nothing, nothing, "the server ended the stream"
    )


async def _store_quotes(
    client: "Client", batches: Iterator[list["pb.Quote"]], tally: Tally
) -> None:
    async with _publisher(client, None, tally) as publisher:
        try:
            for quotes in batches:
                tally.sent(await publisher.send(quotes), len(quotes))
                tally.settle(publisher.durable_through)
            await publisher.durable()
        finally:
            tally.settle(publisher.durable_through)


async def _replay(
    client: "Client",
    batches: Iterator[list["pb.Quote"]],
    tally: Tally,
    speed: float,
    feed: str | None,
) -> None:
    pace = Pace(speed)
    async with _publisher(client, feed, tally) as publisher:
        try:
            for quotes in batches:
                while quotes:
                    if due := pace.due(quotes):
                        tally.sent(await publisher.send(quotes[:due]), due)
                        tally.settle(publisher.accepted_through)
                        quotes = quotes[due:]
                    else:
                        await asyncio.sleep(pace.delay_s(quotes[0]))
            await publisher.flush()
        except asyncio.CancelledError:  # by Ctrl-C: what was sent still counts
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH_S):
                    await publisher.flush()
            raise
        finally:
            tally.settle(publisher.accepted_through)


class Pace:
    """Tells which quotes are due, counted from the first one it sees."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._first_ns: int | None = None
        self._began_s = 0.0

    def due(self, quotes: list["pb.Quote"]) -> int:
        """Return how many of the quotes, from the first on, are due."""
        if self._first_ns is None:
            self._first_ns = quotes[0].time.ToNanoseconds()
            self._began_s = monotonic()
        if self._speed == 0:
            return len(quotes)
        late = (place for place, q in enumerate(quotes) if self.delay_s(q) > 0)
        return next(late, len(quotes))

    def delay_s(self, quote: "pb.Quote") -> float:
        """Return the seconds until the quote is due; not above 0 once it is."""
        since_ns = quote.time.ToNanoseconds() - (self._first_ns or 0)
        return self._began_s + since_ns / self._speed / 1e9 - monotonic()


@asynccontextmanager
async def _publisher(
    client: "Client", feed: str | None, tally: Tally
) -> AsyncIterator["QuotePublisher"]:
    async with client.publish_quotes(feed) as publisher:
        watch = asyncio.create_task(_tell_holds(publisher, tally))
        try:
            yield publisher
        finally:
            watch.cancel()


async def _tell_holds(publisher: "QuotePublisher", tally: Tally) -> None:
    from quantplane import v1 as pb

    told = pb.HOLD_REASON_UNSPECIFIED
    while True:
        await asyncio.sleep(0.5)
        if publisher.hold == told:
            continue
        told = publisher.hold
        reason = pb.HoldReason.Name(told).removeprefix("HOLD_REASON_")
        tally.note = f"held back: {reason}" if told else ""
        _say(
            f"the server holds the feed back: {reason}"
            if told
            else "the server takes quotes again"
        )


# --- lists and streams --------------------------------------------------------


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
                _say(line)
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
        _say(f"{request.symbols[0]} has no bars in that time")


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
        _say("nothing is recorded yet")


def _time(text: str | None, option: str) -> "Timestamp | None":
    from google.protobuf.timestamp_pb2 import Timestamp

    from quantplane.files import parse_time

    if text is None:
        return None
    time = Timestamp()
    try:
        time.FromNanoseconds(parse_time(text))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not an ISO time like 2024-01-31T14:30", param_hint=option
        ) from None
    return time


def _interval_s(text: str) -> int:
    match = re.fullmatch("([0-9]{1,9})([smhdw])", text)
    if not match:
        raise typer.BadParameter(
            f"{text!r} is not a length like 30s, 5m, 1h or 1d", param_hint="--interval"
        )
    return int(match[1]) * INTERVALS_S[match[2]]


# --- running ------------------------------------------------------------------


def _run(target: str | None, work: Callable[["Client"], Awaitable[None]]) -> None:
    """Do `work` with a server that answers; end the process if that fails."""
    from quantplane.client import Client

    async def connected() -> None:
        async with Client(target) as client:
            await _reach(client)
            await work(client)

    with _in_words(target):
        asyncio.run(connected())
        sys.stdout.flush()


async def _reach(client: "Client") -> None:
    """Raise if no server answers, for a stream would wait for it for ever."""
    import grpc

    from quantplane import v1 as pb

    probe = pb.ListSymbolsRequest(page_size=1)
    try:
        await client.market_data.ListSymbols(
            probe, timeout=PROBE_S, wait_for_ready=False
        )
    except grpc.aio.AioRpcError as error:
        if _is_away(error):
            raise


def _is_away(error: "grpc.aio.AioRpcError") -> bool:
    """Tell an error without a server behind it."""
    import grpc

    from quantplane.errors import reason_of

    away = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return error.code() in away and not reason_of(error)


@contextmanager
def _in_words(target: str | None) -> Iterator[None]:
    """Turn what people may meet into one sentence and an exit code."""
    import grpc

    from quantplane.client import TARGET
    from quantplane.errors import describe
    from quantplane.files import FileProblem

    try:
        yield
    except FileProblem as problem:
        _fail(str(problem), UNUSABLE)
    except grpc.aio.AioRpcError as error:
        if _is_away(error):
            _fail(
                f"no server answers at {target or TARGET}; "
                "start one with `quantplane-server up`, or set --target"
            )
        _fail(describe(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has what it wants. Python must not flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def _fail(sentence: str, code: int = FAILED) -> NoReturn:
    _say(f"quantplane: {sentence}")
    raise typer.Exit(code)


def _say(line: str) -> None:
    typer.echo(line, err=True)
