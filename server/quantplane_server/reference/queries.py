"""All SQL on strategies and configurations.

The two tables have one shape, so each statement is written once for a `Resource`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server.db import Connection
from quantplane_server.reference import limits
from quantplane_server.structs import bounded, to_json, to_struct, to_value

MAX_JSON_BYTES = 64 << 10  # of the parameters of a strategy, of a value
FETCH = 50  # rows read ahead


class Resource(NamedTuple):
    """A table whose rows people change, each by its key."""

    kind: str  # as the audit log calls it
    table: str
    key: str  # the column, and field, that names a row
    columns: Mapping[str, str]  # that callers set, and their types
    author: str  # the column, and field, of who made the row
    is_editor: bool  # whether that is who changed it last
    selected: str
    message: Callable[[Any], Any]  # of a row that was selected


async def claim(conn: Connection, resource: Resource, asked: Any) -> tuple[Any, bool]:
    """Store a row unless its key is there; return what then is, locked, and whether it
    is new."""
    columns = {resource.key: "text", **resource.columns, resource.author: "text"}
    row = await conn.fetchrow(
        f"""
        INSERT INTO {resource.table} AS known ({_names(columns)})
        VALUES ({_parameters(columns)})
        ON CONFLICT ({resource.key}) DO UPDATE
           SET {resource.author} = known.{resource.author}
        RETURNING {resource.selected}, xmax = 0 AS is_new
        """,
        *(_value(asked, *column) for column in columns.items()),
    )
    return resource.message(row), row["is_new"]


async def find(
    conn: Connection, resource: Resource, keys: Sequence[str], lock: bool = False
) -> dict[str, Any]:
    """Return the rows that there are of these keys, locked if wanted."""
    rows = await conn.fetch(
        f"""
        SELECT {resource.selected} FROM {resource.table}
         WHERE {resource.key} = ANY ($1) {"FOR NO KEY UPDATE" if lock else ""}
        """,
        keys,
    )
    found = {}
    for row in rows:
        found[row[resource.key]] = resource.message(row)
        await asyncio.sleep(0)  # rows may be large
    return found


async def update(
    conn: Connection, resource: Resource, asked: Any, fields: Collection[str]
) -> Any | None:
    """Set these fields of a row; return it, None if they were so already."""
    key = {resource.key: "text"}
    columns = {name: type for name, type in resource.columns.items() if name in fields}
    signed = {resource.author: "text"} if resource.is_editor else {}
    row = await conn.fetchrow(
        # The clock may go back: a change is later than the last all the same.
        f"""
        UPDATE {resource.table}
           SET ({_names(columns | signed)}) = ROW ({_parameters(columns | signed, 2)}),
               updated_at = greatest(clock_timestamp(),
                                     updated_at + INTERVAL '1 microsecond')
         WHERE {resource.key} = $1
           AND ROW ({_names(columns)}) IS DISTINCT FROM ROW ({_parameters(columns, 2)})
        RETURNING {resource.selected}
        """,
        *(_value(asked, *column) for column in (key | columns | signed).items()),
    )
    return None if row is None else resource.message(row)


async def delete(conn: Connection, resource: Resource, key: str) -> None:
    await conn.execute(f"DELETE FROM {resource.table} WHERE {resource.key} = $1", key)


async def strategies_after(
    conn: Connection,
    strategy_id: str,
    statuses: Sequence[str],
    types: Sequence[str],
    only: str,
    limit: int,
) -> AsyncIterator[pb.Strategy]:
    """Yield strategies behind an id, in order of their ids; in a transaction.

    With `only`, that one alone.
    """
    query = f"""
        SELECT {STRATEGIES.selected} FROM strategies
         WHERE strategy_id > $1 COLLATE "C"
           AND (status = ANY ($2) OR cardinality($2::text[]) = 0)
           AND (type = ANY ($3) OR cardinality($3::text[]) = 0)
           AND (strategy_id = $4 OR $4 = '')
         ORDER BY strategy_id COLLATE "C" LIMIT $5
    """
    args = (strategy_id, statuses, types, only, limit)
    async for row in conn.cursor(query, *args, prefetch=FETCH):
        yield _strategy(row)
        await asyncio.sleep(0)


async def configurations_after(
    conn: Connection, key: str, prefix: str, known: Sequence[str], limit: int
) -> AsyncIterator[pb.Configuration]:
    """Yield configurations behind a key, in order of their keys; in a transaction.

    The `known` ones are among them even if they are not set.
    """
    query = f"""
        SELECT {CONFIGURATIONS.selected}
          FROM configurations FULL JOIN unnest($3::text[]) AS known (key) USING (key)
         WHERE key > $1 COLLATE "C" AND starts_with(key, $2)
         ORDER BY key COLLATE "C" LIMIT $4
    """
    async for row in conn.cursor(query, key, prefix, known, limit, prefetch=FETCH):
        yield _configuration(row)
        await asyncio.sleep(0)


async def risk_limits(
    conn: Connection, strategy_ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the limits of each strategy that has any.

    Where they are no object, each limit is there without a value, and so refuses.
    """
    rows = await conn.fetch(
        """
        SELECT strategy_id,
               CASE jsonb_typeof(risk_limits) WHEN 'object' THEN risk_limits END
               AS risk_limits
          FROM strategies WHERE strategy_id = ANY ($1) AND risk_limits <> '{}'
        """,
        strategy_ids,
    )
    nothing = json.dumps(dict.fromkeys(limits.LIMITS))
    return {
        row["strategy_id"]: json.loads(row["risk_limits"] or nothing) for row in rows
    }


