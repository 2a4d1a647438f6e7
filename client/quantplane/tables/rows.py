"""Rows as tables: whole in a pipe, as wide as it is on a terminal."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from shutil import get_terminal_size
from typing import IO, TYPE_CHECKING, Generic, TypeAlias, TypeVar

from quantplane.tables.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

Row = TypeVar("Row")
Cell: "TypeAlias" = "str | Text"

# Rows at either end of a table that is too long to be shown whole.
END_ROWS = 20
PIPE_WIDTH = 10_000  # more than any row has
SEPARATOR = 3  # characters between two columns
# Characters that are room enough for a column.
WRAPPED = {"note": 30, "description": 30, "limits": 30, "change": 40}
LABEL = 12  # characters of what stands before a detail

TEXTS = {
    *("symbol", "time", "first", "last", "expiration", "order", "strategy"),
    *("client id", "signal", "side", "type", "status", "tif", "note", "venue"),
    *("key", "column", "opened by", "marked", "expires"),
    *("name", "symbols", "limits", "updated", "setting", "set", "by", "description"),
    *("who", "from", "action", "resource", "change", "method", "state"),
}  # whose columns begin at the left


class Ends(Generic[Row]):
    """The first and the last of any number of rows."""

    def __init__(self) -> None:
        self.count = 0
        self._head: list[Row] = []
        self._tail: deque[Row] = deque(maxlen=END_ROWS)

    def add(self, row: Row) -> None:
        self.count += 1
        if len(self._head) < END_ROWS:
            self._head.append(row)
        else:
            self._tail.append(row)

    @property
    def rows(self) -> list[Row]:
        return [*self._head, *self._tail]

    @property
    def hidden(self) -> int:
        return self.count - len(self._head) - len(self._tail)

    def __iter__(self) -> Iterator[Row | None]:
        """Yield the rows, and None for all that are left out."""
        yield from self._head
        if self.hidden:
            yield None
        yield from self._tail


def table_of(names: Iterable[str], wrap: bool = False) -> "Table":
    """Return an empty table; with `wrap`, texts that lack room go on below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in names:
        is_text = name in TEXTS
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not (wrap and is_text),
            overflow="fold" if wrap and is_text else "ellipsis",
        )
    return table


def add_row(table: "Table", *cells: "Cell") -> None:
    from rich.text import Text

    # A symbol may have brackets, which are no markup.
    texts = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*texts)


def fitted(
    rows: Sequence[Mapping[str, "Cell"]], room: int, dispensable: Iterable[str] = ()
) -> "Table":
    """Return a table of one row or more, all with the columns of the first.

    Columns without any value are left out, and of the dispensable ones, in their
    order, as many as it takes to get by with the room.
    """
    widths = {
        name: min(
            max(len(name), *(_width(row[name]) for row in rows)),
            WRAPPED.get(name, room),
        )
        for name in rows[0]
        if any(row[name] for row in rows)
    }
    for name in dispensable:
        if sum(width + SEPARATOR for width in widths.values()) <= room:
            break
        widths.pop(name, None)
    table = table_of(widths, wrap=True)
    for row in rows:
        add_row(table, *(row[name] for name in widths))
    return table


def _width(cell: "Cell") -> int:
    from rich.cells import cell_len

    return cell_len(printable(cell)) if isinstance(cell, str) else cell.cell_len


def print_rows(
    out: IO[str],
    rows: Sequence[Mapping[str, "Cell"]],
    dispensable: Iterable[str] = (),
) -> None:
    print_table(out, fitted(rows, room_of(out), dispensable))


def print_details(out: IO[str], details: Iterable[tuple[str, str]]) -> None:
    """Print what is known of one thing, a line for each part of it."""
    for label, text in details:
        if text:
            print(f"{label:<{LABEL}} {printable(text)}", file=out)


def print_table(out: IO[str], table: "RenderableType") -> None:
    console_of(out).print(table)


def console_of(out: IO[str]) -> "Console":
    from rich.console import Console

    return Console(file=out, width=room_of(out), height=get_terminal_size().lines)


def room_of(out: IO[str]) -> int:
    """Return characters; a pipe has no width that cells would have to be cut to."""
    return get_terminal_size().columns if out.isatty() else PIPE_WIDTH


def coloured(text: str, value: float) -> "Text":
    """Return the text green or red, as the value is above or below 0."""
    from rich.text import Text

    return Text(text, "green" if value > 0 else "red" if value < 0 else "")
