"""Commands that store files, and how any file comes to the server."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from quantplane.cli.parameters import (
    ColumnsOption,
    DelimiterOption,
    FileArgument,
    SymbolOption,
    TargetOption,
    TimeFormatOption,
    ZoneOption,
)
from quantplane.cli.running import FAILED, in_words, run, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quantplane import v1 as pb
    from quantplane.client import Client
    from quantplane.files import Report
    from quantplane.publish import QuotePublisher


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
    import_file(source.bars, store_bars, target)


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
    import_file(source.quotes, _store_quotes, target)


def import_options(
    file: FileArgument,
    underlying: Annotated[
        str, typer.Option("--underlying", help="Whose options the rows are.")
    ],
    time: Annotated[
        str | None,
        typer.Option(
            "--time",
            metavar="TIME",
            help="When the whole file was quoted; ISO, in the zone of --tz.",
            show_default="the column time; rows of one time are one chain",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="FIELD=COLUMN,...",
            help="Which column is which field, by its name or by its number from 0; "
            "with numbers alone, a CSV file has no header line. Every other field is "
            "the column named as it.",
        ),
    ] = None,
    time_format: TimeFormatOption = "iso",
    expiration_format: Annotated[
        str,
        typer.Option(
            "--expiration-format",
            metavar="FORMAT",
            help="iso, or as of strptime: '%m/%d/%Y'.",
        ),
    ] = "iso",
    tz: ZoneOption = "UTC",
    delimiter: DelimiterOption = ",",
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="The file has only what changed: other contracts stay as they are.",
        ),
    ] = False,
    target: TargetOption = None,
) -> None:
    """Store a file's option chains.

    Fields: time expiration strike option_type bid ask last_price volume
    open_interest implied_vol delta gamma theta vega rho. An option_type is call or
    put, calls or puts, c or p; implied_vol is a fraction. What is empty is unknown.
    Exits with 1 if rows were refused.
    """
    from quantplane.files import parse_columns, read_chains

    def read(report: "Report") -> Iterator["pb.OptionChain"]:
        return read_chains(
            file,
            underlying,
            None if columns is None else parse_columns(columns),
            time=time,
            time_format=time_format,
            expiration_format=expiration_format,
            tz=tz,
            delimiter=delimiter,
            partial=partial,
            report=report,
        )

    import_file(read, _store_chains, target, CHAINS)


# --- from the file to the server ----------------------------------------------


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


class Words(NamedTuple):
    """How an import is summed up."""

    table: str = "market_data"  # where its rows come to lie
    rows: str = "rows"
    done: str = "stored"
    if_refused: str = ""  # what that means


CHAINS = Words(
    table="options_chains",
    rows="contracts",
    if_refused="the chains lack the refused contracts: correct these lines, and "
    "import the file again",
)


@dataclass
class Tally:
    """How far a file has come."""

    report: "Report"
    begun: bool = False
    done: int = 0  # rows that the server has stored, or in a replay accepted
    chains: int = 0  # that they make up
    note: str = ""  # why it does not go on
    oldest_s: float = inf  # the earliest time of a row, since 1970
    _sent: deque[tuple[int, int]] = field(default_factory=deque)

    def saw(self, rows: Iterable[Any]) -> None:
        """Take note of how old these rows are."""
        self.oldest_s = min(self.oldest_s, *(row.time.seconds for row in rows))

    def sent(self, batch: int, rows: int) -> None:
        self._sent.append((batch, rows))

    @property
    def left(self) -> int:
        """How many rows are good, and not done."""
        return self.report.read - self.report.refused - self.done

    def settle(self, through: int) -> None:
        """Count the rows of every batch up to this number as done."""
        while self._sent and self._sent[0][0] <= through:
            self.done += self._sent.popleft()[1]


def import_file(
    read: Callable[["Report"], Iterator[Any]],
    store: Callable[["Client", Iterator[Any], Tally], Awaitable[None]],
    target: str | None,
    words: Words = Words(),  # noqa: B008 - it is a tuple
) -> None:
    """Store what `read` yields; say what became of it, and end with 1 if refused."""
    from quantplane.files import Report

    tally = Tally(Report())
    with in_words(target):
        batches = read(tally.report)
        # A file that can't be used is told before a server is looked for.
        first = next(batches, None)
    if first is not None:
        batches = chain([first], batches)

    async def work(client: "Client") -> None:
        tally.begun = True
        await store(client, batches, tally)
        await _warn_of_retention(client, tally, words.table)

    try:
        with _progress(tally, words):
            run(target, work)
    finally:
        if tally.begun:
            _summarise(tally, words)
    if tally.report.refused or tally.left:
        raise typer.Exit(FAILED)


def _summarise(tally: Tally, words: Words) -> None:
    report = tally.report
    for refusal in report.refusals:
        say(f"{report.unit} {refusal.line}: {refusal.reason}")
    if more := report.refused - len(report.refusals):
        say(f"... and {more:,} more")
    if report.refused and words.if_refused:
        say(words.if_refused)
    chains = f" in {tally.chains:,} chain{'s' * (tally.chains > 1)}"
    typer.echo(
        f"{report.read:,} {words.rows} read, {tally.done:,} {words.done}"
        + (chains if tally.chains else "")
        + f", {report.refused:,} refused"
        + (f", {tally.left:,} not {words.done}" if tally.left else "")
    )


async def _warn_of_retention(client: "Client", tally: Tally, table: str) -> None:
    """Tell that rows are older than what their table keeps."""
    import grpc

    from quantplane import v1 as pb

    try:
        report = await client.admin.GetStorageReport(pb.GetStorageReportRequest())
    except grpc.aio.AioRpcError:
        return  # who may only publish is not told
    kept_s = {
        one.name: one.retention.seconds
        for one in report.tables
        if one.HasField("retention")
    }
    since_s = datetime.now(UTC).timestamp() - kept_s.get(table, inf)
    if tally.oldest_s < since_s:
        day = datetime.fromtimestamp(since_s, UTC).date()
        say(
            f"warning: the server removes rows of {table} from before {day}, and this "
            "file has some; docs/schema.md tells how to keep them longer"
        )


@contextmanager
def _progress(tally: Tally, words: Words) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(
        get_renderable=lambda: _progress_line(tally, words),
        console=Console(stderr=True),
        refresh_per_second=8,
        transient=True,
    ):
        yield


def _progress_line(tally: Tally, words: Words) -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 1))
    line.add_row(
        ProgressBar(total=1.0, completed=tally.report.progress, width=40),
        f"{tally.report.progress:4.0%}",
        f"{tally.done:,} of {tally.report.read:,} {words.rows}",
        tally.note,
    )
    return line


async def store_bars(
    client: "Client", batches: Iterator[list["pb.Bar"]], tally: Tally
) -> None:
    """Store the bars, and count those that are durable."""
    from quantplane import v1 as pb
    from quantplane.batches import publish_batches

    requests = (pb.PublishBarsRequest(bars=bars) for bars in batches)
    async for stored in publish_batches(client.market_data.PublishBars, requests):
        tally.done += len(stored.bars)
        tally.saw(stored.bars)


async def _store_chains(
    client: "Client", chains: Iterator["pb.OptionChain"], tally: Tally
) -> None:
    from quantplane import v1 as pb
    from quantplane.batches import publish_batches

    requests = (pb.PublishOptionChainRequest(chain=chain) for chain in chains)
    async for stored in publish_batches(client.options.PublishOptionChain, requests):
        tally.done += len(stored.chain.contracts)
        tally.chains += 1
        tally.saw([stored.chain])


async def _store_quotes(
    client: "Client", batches: Iterator[list["pb.Quote"]], tally: Tally
) -> None:
    async with publishing(client, None, tally) as publisher:
        try:
            for quotes in batches:
                tally.sent(await publisher.send(quotes), len(quotes))
                tally.settle(publisher.durable_through)
                tally.saw(quotes)
            await publisher.durable()
        finally:
            tally.settle(publisher.durable_through)


@asynccontextmanager
async def publishing(
    client: "Client", feed: str | None, tally: Tally
) -> AsyncIterator["QuotePublisher"]:
    """Give a publisher, and tell when the server holds it back."""
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
        say(
            f"the server holds the feed back: {reason}"
            if told
            else "the server takes quotes again"
        )
