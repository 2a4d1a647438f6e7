"""CSV files, plain or compressed by gzip, as tables."""

import csv
import gzip
import os
import zlib
from collections.abc import Iterator
from functools import partial
from io import BufferedReader, TextIOWrapper
from itertools import chain

from quantplane.files.columns import has_header, places_of
from quantplane.files.report import FileProblem, Report
from quantplane.files.table import Kind, Layout, Table
from quantplane.files.times import clock_of, zone_of

LONGEST_LINE = 65_536  # characters
PROGRESS_LINES = 1_000

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


def csv_table(
    file: BufferedReader, kind: Kind, layout: Layout, report: Report
) -> Table:
    delimiter = _DELIMITERS.get(layout.delimiter, layout.delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise FileProblem(f"--delimiter {delimiter!r} is not one character, or tab")
    lines = _lines(_text(file), file, report)
    first = next(lines, None)
    if first is None:
        raise FileProblem("the file is empty")
    named = has_header(layout.columns)
    names = [name.strip() for name in _first_cells(first[1], delimiter)]
    return Table(
        places_of(kind, layout.columns, names, named),
        clock_of(layout.time_format, zone_of(layout.tz)),
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
                if size and number % PROGRESS_LINES == 0:
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
