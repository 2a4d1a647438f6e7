"""All SQL on the audit log. What is in it is never changed."""

import json
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from quantplane import v1 as pb
from quantplane_server.audit.values import MAX_BYTES, to_value
from quantplane_server.db import Connection
from quantplane_server.log import START, Position
from quantplane_server.origin import Origin
from quantplane_server.principal import parsed
from quantplane_server.rpc.caller import Caller

FETCH = 50  # rows read ahead, and turned into messages at a time

Place: TypeAlias = tuple[datetime, int]  # the time and the id of an entry
# Returns the names of users by their ids: of these ids, and of these names.
Usernames: TypeAlias = Callable[
    [Connection, Collection[str], Collection[str]], Awaitable[dict[str, str]]
]


class Entry(NamedTuple):
    """What was done to a resource; its values without secrets, as JSON has them."""

    action: str
    resource_type: str
    resource_id: str
    old: Any = None  # None: there was none
    new: Any = None  # None: there is none


class Event(NamedTuple):
    """What an event log says was done."""

    time: datetime
    origin: Origin
    entry: Entry


# --- Entering -----------------------------------------------------------------------


async def record(conn: Connection, caller: Caller, entries: Sequence[Entry]) -> None:
    """Enter what a caller does, in the transaction that does it."""
    await conn.execute(
        """
        INSERT INTO audit_logs (user_id, key_id, action, resource_type, resource_id,
                                old_value, new_value, ip_address, user_agent, trace_id)
        SELECT $1, $2, action, resource_type, resource_id, old_value, new_value,
               $3, nullif($4, ''), nullif($5, '')
          FROM unnest($6::text[], $7::text[], $8::text[], $9::jsonb[], $10::jsonb[])
               AS entry (action, resource_type, resource_id, old_value, new_value)
        """,
        caller.user_id,
        caller.key_id,
        caller.address,
        caller.user_agent,
        caller.trace_id,
        [entry.action for entry in entries],
        [entry.resource_type for entry in entries],
        [entry.resource_id for entry in entries],
        [_json(entry.old) for entry in entries],
        [_json(entry.new) for entry in entries],
    )


async def enter(
    conn: Connection, events: Sequence[Event], user_ids: Mapping[str, str]
) -> None:
    """Enter what event logs say. What is there already is not entered again.

    `user_ids` has those of the users whom the events name, as far as they are known.
    """
    entries = [event.entry for event in events]
    actors = [parsed(event.origin.actor) for event in events]
    await conn.execute(
        """
        INSERT INTO audit_logs (timestamp, action, resource_type, resource_id,
                                new_value, trace_id, user_id, key_id)
        SELECT time, action, type, id, value, nullif(trace_id, ''), user_id, key_id
          FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::text[],
                      $5::jsonb[], $6::text[], $7::uuid[], $8::uuid[])
               WITH ORDINALITY AS event (time, action, type, id, value, trace_id,
                                         user_id, key_id, number)
         WHERE (SELECT count(*) FROM audit_logs AS a
                 WHERE a.resource_type = event.type AND a.resource_id = event.id
                   AND a.timestamp = event.time AND a.action = event.action
                   AND a.new_value = event.value) = 0
         ORDER BY number
        """,
        [event.time for event in events],
        [entry.action for entry in entries],
        [entry.resource_type for entry in entries],
        [entry.resource_id for entry in entries],
        [_json(entry.new) for entry in entries],
        [event.origin.trace_id for event in events],
        [user_ids.get(username) for username, _ in actors],
        [key_id for _, key_id in actors],
    )


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, allow_nan=False)


# --- How far the event logs are entered ---------------------------------------------


async def position(conn: Connection, log: str) -> Position:
    row = await conn.fetchrow(
        "SELECT revision, entry_check FROM audit_positions WHERE log = $1", log
    )
    return Position(*row) if row else START


