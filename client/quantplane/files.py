"""Quotes and bars read from CSV and Parquet files.

A file is read row by row in bounded memory. A row that cannot be read is refused
with its line number and the reading goes on. A file or a description of it that
makes no sense is refused as a whole, before the first row is handed out.
"""

import csv
import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from io import BufferedReader, TextIOWrapper
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast
from zoneinfo import ZoneInfo

from quantplane import v1 as pb

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

Path = str | os.PathLike[str]
Columns = Mapping[str, str | int]
Message = TypeVar("Message")

QUOTE_FIELDS = tuple("time bid ask bid_size ask_size last volume".split())
BAR_FIELDS = tuple(
    "time open high low close volume vwap bid ask bid_size ask_size".split()
)

BATCH_ROWS = 1_000
LONGEST_LINE = 65_536  # characters
REFUSALS_KEPT = 20
# A file whose first rows are all refused, this many, was described wrongly.
HOPELESS_ROWS = 100
PARQUET_ROWS = 10_000

SECOND = 1_000_000_000  # nanoseconds, the unit of all whole-number times here
UNITS = {"s": SECOND, "ms": 1_000_000, "us": 1_000, "ns": 1}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)


class FileProblem(Exception):
    """The file cannot be read as it was described; no row of it was handed out."""


@dataclass(frozen=True)
class Refusal:
    """A row left out, and the number of its line (in Parquet: its row) from 1."""

    line: int
    reason: str


@dataclass
class Report:
    """What became of a file's rows; kept current while the file is read."""

    read: int = 0
    refused: int = 0
    # Only the first ones, so that a broken file does not fill the memory.
    refusals: list[Refusal] = field(default_factory=list)
    unit: str = "line"  # or "row": what the refusals are numbered by
    # The share of the file that has been read, 0 to 1.
    progress: float = 0.0

    def refuse(self, line: int, reason: str) -> None:
        self.refused += 1
        if len(self.refusals) < REFUSALS_KEPT:
            self.refusals.append(Refusal(line, reason))


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
    layout = _Layout(columns, time_format, tz, delimiter)
    kind = _Kind(pb.Quote, QUOTE_FIELDS, _lacking_for_quote, _quote_completer)
    return _read(kind, path, symbol, layout, report or Report())


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
    layout = _Layout(columns, time_format, tz, delimiter)
    kind = _Kind(pb.Bar, BAR_FIELDS, _lacking_for_bar, _bar_completer)
    return _read(kind, path, symbol, layout, report or Report())


def parse_time(text: str, time_format: str = "iso", tz: str = "UTC") -> int:
    """Return nanoseconds since 1970, as the readers do; ValueError if it is no time."""
    return _clock(time_format, _zone(tz))(text)


def parse_columns(text: str) -> dict[str, str | int]:
    """Parse `time=0,bid=Bid price` into fields and their columns."""
    columns: dict[str, str | int] = {}
    for part in text.split(","):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if not (name and column):
            raise FileProblem(f"--columns takes FIELD=COLUMN,...; {part!r} is not that")
        if name in columns:
            raise FileProblem(f"--columns names {name} twice")
        columns[name] = column
    return columns


# --- from rows to messages ----------------------------------------------------

Values = dict[str, Any]
Clock = Callable[[str], int]
# Completes the values of one row; ValueError says why they make no message.
Complete = Callable[[Values], None]


class _Layout(NamedTuple):
    columns: Columns | None
    time_format: str
    tz: str
    delimiter: str


class _Kind(NamedTuple, Generic[Message]):
    make: Callable[..., Message]
    fields: tuple[str, ...]
    # What the fields that have a column lack to make a message, or "".
    lacking: Callable[[set[str]], str]
    completer: Callable[[set[str]], Complete]


class _Table(NamedTuple):
    places: dict[str, int]  # each field's cell in a row
    clock: Clock
    rows: Iterable[tuple[int, Any]]  # with the line's number
    split: Callable[[Any], Sequence[str]]  # a row into cells; ValueError if it can't


class _Cell(NamedTuple):
    field: str
    place: int
    # Turns text that is not empty into a value, or None where it says that there
    # is none; ValueError says what is wrong with it.
    parse: Callable[[str], Any]


def _read(
    kind: _Kind[Message], path: Path, symbol: str, layout: _Layout, report: Report
) -> Iterator[list[Message]]:
    _check_symbol(symbol)
    with _open(path) as file:
        is_parquet = file.peek(4).startswith(b"PAR1")
        open_table = _parquet_table if is_parquet else _csv_table
        table = open_table(file, kind, layout, report)
        yield from _batches(kind, symbol, table, report)
    report.progress = 1.0


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise FileProblem(f"{os.fspath(path)}: {error.strerror}") from None


