"""Quotes and bars."""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from quantplane import v1 as pb
from quantplane.files.cells import int32, int64, price, time_parser
from quantplane.files.report import Report
from quantplane.files.rows import Path, check_symbol, read_rows
from quantplane.files.table import Columns, Kind, Layout, Parse, Values
from quantplane.files.times import Clock

Message = TypeVar("Message")

QUOTE_FIELDS = tuple("time bid ask bid_size ask_size last volume".split())
BAR_FIELDS = tuple(
    "time open high low close volume vwap bid ask bid_size ask_size".split()
)
BATCH_ROWS = 1_000


def read_quotes(
    path: Path,
    symbol: str,
    columns: Columns | None = None,
    *,
    time_format: str = "iso",
    tz: str = "UTC",
    delimiter: str = ",",
    report: Report | None = None,
) -> Iterator[list[pb.Quote]]:
    """Yield the file's quotes in lists of at most 1,000.

    `columns` maps each field to its column's name, or to its number from 0; where
    all are numbers, a CSV file has no header line. Omitted: the columns that are
    named as the fields. `time_format` is `iso`; `s`, `ms`, `us` or `ns` for time
    since 1970; or a pattern of strptime, whose `%f` may have 9 digits. `tz` is
    the zone of stamps that carry none.

    Raises FileProblem before the first list, if the file and its description do
    not fit or none of the first 100 rows can be read.
    """
    layout = Layout(columns, time_format, tz, delimiter)
    kind = Kind(QUOTE_FIELDS, _lacking_for_quote, _parser, _quote_completer)
    return _read(pb.Quote, kind, path, symbol, layout, report or Report())


def read_bars(
    path: Path,
    symbol: str,
    columns: Columns | None = None,
    *,
    time_format: str = "iso",
    tz: str = "UTC",
    delimiter: str = ",",
    report: Report | None = None,
) -> Iterator[list[pb.Bar]]:
    """Yield the file's bars in lists of at most 1,000, as `read_quotes` does.

    Where no column is the close, it is the middle of bid and ask.
    """
    layout = Layout(columns, time_format, tz, delimiter)
    kind = Kind(BAR_FIELDS, _lacking_for_bar, _parser, _bar_completer)
    return _read(pb.Bar, kind, path, symbol, layout, report or Report())


def _read(
    make: Callable[..., Message],
    kind: Kind,
    path: Path,
    symbol: str,
    layout: Layout,
    report: Report,
) -> Iterator[list[Message]]:
    check_symbol(symbol)
    batch = []
    for _, values in read_rows(kind, path, layout, report):
        batch.append(make(symbol=symbol, **values))
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _parser(name: str, clock: Clock) -> Parse:
    if name == "time":
        return time_parser(clock)
    if name == "volume":
        return int64
    if name in ("bid_size", "ask_size"):
        return int32
    return price


def _lacking_for_quote(fields: set[str]) -> str:
    if "time" not in fields:
        return "time"
    return "" if fields & {"bid", "ask", "last"} else "bid, ask or last"


def _quote_completer(fields: set[str]) -> Callable[[Values], None]:
    def complete(values: Values) -> None:
        if values.get("time") is None:
            raise ValueError("time is missing")
        bid, ask, last = values.get("bid"), values.get("ask"), values.get("last")
        if bid is None and ask is None and last is None:
            raise ValueError("bid, ask and last are missing")

    return complete


def _lacking_for_bar(fields: set[str]) -> str:
    if "time" not in fields:
        return "time"
    return "" if "close" in fields or {"bid", "ask"} <= fields else "close"


def _bar_completer(fields: set[str]) -> Callable[[Values], None]:
    def complete(values: Values) -> None:
        if values.get("time") is None:
            raise ValueError("time is missing")
        if values.get("close") is None:
            raise ValueError("close is missing")

    def complete_with_middle(values: Values) -> None:
        bid, ask = values.get("bid"), values.get("ask")
        if bid is None or ask is None:
            raise ValueError("the close needs both bid and ask")
        values["close"] = close = (bid + ask) / 2
        if not math.isfinite(close):
            raise ValueError("the middle of bid and ask is not finite")
        complete(values)

    return complete if "close" in fields else complete_with_middle
