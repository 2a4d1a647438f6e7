"""Parquet files, as tables of text: one parser serves all files."""

from collections.abc import Iterator, Sequence
from functools import partial
from io import BufferedReader
from typing import TYPE_CHECKING, cast

from quantplane.files.columns import places_of
from quantplane.files.report import FileProblem, Report
from quantplane.files.table import Kind, Layout, Table
from quantplane.files.times import (
    SECOND,
    UNITS,
    Clock,
    clock_of,
    count,
    wall_count,
    zone_of,
)

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

BATCH_ROWS = 10_000
STAMPS = ("time", "expiration")  # the fields that a column of times may be


def parquet_table(
    file: BufferedReader, kind: Kind, layout: Layout, report: Report
) -> Table:
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
    places = places_of(kind, layout.columns, schema.names, named=True)
    columns = {name: schema.field(place) for name, place in places.items()}
    for name, column in columns.items():
        _check_type(name, column)
    time = columns["time"].type if "time" in columns else pyarrow.string()
    return Table(
        {name: order for order, name in enumerate(columns)},
        _clock(time, layout),
        _rows(source, {name: column.name for name, column in columns.items()}, report),
        lambda row: cast(Sequence[str], row),
    )


def _check_type(name: str, column: "pyarrow.Field") -> None:
    import pyarrow.types as types

    is_time = types.is_timestamp(column.type) or types.is_date(column.type)
    if types.is_nested(column.type) or (is_time and name not in STAMPS):
        raise FileProblem(f"the column {column.name!r} for {name} is {column.type}")


def _clock(column_type: "pyarrow.DataType", layout: Layout) -> Clock:
    import pyarrow.types as types

    zone = zone_of(layout.tz)
    if types.is_date(column_type):
        return partial(wall_count, zone, SECOND)
    if types.is_timestamp(column_type):
        unit = UNITS[column_type.unit]
        return partial(count if column_type.tz else partial(wall_count, zone), unit)
    if _is_text(column_type) or layout.time_format in UNITS:
        return clock_of(layout.time_format, zone)
    raise FileProblem(
        f"the column for time holds {column_type}: pass --time-format s, ms, us or ns"
    )


def _is_text(column_type: "pyarrow.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return bool(types.is_string(column_type) or types.is_large_string(column_type))


def _rows(
    source: "parquet.ParquetFile", names: dict[str, str], report: Report
) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the rows' cells; `names` are the fields and their columns."""
    report.unit = "row"
    total, number = source.metadata.num_rows, 0
    wanted = list(dict.fromkeys(names.values()))
    for batch in source.iter_batches(BATCH_ROWS, columns=wanted):
        columns = [_texts(field, batch.column(name)) for field, name in names.items()]
        yield from enumerate(zip(*columns, strict=True), number + 1)
        number += batch.num_rows
        report.progress = number / total


def _texts(field: str, column: "pyarrow.Array") -> list[str]:
    """Return the cells as a CSV file would have them: exact, empty where null."""
    import pyarrow
    import pyarrow.types as types

    is_stamp = types.is_date(column.type) or types.is_timestamp(column.type)
    if is_stamp and field == "expiration":
        column = column.cast(pyarrow.date32())  # of a moment, the date in its own zone
    elif types.is_date(column.type):
        column = column.cast(pyarrow.timestamp("s"))
    if types.is_timestamp(column.type) and field == "time":
        column = column.cast(pyarrow.int64())
    if types.is_floating(column.type):
        column = column.cast(pyarrow.float64())
    texts: list[str] = column.cast(pyarrow.string()).fill_null("").to_pylist()
    return texts