def _check_symbol(symbol: str) -> None:
    if not (
        0 < len(symbol) <= 64 and symbol.isprintable() and symbol == symbol.strip()
    ):
        raise FileProblem(
            f"symbol {symbol!r} is not 1 to 64 printable characters "
            "without leading or trailing space"
        )


def _batches(
    kind: _Kind[Message], symbol: str, table: _Table, report: Report
) -> Iterator[list[Message]]:
    split, complete = table.split, kind.completer(set(table.places))
    cells = [
        _Cell(name, place, _parser(name, table.clock))
        for name, place in table.places.items()
    ]
    batch = []
    for line, raw in table.rows:
        report.read += 1
        try:
            row = split(raw)
            values = {
                name: parse(row[place]) for name, place, parse in cells if row[place]
            }
            complete(values)
        except ValueError as error:
            report.refuse(line, _complaint(cells, split, raw) or str(error))
            _check_hope(report)
            continue
        batch.append(kind.make(symbol=symbol, **values))
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _complaint(
    cells: list[_Cell], split: Callable[[Any], Sequence[str]], raw: Any
) -> str | None:
    """Say which cell is wrong, if one is; apart, to keep the way of good rows short."""
    try:
        row = split(raw)
    except ValueError:
        return None
    for name, place, parse in cells:
        try:
            if row[place]:
                parse(row[place])
        except ValueError as error:
            return f"{name} {_shown(row[place])} {error}"
    return None


