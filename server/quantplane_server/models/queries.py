"""All SQL on heston_parameters, sabr_parameters and ou_parameters.

The three tables have one shape, so each statement is written once for a `Model`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor

from quantplane import v1 as pb
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.db import Connection

TYPES = {
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_MESSAGE: "timestamptz",
    FieldDescriptor.TYPE_DOUBLE: "float8",
    FieldDescriptor.TYPE_INT32: "int",
    FieldDescriptor.TYPE_BOOL: "bool",
}
YIELD_ROWS = 512


class Model(NamedTuple):
    """A model's table. Its columns are the fields of the message, by their names."""

    kind: str  # what WatchModels calls it
    table: str
    message: Any
    name: str  # the column that says what a row is about
    place: tuple[str, ...]  # the columns that order the rows of one name

    @property
    def fields(self) -> Sequence[FieldDescriptor]:
        fields: Sequence[FieldDescriptor] = self.message.DESCRIPTOR.fields
        return fields

    @property
    def columns(self) -> str:
        return ", ".join(field.name for field in self.fields)

    def topic(self, name: str) -> str:
        return f"{self.kind}:{name}"

    def name_of(self, row: Any) -> str:
        name: str = getattr(row, self.name)
        return name

    def place_of(self, row: Any) -> tuple[Any, ...]:
        """Return where a row stands among those of its name, the time in us."""
        _, *more = self.place
        return time_us(row.time), *(getattr(row, column) for column in more)


HESTON = Model("heston", "heston_parameters", pb.HestonParameters, "symbol", ("time",))
SABR = Model(
    "sabr", "sabr_parameters", pb.SabrParameters, "symbol", ("time", "maturity")
)
OU = Model("ou", "ou_parameters", pb.OuParameters, "pair_id", ("time",))


async def store(conn: Connection, model: Model, rows: Iterable[Any]) -> None:
    """Store parameters; each replaces the row of its key.

    Rows are locked in the order of their keys, so that two who store the same ones do
    not wait for each other.
    """
    rows = sorted(rows, key=lambda row: (model.name_of(row), model.place_of(row)))
    types = [TYPES[field.type] for field in model.fields]
    arrays = ", ".join(f"${n}::{name}[]" for n, name in enumerate(types, 1))
    values = ", ".join(f"excluded.{field.name}" for field in model.fields)
    await conn.execute(
        f"""
        INSERT INTO {model.table} ({model.columns})
        SELECT * FROM unnest({arrays})
        ON CONFLICT ({model.name}, {", ".join(model.place)}) DO UPDATE
           SET ({model.columns}) = ROW ({values})
        """,
        *([_value(row, field) for row in rows] for field in model.fields),
    )


async def latest(
    conn: Connection, model: Model, names: Sequence[str], as_of_us: int, limit: int
) -> list[Any]:
    """Return what each name has at its latest time up to `as_of_us`, in their order."""
    rows = await conn.fetch(
        f"""
        SELECT {model.columns}
          FROM unnest($1::text[]) WITH ORDINALITY AS wanted (name, number),
               LATERAL (SELECT * FROM {model.table}
                         WHERE {model.name} = name AND time <= $2
                         ORDER BY time DESC FETCH FIRST ROW WITH TIES) AS found
         ORDER BY number, {", ".join(model.place)} LIMIT $3
        """,
        names,
        to_datetime(as_of_us),
        limit,
    )
    return await _messages(model, rows)


async def rows_after(
    conn: Connection,
    model: Model,
    name: str,
    after: Sequence[Any],
    end_us: int,
    limit: int,
) -> list[Any]:
    """Return the first rows of a name behind a place and before `end_us`, in order."""
    after_us, *more = after
    place = ", ".join(model.place)
    values = ", ".join(f"${n}" for n, _ in enumerate(model.place, 4))
    rows = await conn.fetch(
        f"""
        SELECT {model.columns} FROM {model.table}
         WHERE {model.name} = $1 AND time >= $4 AND time < $2
           AND ({place}) > ({values})
         ORDER BY {place} LIMIT $3
        """,
        name,
        to_datetime(end_us),
        limit,
        to_datetime(after_us),
        *more,
    )
    return await _messages(model, rows)


def _value(row: Any, field: FieldDescriptor) -> Any:
    """Return what the database keeps of a field."""
    if field.name == "time":
        return to_datetime(time_us(row.time))
    if field.has_presence and not row.HasField(field.name):
        return None
    return getattr(row, field.name)


async def _messages(model: Model, rows: Sequence[Any]) -> list[Any]:
    """Return rows as messages, letting others run now and then."""
    messages = []
    for number, row in enumerate(rows):
        values = dict(row)
        time = values.pop("time")
        message = model.message(**values)
        message.time.FromDatetime(time)
        messages.append(message)
        if number % YIELD_ROWS == 0:
            await asyncio.sleep(0)
    return messages
