"""Rows of any kind, from either sort of file, one by one."""

import os
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from typing import Any, NamedTuple

from quantplane.files.csv_file import csv_table
from quantplane.files.parquet_file import parquet_table
from quantplane.files.report import FileProblem, Report, shown
from quantplane.files.table import Kind, Layout, Parse, Values

Path = str | os.PathLike[str]


class _Cell(NamedTuple):
    field: str
    place: int
    parse: Parse


def read_rows(
    kind: Kind, path: Path, layout: Layout, report: Report
) -> Iterator[tuple[int, Values]]:
    """Yield the values of each row that can be read, with the line's number."""
    with _open(path) as file:
        is_parquet = file.peek(4).startswith(b"PAR1")
        open_table = parquet_table if is_parquet else csv_table
        table = open_table(file, kind, layout, report)
        split, complete = table.split, kind.completer(set(table.places))
        cells = [
            _Cell(name, place, kind.parser(name, table.clock))
            for name, place in table.places.items()
        ]
        for line, raw in table.rows:
            report.read += 1
            try:
                row = split(raw)
                values = {
                    name: parse(row[place])
                    for name, place, parse in cells
                    if row[place]
                }
                complete(values)
            except ValueError as error:
                report.refuse(line, _complaint(cells, split, raw) or str(error))
                report.check_hope()
                continue
            yield line, values
    report.progress = 1.0


def check_symbol(symbol: str, what: str = "symbol") -> None:
    """Raise FileProblem for a symbol that the server would refuse."""
    if not (
        0 < len(symbol) <= 64 and symbol.isprintable() and symbol == symbol.strip()
    ):
        raise FileProblem(
            f"{what} {symbol!r} is not 1 to 64 printable characters "
            "without leading or trailing space"
        )


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise FileProblem(f"{os.fspath(path)}: {error.strerror}") from None


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
            return f"{name} {shown(row[place])} {error}"
    return None