async def move(conn: Connection, log: str, before: Position, through: Position) -> bool:
    """Move a position; return False where another has moved it from `before`."""
    moved = await conn.fetchval(
        """
        INSERT INTO audit_positions AS p (log, revision, entry_check)
        VALUES ($1, $2, $3)
        ON CONFLICT (log) DO UPDATE
           SET revision = excluded.revision, entry_check = excluded.entry_check
         WHERE p.revision = $4 AND p.entry_check = $5
        RETURNING true
        """,
        log,
        *through,
        *before,
    )
    return moved is not None


# --- Reading ------------------------------------------------------------------------


async def rows_before(
    conn: Connection,
    wanted: pb.ListAuditLogsRequest,
    start: datetime,
    place: Place,
    limit: int,
) -> AsyncIterator[pb.AuditLog]:
    """Yield entries behind a place, the latest first, to `start`; in a transaction."""
    # What is wanted decides which index leads to it.
    await conn.execute("SET LOCAL plan_cache_mode = force_custom_plan")
    args: list[Any] = [limit, start, *place, MAX_BYTES]
    order = "ORDER BY timestamp DESC, log_id DESC LIMIT $1"
    query = f"""
        SELECT log_id, timestamp, user_id, key_id, action, resource_type, resource_id,
               CASE WHEN octet_length(old_value::text) > $5 THEN ''
                    ELSE old_value::text END AS old_value,
               CASE WHEN octet_length(new_value::text) > $5 THEN ''
                    ELSE new_value::text END AS new_value,
               host(ip_address) AS ip_address, user_agent, trace_id
          FROM audit_logs
         WHERE timestamp >= $2 AND timestamp <= $3
           AND (timestamp < $3 OR log_id < $4)
           {_conditions(wanted, args)}
    """
    # The latest of each, of which the latest: the index has them by this.
    if wanted.resource_ids:
        query = f"""
            {TYPES}
            SELECT found.*
              FROM types, unnest({_parameter(args, wanted.resource_ids)}::text[]) AS id,
                   LATERAL ({query} AND resource_type = type AND resource_id = id
                            {order}) AS found
        """
    elif wanted.user_ids:
        query = f"""
            SELECT found.*
              FROM unnest({_parameter(args, wanted.user_ids)}::uuid[]) AS one,
                   LATERAL ({query} AND user_id = one {order}) AS found
        """
    async for row in conn.cursor(f"{query} {order}", *args, prefetch=FETCH):
        yield _audit_log(row)


# Each type that there is, by an index probe.
TYPES = """
    WITH RECURSIVE types (type) AS (
        SELECT min(resource_type) FROM audit_logs
        UNION ALL
        SELECT (SELECT min(resource_type) FROM audit_logs WHERE resource_type > type)
          FROM types WHERE type IS NOT NULL
    )
"""


def _conditions(wanted: pb.ListAuditLogsRequest, args: list[Any]) -> str:
    """Return what is asked of a row; its values are added to the arguments."""
    conditions = ""
    for column, kind, values in (
        ("user_id", "uuid", wanted.user_ids),
        ("action", "text", wanted.actions),
        ("resource_type", "text", wanted.resource_types),
    ):
        if values:
            conditions += f" AND {column} = ANY ({_parameter(args, values)}::{kind}[])"
    return conditions


def _parameter(args: list[Any], values: Sequence[str]) -> str:
    args.append(list(dict.fromkeys(values)))
    return f"${len(args)}"


def _audit_log(row: Any) -> pb.AuditLog:
    entry = pb.AuditLog(
        log_id=row["log_id"],
        user_id=str(row["user_id"] or ""),
        key_id=str(row["key_id"] or ""),
        action=row["action"],
        resource_type=row["resource_type"],
        resource_id=row["resource_id"],
        old_value=to_value(row["old_value"]),
        new_value=to_value(row["new_value"]),
        ip_address=row["ip_address"],
        user_agent=row["user_agent"],
        trace_id=row["trace_id"],
    )
    entry.time.FromDatetime(row["timestamp"])
    return entry
