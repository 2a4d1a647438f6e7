"""What the command line prints: quotes, bars, chains, symbols and events, as text."""

import csv
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from itertools import groupby
from operator import itemgetter
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.files import BAR_FIELDS, CONTRACT_VALUES, QUOTE_FIELDS
from quantplane.files.times import EPOCH

if TYPE_CHECKING:
    from rich.table import Table

# Rows at either end of a table that is too long to be shown whole.
END_ROWS = 20

BarRow = dict[str, Any]  # symbol and the fields of a bar; None where unknown
ContractRow = dict[str, Any]  # underlying and the fields of a contract, likewise

TYPES = {pb.OPTION_TYPE_CALL: "call", pb.OPTION_TYPE_PUT: "put"}
# What a chain shows of a contract.
SHOWN = {
    "bid": "bid",
    "ask": "ask",
    "last": "last_price",
    "volume": "volume",
    "OI": "open_interest",
    "IV": "implied_vol",
}
# What it leaves out, one after another, until it fits a terminal.
DISPENSABLE = ("last", "volume", "OI")
CELL = 9  # characters


def iso(time: Timestamp) -> str:
    """Return the time in UTC with all nanoseconds, as `2020-01-01T22:00:00.0...Z`."""
    second = EPOCH + timedelta(seconds=time.seconds)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{time.nanos:09}Z"


def brief(time: Timestamp) -> str:
    """Return the time in UTC without the zeros behind its seconds."""
    return iso(time).rstrip("Z").rstrip("0").rstrip(".") + "Z"


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
        f"{iso(quote.time)}  {quote.symbol:<12} "
        f"{shown('bid'):>12} {shown('ask'):>12} "
        f"{shown('bid_size'):>9} x {shown('ask_size'):<9} {shown('last'):>12}"
    ).rstrip()


def event_lines(event: pb.StreamEvent) -> Iterator[str]:
    """Yield what a person who watches a stream should know of this event."""
    for key in event.subscribed.keys:
        if key.state == pb.KEY_STATE_NO_DATA:
            yield f"{key.key}: nothing was published yet; is the symbol right?"
    if event.HasField("gap"):
        cause = pb.GapCause.Name(event.gap.cause).removeprefix("GAP_CAUSE_").lower()
        start = iso(event.gap.start_time) if event.gap.HasField("start_time") else "?"
        yield f"gap from {start} to {iso(event.gap.end_time)}: {cause}"


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


def _microseconds(time: Timestamp) -> str:
    return iso(time).removesuffix("000Z") + "Z"


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
        self._csv.writerows({**row, "time": _microseconds(row["time"])} for row in rows)

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
            fields = {**row, "time": _microseconds(row["time"])}
            self._out.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