def _check_hope(report: Report) -> None:
    if report.refused == report.read == HOPELESS_ROWS:
        first = report.refusals[0]
        raise FileProblem(
            f"none of the first {HOPELESS_ROWS} rows can be read; "
            f"{report.unit} {first.line}: {first.reason}"
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _lacking_for_quote(fields: set[str]) -> str:
    if "time" not in fields:
        return "time"
    return "" if fields & {"bid", "ask", "last"} else "bid, ask or last"


def _quote_completer(fields: set[str]) -> Complete:
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


def _bar_completer(fields: set[str]) -> Complete:
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


# --- cells --------------------------------------------------------------------


def _parser(name: str, clock: Clock) -> Callable[[str], Any]:
    if name == "time":
        return _time_parser(clock)
    if name == "volume":
        return partial(_units, 2**63 - 1)
    if name in ("bid_size", "ask_size"):
        return partial(_units, 2**31 - 1)
    return _price


def _time_parser(clock: Clock) -> Callable[[str], dict[str, int] | None]:
    earliest = _nanoseconds(EARLIEST - EPOCH)
    latest = _nanoseconds(datetime.now(UTC) + timedelta(days=1) - EPOCH)

    def parse(text: str) -> dict[str, int] | None:
        text = text.strip()
        if not text:
            return None
        time = clock(text)
        if not earliest <= time <= latest:
            raise ValueError("lies outside 1900-01-01 to one day from now")
        seconds, nanos = divmod(time, SECOND)
        return {"seconds": seconds, "nanos": nanos}

    return parse


def _price(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        if text.isspace():
            return None
        raise ValueError("is not a number") from None
    if math.isfinite(value):
        return value
    if math.isnan(value):  # says that there is none
        return None
    raise ValueError("is not finite")


def _units(most: int, text: str) -> int | None:
    try:
        value = int(text)
    except ValueError:
        number = _price(text)  # `417.0` is as good as `417`
        if number is None:
            return None
        value = int(number)
        if value != number:
            raise ValueError("is not a whole number") from None
    if not 0 <= value <= most:
        raise ValueError(f"lies outside 0 to {most:,}")
    return value


# --- times --------------------------------------------------------------------

# Turns a moment, with a zone or on the wall clock of the file's zone, into
# nanoseconds since 1970 UTC.
Zone = Callable[[datetime], int]

_OFFSET = re.compile(r"(?:UTC|GMT)?([+-])(\d{1,2})(?::?(\d\d))?", re.IGNORECASE)
_BELOW_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")
# The directives of strptime that have one width, and the texts they surely match.
_FIXED_WIDTH = {
    "Y": "([0-9]{4})",
    "m": "(0[1-9]|1[0-2])",
    "d": "(0[1-9]|[12][0-9]|3[01])",
    "H": "([01][0-9]|2[0-3])",
    "M": "([0-5][0-9])",
    "S": "([0-5][0-9])",
    "f": "([0-9]{1,9})",
}


def _nanoseconds(since: timedelta) -> int:
    seconds = since.days * 86_400 + since.seconds
    return seconds * SECOND + since.microseconds * 1_000


def _zone(name: str) -> Zone:
    if match := _OFFSET.fullmatch(name):
        sign, hours, minutes = match.groups()
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        if offset < timedelta(days=1):
            return _fixed_zone(-offset if sign == "-" else offset)
    if name.upper() in ("UTC", "GMT", "Z"):
        return _fixed_zone(timedelta())
    try:
        return _named_zone(ZoneInfo(name))
    except (OSError, ValueError, KeyError):  # ZoneInfo raises all of them
        raise FileProblem(
            f"--tz {name!r} is no zone; use a name like America/New_York "
            "or an offset like -05:00"
        ) from None


def _fixed_zone(offset: timedelta) -> Zone:
    start = EPOCH.replace(tzinfo=None) + offset

    def convert(moment: datetime) -> int:
        return _nanoseconds(moment - (EPOCH if moment.tzinfo else start))

    return convert


def _named_zone(zone: ZoneInfo) -> Zone:
    def convert(moment: datetime) -> int:
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
            before = cast(timedelta, moment.utcoffset())
            after = cast(timedelta, moment.replace(fold=1).utcoffset())
            # To guess would store the rows of one hour over those of another.
            if before != after:
                times = "never" if before < after else "twice"
                raise ValueError(f"comes {times} in {zone}: its clocks change there")
        return _nanoseconds(moment - EPOCH)

    return convert


def _clock(time_format: str, zone: Zone) -> Clock:
    if time_format == "iso":
        return _iso_clock(zone)
    if time_format in UNITS:
        return partial(_count, UNITS[time_format])
    return _pattern_clock(time_format, zone)


def _iso_clock(zone: Zone) -> Clock:
    def read(text: str) -> int:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError("is not an ISO time: see --time-format") from None
        # Up to `20200101T220000.065000` there is nothing below microseconds.
        return zone(moment) + (_below_microseconds(text) if len(text) > 22 else 0)

    return read


def _below_microseconds(text: str) -> int:
    """Return the nanoseconds that fromisoformat leaves out."""
    if "." not in text and "," not in text:
        return 0
    match = _BELOW_MICROSECONDS.search(text)
    return int(match[1].ljust(3, "0")) if match else 0


def _count(unit: int, text: str) -> int:
    try:
        return int(text) * unit
    except ValueError:
        # A float would not hold `1577916000.065` seconds to the nanosecond.
        try:
            return int(Decimal(text) * unit)
        except (ValueError, ArithmeticError):
            raise ValueError("is not a number") from None


def _wall_count(zone: Zone, unit: int, text: str) -> int:
    """Return the time whose wall clock in `zone` counts so many units since 1970."""
    seconds, rest = divmod(int(text) * unit, SECOND)
    try:
        moment = EPOCH.replace(tzinfo=None) + timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError("lies outside all calendars") from None
    return zone(moment) + rest


def _pattern_clock(pattern: str, zone: Zone) -> Clock:
    _check_pattern(pattern)
    fast = _fixed_width_clock(pattern, zone)

    def read(text: str) -> int:
        time = fast(text)
        if time is not None:
            return time
        try:
            moment = datetime.strptime(text, pattern)  # noqa: DTZ007 - `zone` adds it
        except ValueError:
            raise ValueError(f"does not match {pattern!r}") from None
        return zone(moment)

    return read


def _check_pattern(pattern: str) -> None:
    if not re.search("%[YyGcx]", pattern):
        raise FileProblem(
            f"--time-format {pattern!r} is neither iso, s, ms, us or ns, "
            "nor a pattern of strptime with a year"
        )
    try:
        datetime.strptime("", pattern)  # noqa: DTZ007 - only the pattern counts
    except re.error:
        raise FileProblem(f"--time-format {pattern!r} repeats a directive") from None
    except ValueError as error:
        if "does not match" not in str(error):
            raise FileProblem(f"--time-format {pattern!r}: {error}") from None


def _fixed_width_clock(pattern: str, zone: Zone) -> Callable[[str], int | None]:
    """Return a fast clock for the texts that surely mean what strptime says.

    It returns None for all others.
    """
    letters = re.findall("%(.)", pattern)
    if (
        not {"Y", "m", "d"} <= set(letters) <= set(_FIXED_WIDTH)
        or len(set(letters)) < len(letters)
        or re.search("%f[%0-9]", pattern)  # where the fraction ends is not sure
    ):
        return lambda text: None
    match = _expression(pattern).fullmatch
    iso = _iso_template(letters)
    fraction = letters.index("f") + 1 if "f" in letters else 0

    def read(text: str) -> int | None:
        found = match(text)
        if not found:
            return None
        try:
            moment = datetime.fromisoformat(iso(*found.groups()))
        except ValueError:
            return None
        time = zone(moment)
        if fraction and len(digits := found[fraction]) > 6:
            time += int(digits[6:].ljust(3, "0"))
        return time

    return read


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split("%(.)", pattern)
    parts[::2] = [re.escape(literal) for literal in parts[::2]]
    parts[1::2] = [_FIXED_WIDTH[letter] for letter in parts[1::2]]
    return re.compile("".join(parts))


def _iso_template(letters: list[str]) -> Callable[..., str]:
    """Return what puts the values of the directives in the order of an ISO time."""
    year, month, day, hour, minute, second = (
        f"{{{letters.index(letter)}}}" if letter in letters else "00"
        for letter in "YmdHMS"
    )
    fraction = f".{{{letters.index('f')}}}" if "f" in letters else ""
    return f"{year}-{month}-{day}T{hour}:{minute}:{second}{fraction}".format


# --- columns ------------------------------------------------------------------


def _places(
    kind: _Kind[Message], columns: Columns | None, names: list[str], named: bool
) -> dict[str, int]:
    """Return the number of each field's column.

    `names` is the header, or the first row where the file has none.
    """
    if columns is None:
        columns = {name: name for name in kind.fields if name in names}
    for name in columns:
        if name not in kind.fields:
            raise FileProblem(
                f"there is no field {name!r}; the fields are {', '.join(kind.fields)}"
            )
    places = {
        name: _place(name, column, names, named) for name, column in columns.items()
    }
    if lacking := kind.lacking(set(places)):
        raise FileProblem(
            f"no column is {lacking}; {_columns_of(names, named)}; "
            "pass --columns FIELD=COLUMN,..."
        )
    return places


def _place(name: str, column: str | int, names: list[str], named: bool) -> int:
    if _is_number(column):
        if 0 <= int(column) < len(names):
            return int(column)
        raise FileProblem(
            f"there is no column {column} for {name}; "
            f"the {len(names)} columns are numbered from 0"
        )
    count = names.count(str(column))
    if count == 1:
        return names.index(str(column))
    problem = "comes twice, so give its number from 0" if count else "is not there"
    raise FileProblem(
        f"the column {column!r} for {name} {problem}; {_columns_of(names, named)}"
    )


def _is_number(column: str | int) -> bool:
    return isinstance(column, int) or (column.isascii() and column.isdigit())


def _columns_of(names: list[str], named: bool) -> str:
    if not named:
        return f"the file has {len(names)} columns, numbered from 0"
    if any(_looks_like_data(name) for name in names):
        return (
            f"the first line, {_shown(','.join(names))}, looks like a row: if the "
            "file has no header, number its columns from 0"
        )
    more = ", ..." if len(names) > 50 else ""
    return f"the file has the columns {', '.join(names[:50])}{more}"


def _looks_like_data(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


# --- CSV ----------------------------------------------------------------------

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}
_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_DELIMITERS = {"tab": "\t", "\\t": "\t"}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def _csv_table(
    file: BufferedReader, kind: _Kind[Message], layout: _Layout, report: Report
) -> _Table:
    delimiter = _DELIMITERS.get(layout.delimiter, layout.delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise FileProblem(f"--delimiter {delimiter!r} is not one character, or tab")
    lines = _lines(_text(file), file, report)
    first = next(lines, None)
    if first is None:
        raise FileProblem("the file is empty")
    named = layout.columns is None or not all(map(_is_number, layout.columns.values()))
    names = [name.strip() for name in _first_cells(first[1], delimiter)]
    return _Table(
        _places(kind, layout.columns, names, named),
        _clock(layout.time_format, _zone(layout.tz)),
        lines if named else chain([first], lines),
        partial(_cells, delimiter, len(names)),
    )


def _text(file: BufferedReader) -> TextIOWrapper:
    start = file.peek(8)
    for magic, what in _ARCHIVES.items():
        if start.startswith(magic):
            raise FileProblem(f"the file is {what}: unpack it first")
    if start.startswith(_GZIP):
        file = BufferedReader(gzip.GzipFile(fileobj=file))
    try:
        start = file.peek(8)
    except _DAMAGED as error:
        raise FileProblem(f"the gzip data is damaged: {error}") from None
    marks = (code for mark, code in _BYTE_ORDER_MARKS.items() if start.startswith(mark))
    # A byte that is not UTF-8 spoils its own cell, not the whole file.
    return TextIOWrapper(file, next(marks, "utf-8"), errors="replace")


def _lines(
    text: TextIOWrapper, file: BufferedReader, report: Report
) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    size = os.fstat(file.fileno()).st_size
    number = 0
    try:
        with text:
            while line := text.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise EOFError(f"a line has {LONGEST_LINE:,} characters or more")
                if size and number % BATCH_ROWS == 0:
                    report.progress = min(file.tell() / size, 1.0)
                if not line.isspace():
                    yield number, line.rstrip("\n")
    except _DAMAGED as error:
        report.read += 1
        report.refuse(number + 1, f"nothing can be read from here on: {error}")


def _first_cells(line: str, delimiter: str) -> list[str]:
    if "\0" in line:
        raise FileProblem("the file is not text")
    try:
        cells = _split(delimiter, line)
    except ValueError as error:
        raise FileProblem(f"the first line {error}") from None
    if len(cells) == 1:
        _suggest_delimiter(line)
    return cells


def _suggest_delimiter(line: str) -> None:
    for delimiter in ";\t|,":
        if delimiter in line:
            shown, value = f"`{delimiter}`", f"'{delimiter}'"
            if delimiter == "\t":
                shown = value = "tab"
            raise FileProblem(
                f"found 1 column, {shown} looks like the delimiter: "
                f"pass --delimiter {value}"
            )


def _cells(delimiter: str, width: int, line: str) -> list[str]:
    cells = _split(delimiter, line)
    if len(cells) != width:
        raise ValueError(f"has {len(cells)} cells, not {width}")
    return cells


def _split(delimiter: str, line: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    # Line by line, lest one stray quote swallow the lines after it.
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"has a stray quote: {error}") from None


# --- Parquet ------------------------------------------------------------------


def _parquet_table(
    file: BufferedReader, kind: _Kind[Message], layout: _Layout, report: Report
) -> _Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise FileProblem(
            "reading Parquet needs pyarrow: pip install 'quantplane[cli]'"
        ) from None
    try:
        source = parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise FileProblem(f"the Parquet file is damaged: {error}") from None
    schema = source.schema_arrow
    places = _places(kind, layout.columns, schema.names, named=True)
    for name, index in places.items():
        _check_type(name, schema.field(index))
    time = schema.field(places["time"])
    return _Table(
        {name: order for order, name in enumerate(places)},
        _column_clock(time.type, layout),
        _parquet_rows(source, [schema.names[i] for i in places.values()], report),
        lambda row: cast(Sequence[str], row),
    )


def _check_type(name: str, column: "pyarrow.Field") -> None:
    import pyarrow.types as types

    is_time = types.is_timestamp(column.type) or types.is_date(column.type)
    if types.is_nested(column.type) or (is_time and name != "time"):
        raise FileProblem(f"the column {column.name!r} for {name} is {column.type}")


def _column_clock(column_type: "pyarrow.DataType", layout: _Layout) -> Clock:
    import pyarrow.types as types

    zone = _zone(layout.tz)
    if types.is_date(column_type):
        return partial(_wall_count, zone, SECOND)
    if types.is_timestamp(column_type):
        unit = UNITS[column_type.unit]
        return partial(_count if column_type.tz else partial(_wall_count, zone), unit)
    if _is_text(column_type) or layout.time_format in UNITS:
        return _clock(layout.time_format, zone)
    raise FileProblem(
        f"the column for time holds {column_type}: pass --time-format s, ms, us or ns"
    )


def _is_text(column_type: "pyarrow.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return bool(types.is_string(column_type) or types.is_large_string(column_type))


def _parquet_rows(
    source: "parquet.ParquetFile", names: list[str], report: Report
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the rows of these columns as text, so that one parser serves all files."""
    report.unit = "row"
    total, number = source.metadata.num_rows, 0
    for batch in source.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names))):
        columns = [_texts(batch.column(name)) for name in names]
        yield from enumerate(zip(*columns, strict=True), number + 1)
        number += batch.num_rows
        report.progress = number / total


def _texts(column: "pyarrow.Array") -> list[str]:
    """Return the cells as a CSV file would have them: exact, empty where null."""
    import pyarrow
    import pyarrow.types as types

    if types.is_date(column.type):
        column = column.cast(pyarrow.timestamp("s"))
    if types.is_timestamp(column.type):
        column = column.cast(pyarrow.int64())
    if types.is_floating(column.type):
        column = column.cast(pyarrow.float64())
    texts: list[str] = column.cast(pyarrow.string()).fill_null("").to_pylist()
    return texts
