"""Quotes, bars and symbols as text."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.files import BAR_FIELDS, QUOTE_FIELDS
from quantplane.tables.rows import Ends, add_row, print_table, table_of
from quantplane.tables.text import brief, iso, microseconds, printable

BarRow = dict[str, Any]  # symbol and the fields of a bar; None where unknown


def quote_json(quote: pb.Quote) -> str:
    """Return the quote as a line of JSON, its prices bit for bit."""
    fields: dict[str, Any] = {"symbol": quote.symbol, "time": iso(quote.time)}
    name: Any  # HasField takes literals only
    for name in QUOTE_FIELDS[1:]:
        fields[name] = getattr(quote, name) if quote.HasField(name) else None
    return json.dumps(fields, ensure_ascii=False)


def quote_line(quote: pb.Quote) -> str:
    def shown(name: Any) -> str:
        return repr(getattr(quote, name)) if quote.HasField(name) else "-"

    return (
        f"{iso(quote.time)}  {printable(quote.symbol):<12} "
        f"{shown('bid'):>12} {shown('ask'):>12} "
        f"{shown('bid_size'):>9} x {shown('ask_size'):<9} {shown('last'):>12}"
    ).rstrip()


def bar_rows(chunk: pb.BarColumns) -> Iterator[BarRow]:
    columns = [_cells(chunk, name) for name in BAR_FIELDS[1:]]
    for time_us, *cells in zip(chunk.time_us, *columns, strict=True):
        time = Timestamp()
        time.FromMicroseconds(time_us)
        yield {
            "symbol": chunk.symbol,
            "time": time,
            **dict(zip(BAR_FIELDS[1:], cells, strict=True)),
        }


def _cells(chunk: pb.BarColumns, name: str) -> list[Any]:
    """Return a column with None for what is unknown: NaN, -1, or all of it."""
    values = getattr(chunk, name)
    return [
        None if math.isnan(value) or (value == -1 and isinstance(value, int)) else value
        for value in values
    ] or [None] * len(chunk.time_us)


class BarWriter(Protocol):
    def write(self, rows: Iterable[BarRow]) -> None: ...
    def close(self) -> None: ...


class CsvBars:
    """Prints every bar; `quantplane import bars` reads it again as it is."""

    def __init__(self, out: IO[str]) -> None:
        self._csv = csv.DictWriter(out, ["symbol", *BAR_FIELDS], lineterminator="\n")
        self._has_header = False

    def write(self, rows: Iterable[BarRow]) -> None:
        self._write_header()
        self._csv.writerows({**row, "time": microseconds(row["time"])} for row in rows)

    def close(self) -> None:
        self._write_header()

    def _write_header(self) -> None:
        # Not before there is an answer: an error leaves nothing behind.
        if not self._has_header:
            self._csv.writeheader()
            self._has_header = True


class JsonBars:
    """Prints every bar as a line of JSON."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def write(self, rows: Iterable[BarRow]) -> None:
        for row in rows:
            fields = {**row, "time": microseconds(row["time"])}
            self._out.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


class TableBars:
    """Prints a table, without the middle of a long one or any empty column."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._ends: Ends[BarRow] = Ends()

    def write(self, rows: Iterable[BarRow]) -> None:
        for row in rows:
            self._ends.add(row)

    def close(self) -> None:
        ends = self._ends
        names = [
            name
            for name in BAR_FIELDS
            if any(row[name] is not None for row in ends.rows)
        ]
        table = table_of(names)
        for row in ends:
            cells = (_shown(row[name]) if row else "..." for name in names)
            add_row(table, *cells)
        if ends.hidden:
            table.caption = (
                f"{ends.hidden:,} of {ends.count:,} bars are left out; --csv has all"
            )
        print_table(self._out, table)


def _shown(value: Any) -> str:
    if isinstance(value, Timestamp):
        return brief(value)
    return "" if value is None else repr(value)


def print_symbols(out: IO[str], symbols: Iterable[pb.Symbol]) -> None:
    table = table_of(("symbol", "first", "last"))
    for symbol in symbols:
        first, last = brief(symbol.first_time), brief(symbol.last_time)
        add_row(table, symbol.symbol, first, last)
    print_table(out, table)