class TableBars:
    """Prints a table, without the middle of a long one or any empty column."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._count = 0
        self._head: list[BarRow] = []
        self._tail: deque[BarRow] = deque(maxlen=END_ROWS)

    def write(self, rows: Iterable[BarRow]) -> None:
        for row in rows:
            self._count += 1
            if len(self._head) < END_ROWS:
                self._head.append(row)
            else:
                self._tail.append(row)

    def close(self) -> None:
        rows = [*self._head, *self._tail]
        names = [
            name for name in BAR_FIELDS if any(row[name] is not None for row in rows)
        ]
        table = _table(*names)
        hidden = self._count - len(rows)
        for place, row in enumerate(rows):
            if hidden and place == END_ROWS:
                _add_row(table, *["..." for _ in names])
            _add_row(table, *(_shown(row[name]) for name in names))
        if hidden:
            table.caption = (
                f"{hidden:,} of {self._count:,} bars are left out; --csv has all"
            )
        _print(self._out, table)


def _shown(value: Any) -> str:
    if isinstance(value, Timestamp):
        return brief(value)
    return "" if value is None else repr(value)


def print_symbols(out: IO[str], symbols: Iterable[pb.Symbol]) -> None:
    table = _table("symbol", "first", "last")
    for symbol in symbols:
        first, last = brief(symbol.first_time), brief(symbol.last_time)
        _add_row(table, symbol.symbol, first, last)
    _print(out, table)


def contract_rows(chain: pb.OptionChain) -> Iterator[ContractRow]:
    for contract in chain.contracts:
        row: ContractRow = {
            "underlying": chain.underlying,
            "time": contract.time if contract.HasField("time") else chain.time,
            "expiration": contract.expiration,
            "strike": contract.strike,
            "option_type": TYPES[contract.option_type],
        }
        name: Any  # HasField takes literals only
        for name in CONTRACT_VALUES:
            known = contract.HasField(name)
            row[name] = getattr(contract, name) if known else None
        yield row


def contract_json(row: ContractRow, gone: bool = False) -> str:
    """Return the contract as a line of JSON, its numbers bit for bit."""
    fields = {**row, "time": _microseconds(row["time"])}
    return json.dumps({**fields, "gone": True} if gone else fields, ensure_ascii=False)


def contract_line(row: ContractRow, gone: bool = False) -> str:
    cells = _contract_cells(row, SHOWN)
    values = "".join(f"{cell or '-':>10}" for cell in cells)
    return (
        f"{brief(row['time']):<27}  {row['underlying']:<8} {row['expiration']} "
        f"{_number(row['strike']):>9} {row['option_type']:<4}"
        f"{'      gone' if gone else values}"
    )


def print_chain(out: IO[str], chain: pb.OptionChain) -> None:
    """Print a table for each expiration: calls, the strike, puts."""
    names = list(SHOWN)
    room = get_terminal_size().columns if out.isatty() else sys.maxsize
    for name in DISPENSABLE:
        if (2 * len(names) + 1) * CELL <= room:
            break
        names.remove(name)
    head = _chain_line([*names, "strike", *names])
    out.write(f"{chain.underlying} as of {brief(chain.time)}\n")
    for expiration, rows in groupby(contract_rows(chain), itemgetter("expiration")):
        days = _days(chain.time, expiration)
        title = f"calls  |  {expiration}, {days} days  |  puts"
        centred = title.center(len(head)).rstrip()
        out.write(f"\n{centred}\n{head}\n{'-' * len(head)}\n")
        for strike, pair in groupby(rows, itemgetter("strike")):
            sides = {row["option_type"]: row for row in pair}
            call, put = (
                _contract_cells(sides.get(side, {}), names) for side in ("call", "put")
            )
            out.write(_chain_line([*call, _number(strike), *put]).rstrip() + "\n")


def _chain_line(cells: Iterable[str]) -> str:
    return "".join(f" {cell:>{CELL - 1}}" for cell in cells)


def _contract_cells(row: ContractRow, columns: Iterable[str]) -> list[str]:
    values = {name: row.get(SHOWN[name]) for name in columns}
    return [
        "" if value is None else f"{value:.1%}" if name == "IV" else _number(value)
        for name, value in values.items()
    ]


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _days(time: Timestamp, expiration: str) -> int:
    return (date.fromisoformat(expiration) - time.ToDatetime().date()).days


def print_expirations(out: IO[str], response: pb.ListExpirationsResponse) -> None:
    table = _table("expiration", "days", "calls", "puts", "lowest", "highest strike")
    for expiration in response.expirations:
        _add_row(
            table,
            expiration.date,
            str(_days(response.time, expiration.date)),
            str(expiration.calls),
            str(expiration.puts),
            _number(expiration.min_strike),
            _number(expiration.max_strike),
        )
    _print(out, table)


def expiration_json(expiration: pb.Expiration) -> str:
    names = ("calls", "puts", "min_strike", "max_strike")
    values = {name: getattr(expiration, name) for name in names}
    return json.dumps({"expiration": expiration.date, **values})


def _table(*names: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in names:
        is_text = name in ("symbol", "time", "first", "last", "expiration")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    return table


def _add_row(table: "Table", *cells: str) -> None:
    from rich.text import Text

    # A symbol may have brackets, which are no markup.
    table.add_row(*map(Text, cells))


def _print(out: IO[str], table: "Table") -> None:
    from rich.console import Console

    # A pipe has no width that cells would have to be cut to.
    Console(file=out, width=None if out.isatty() else 250).print(table)
