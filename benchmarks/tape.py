"""A series of quotes that every process of a benchmark makes alike."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from time import time
from typing import Any

from quantplane import v1 as pb

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STEP_NS = 1_003  # between quotes: each has its own microsecond, and nanoseconds
LAST = 0x2B5A_9C3D_71E6_0000  # volume of each symbol's last quote, plus the mark

_marks = count(1)


@dataclass(frozen=True)
class Tape:
    """`quotes` quotes of about 60 bytes, in turns of `symbols` symbols.

    The last quote of each symbol carries the tape's mark. Order within a symbol is
    kept, so who has received all the marks of a lossless stream has received all.
    """

    quotes: int
    symbols: int = 100
    batch: int = 100  # quotes
    mark: int = field(default_factory=lambda: next(_marks))
    start_us: int = field(default_factory=lambda: int(time() * 1e6))

    def __post_init__(self) -> None:
        assert self.quotes % self.symbols == self.quotes % self.batch == 0

    def json(self) -> dict[str, Any]:
        """Return the arguments to make it with, in another process."""
        return asdict(self)

    @property
    def names(self) -> list[str]:
        return names(self.symbols)

    @property
    def marker(self) -> bytes:
        """What the serialised last quote of a symbol contains, and no other."""
        return pb.Quote(volume=LAST + self.mark).SerializeToString()

    def values(self, i: int) -> dict[str, Any]:
        """Return the fields of a quote but its time."""
        last = i >= self.quotes - self.symbols
        return {
            "symbol": f"SYM{i % self.symbols:03d}",
            "bid": 100 + i % 997 * 0.01,
            "ask": 100.01 + i % 997 * 0.01,
            "bid_size": 130 + i % 50,
            "ask_size": 200 + i % 50,
            "last": 100.005 + i % 997 * 0.01,
            "volume": LAST + self.mark if last else 130 + i % 900,
        }

    def quote(self, i: int) -> pb.Quote:
        quote = pb.Quote(**self.values(i))
        quote.time.FromNanoseconds(self.start_us * 1_000 + i * STEP_NS)
        return quote

    def batches(self) -> Iterator[list[pb.Quote]]:
        for start in range(0, self.quotes, self.batch):
            yield [self.quote(i) for i in range(start, start + self.batch)]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield what the recorder stores of each quote: rows of market_data."""
        for i in range(self.quotes):
            at = EPOCH + timedelta(microseconds=self.start_us + i * STEP_NS // 1_000)
            symbol, bid, ask, *sizes, last, volume = self.values(i).values()
            yield at, symbol, *(4 * [last]), volume, None, bid, ask, *sizes


def names(symbols: int) -> list[str]:
    return [f"SYM{i:03d}" for i in range(symbols)]
