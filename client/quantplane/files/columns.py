"""Which column of a file is which field."""

from quantplane.files.report import FileProblem, shown
from quantplane.files.table import Columns, Kind


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


def has_header(columns: Columns | None) -> bool:
    """Tell whether the first line names the columns: not if all go by number."""
    return columns is None or not all(map(_is_number, columns.values()))


def places_of(
    kind: Kind, columns: Columns | None, names: list[str], named: bool
) -> dict[str, int]:
    """Return the number of each field's column.

    `names` is the header, or the first row where the file has none.
    """
    if columns is None or (named and kind.finds_others):
        found = {name: name for name in kind.fields if name in names}
        columns = {**found, **(columns or {})}
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
            f"the first line, {shown(','.join(names))}, looks like a row: if the "
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