async def configured(conn: Connection, key: str) -> Any:
    """Return the value of a key, None if it is not set."""
    value = await conn.fetchval("SELECT value FROM configurations WHERE key = $1", key)
    return None if value is None else json.loads(value)


# --- Values -------------------------------------------------------------------------


def _names(columns: Mapping[str, str]) -> str:
    return ", ".join(columns)


def _parameters(columns: Mapping[str, str], first: int = 1) -> str:
    return ", ".join(f"${n}::{type}" for n, type in enumerate(columns.values(), first))


def _value(asked: Any, field: str, type: str) -> Any:
    """Return what the database keeps of a field: no text is NULL."""
    value = getattr(asked, field)
    if type == "jsonb":
        return to_json(value)
    return list(value) if type == "text[]" else value or None


def _strategy(row: Any) -> pb.Strategy:
    """Return a strategy; what plain SQL has written beyond the limits is left out."""
    strategy = pb.Strategy(
        strategy_id=row["strategy_id"],
        name=row["name"],
        type=row["type"],
        status=row["status"],
        parameters=to_struct(bounded(row["parameters"], MAX_JSON_BYTES)),
        risk_limits=to_struct(bounded(row["risk_limits"], limits.MAX_BYTES)),
        symbols=row["symbols"],
        created_by=row["created_by"],
    )
    strategy.created_at.FromDatetime(row["created_at"])
    strategy.updated_at.FromDatetime(row["updated_at"])
    strategy.etag = _etag(strategy)
    return strategy


def _configuration(row: Any) -> pb.Configuration:
    """Return a configuration, or only its key where it is not set."""
    if row["updated_at"] is None:
        return pb.Configuration(key=row["key"])
    configuration = pb.Configuration(
        key=row["key"],
        value=to_value(bounded(row["value"], MAX_JSON_BYTES)),
        description=row["description"],
        updated_by=row["updated_by"],
    )
    configuration.updated_at.FromDatetime(row["updated_at"])
    configuration.etag = _etag(configuration)
    return configuration


def _etag(message: Message) -> str:
    data = message.SerializeToString(deterministic=True)
    return blake2b(data, digest_size=8).hexdigest()


STRATEGIES = Resource(
    kind="strategy",
    table="strategies",
    key="strategy_id",
    columns={
        "name": "text",
        "type": "text",
        "status": "text",
        "parameters": "jsonb",
        "risk_limits": "jsonb",
        "symbols": "text[]",
    },
    author="created_by",
    is_editor=False,
    # An array may have more dimensions, and NULLs, where plain SQL has written it.
    selected="""
        strategy_id, name, type, status, parameters, risk_limits,
        ARRAY (SELECT symbol FROM unnest(symbols) AS symbol WHERE symbol IS NOT NULL)
        AS symbols, created_at, updated_at, created_by
    """,
    message=_strategy,
)
CONFIGURATIONS = Resource(
    kind="configuration",
    table="configurations",
    key="key",
    columns={"value": "jsonb", "description": "text"},
    author="updated_by",
    is_editor=True,
    selected="key, value, description, updated_at, updated_by",
    message=_configuration,
)
