"""The command that publishes a file as live quotes."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from quantplane.cli.importing import Source, Tally, Words, import_file, publishing
from quantplane.cli.parameters import (
    ColumnsOption,
    DelimiterOption,
    FileArgument,
    SymbolOption,
    TargetOption,
    TimeFormatOption,
    ZoneOption,
)

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client

LAST_FLUSH_S = 5.0


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
        client: "Client", batches: Iterator[list["pb.Quote"]], tally: Tally
    ) -> None:
        await _replay(client, batches, tally, speed, feed)

    import_file(source.quotes, publish, target, Words(done="published"))


async def _replay(
    client: "Client",
    batches: Iterator[list["pb.Quote"]],
    tally: Tally,
    speed: float,
    feed: str | None,
) -> None:
    pace = Pace(speed)
    async with publishing(client, feed, tally) as publisher:
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
