"""The terms of the readers: what is wanted of a file, and what is found in it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from quantplane.files.times import Clock

Columns = Mapping[str, str | int]  # field -> its column's name, or number from 0
Values = dict[str, Any]  # of one row, by field
# Turns text that is not empty into a value, or None where it says that there is
# none; ValueError says what is wrong with it.
Parse = Callable[[str], Any]


class Layout(NamedTuple):
    """What the caller says of the file."""

    columns: Columns | None
    time_format: str
    tz: str
    delimiter: str


class Kind(NamedTuple):
    """What the rows are of."""

    fields: tuple[str, ...]
    # What the fields that have a column lack, or "".
    lacking: Callable[[set[str]], str]
    parser: Callable[[str, Clock], Parse]  # of a field
    # Completes the values of a row whose fields are these; ValueError says why they
    # are of no use.
    completer: Callable[[set[str]], Callable[[Values], None]]
    # Whether a field that `columns` leaves out is the column named as the field.
    finds_others: bool = False


class Table(NamedTuple):
    """An open file."""

    places: dict[str, int]  # each field's cell in a row
    clock: Clock
    rows: Iterable[tuple[int, Any]]  # with the line's number
    split: Callable[[Any], Sequence[str]]  # a row into cells; ValueError if it can't
