"""All SQL of the administration: maintenance, the storage report, what the doctor asks.

Sizes are in bytes.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.db import VERSION_TABLES, Connection, try_lock

# The tables that are hypertables where there are any, each with the column that its
# rows age by.
TIME_SERIES = {
    "market_data": "time",
    "options_chains": "time",
    "heston_parameters": "time",
    "sabr_parameters": "time",
    "ou_parameters": "time",
    "signals": "time",
    "orders": "created_at",
    "executions": "time",
    "portfolio_snapshots": "time",
}
# All that can have a retention.
AGING = {**TIME_SERIES, "option_chain_times": "time"}
LOG = "event_log"  # this too, but it is trimmed by a task of its own
ADDED_TO = ["audit_logs"]  # and never changed: the server may lack the right to

# Tables, and what refers to their rows by which column: the rows stay as long.
REFERENCES = {
    "signals": ("signal_id", ("orders",)),
    "orders": ("order_id", ("executions", "execution_keys")),
}

_VISIBLE = """
    pg_table_is_visible(format('%I.%I', hypertable_schema, hypertable_name)::regclass)
"""


def _unreferenced(table: str) -> str:
    """Return a further condition on `r`: that nothing refers to it."""
    id, others = REFERENCES.get(table, ("", ()))
    return "".join(
        f" AND NOT EXISTS (SELECT FROM {other} AS o WHERE o.{id} = r.{id})"
        for other in others
    )


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])  # of "DELETE 3"


# --- Maintenance --------------------------------------------------------------------


async def claim_maintenance(conn: Connection) -> bool:
    """Be the one who maintains while the connection lives, if there is none."""
    return await try_lock(conn, "quantplane.maintenance")


async def note_run(
    conn: Connection, task: str, duration: timedelta, succeeded: bool, result: str
) -> None:
    """Keep what became of a task that has just ended."""
    await conn.execute(
        """
        INSERT INTO maintenance_runs (task, started_at, duration, succeeded, result)
        VALUES ($1, now() - $2::interval, $2, $3, $4)
        ON CONFLICT (task) DO UPDATE
           SET started_at = excluded.started_at, duration = excluded.duration,
               succeeded = excluded.succeeded, result = excluded.result
        """,
        task,
        duration,
        succeeded,
        result,
    )


class Run(NamedTuple):
    """The last run of a task."""

    started_at: datetime
    duration: timedelta
    succeeded: bool
    result: str


async def runs(conn: Connection) -> dict[str, Run]:
    rows = await conn.fetch(
        "SELECT task, started_at, duration, succeeded, result FROM maintenance_runs"
    )
    return {task: Run(*rest) for task, *rest in rows}


async def bound_waiting(conn: Connection) -> None:
    """Have this transaction wait for locks only briefly, since others queue behind it.

    Shorter than PostgreSQL waits before it looks for deadlocks: it is we who give way.
    """
    await conn.execute("SET LOCAL lock_timeout = '500ms'")


# --- Retention ----------------------------------------------------------------------


async def retention(conn: Connection) -> dict[str, timedelta]:
    """Return how long rows are kept, by whatever name was entered."""
    rows = await conn.fetch(
        """
        SELECT table_name, drop_after FROM retention_policies
         WHERE isfinite(drop_after) ORDER BY table_name
        """
    )
    return dict(map(tuple, rows))


async def hypertables(conn: Connection) -> set[str]:
    """Return which tables are hypertables. Needs TimescaleDB."""
    rows = await conn.fetch(
        f"""
        SELECT hypertable_name FROM timescaledb_information.hypertables
         WHERE {_VISIBLE}
        """
    )
    return {row["hypertable_name"] for row in rows}


async def kept_since(conn: Connection, table: str) -> datetime | None:
    """Return the time that a table's rows are kept from; None: without end."""
    since: datetime | None = await conn.fetchval(
        """
        SELECT now() - drop_after FROM retention_policies
         WHERE table_name = $1 AND isfinite(drop_after) AND drop_after > INTERVAL '0'
        """,
        table,
    )
    return since


async def policy_kept_since(conn: Connection, table: str) -> datetime | None:
    """Return the same by the database's own policies. Needs TimescaleDB."""
    since: datetime | None = await conn.fetchval(
        """
        SELECT now() - (config ->> 'drop_after')::interval
          FROM timescaledb_information.jobs
         WHERE proc_name = 'policy_retention' AND hypertable_name = $1
        """,
        table,
    )
    return since


async def drop_chunks(conn: Connection, table: str, since: datetime, limit: int) -> int:
    """Drop the oldest chunks that hold only rows before `since`; return how many."""
    last = await conn.fetchval(
        f"""
        SELECT max(range_end)
          FROM (SELECT range_end FROM timescaledb_information.chunks
                 WHERE hypertable_name = $1 AND {_VISIBLE} AND range_end <= $2
                 ORDER BY range_end LIMIT $3) AS oldest
        """,
        table,
        since,
        limit,
    )
    if last is None:
        return 0
    dropped: int = await conn.fetchval(
        """
        SELECT count(*)
          FROM drop_chunks(to_regclass($1), older_than => $2::timestamptz)
        """,
        table,
        last,
    )
    return dropped


async def delete_rows(conn: Connection, table: str, since: datetime, limit: int) -> int:
    """Delete rows of a plain table from before `since`; return how many."""
    time = AGING[table]
    tag = await conn.execute(
        f"""
        DELETE FROM {table}
         WHERE ctid = ANY (ARRAY(SELECT r.ctid FROM {table} AS r
                                  WHERE r.{time} < $1 {_unreferenced(table)}
                                  LIMIT $2))
           AND {time} < $1
        """,
        since,
        limit,
    )
    return _count(tag)


# --- Keys ---------------------------------------------------------------------------


class Keys(NamedTuple):
    """A table that holds the identity of another's rows."""

    name: str
    id: str
    table: str

    @property
    def time(self) -> str:
        return TIME_SERIES[self.table]


# Those that refer to others come first.
KEYS = (
    Keys("execution_keys", "execution_id", "executions"),
    Keys("order_keys", "order_id", "orders"),
    Keys("signal_keys", "signal_id", "signals"),
)


def _row(keys: Keys) -> str:
    """Return the query for the row of a key in `page`: a lookup by id and time."""
    # OFFSET 0 keeps the planner from reading the whole table to join it.
    return f"""
        SELECT FROM {keys.table} AS r
         WHERE r.{keys.id} = page.id AND r.{keys.time} = page.time OFFSET 0
    """


async def keys_after(
    conn: Connection, keys: Keys, id: UUID, limit: int
) -> list[tuple[UUID, bool]]:
    """Return the next keys older than a day, and whether their rows are gone."""
    rows = await conn.fetch(
        f"""
        WITH page AS MATERIALIZED (
            SELECT {keys.id} AS id, {keys.time} AS time FROM {keys.name}
             WHERE {keys.id} > $1 AND {keys.time} < now() - INTERVAL '1 day'
             ORDER BY {keys.id} LIMIT $2
        )
        SELECT id, NOT EXISTS ({_row(keys)}) FROM page ORDER BY id
        """,
        id,
        limit,
    )
    return [tuple(row) for row in rows]


async def delete_keys(
    conn: Connection, keys: Keys, ids: Iterable[UUID]
) -> dict[UUID, datetime]:
    """Delete the keys that nothing refers to; return each with its time."""
    rows = await conn.fetch(
        f"""
        DELETE FROM {keys.name} AS r
         WHERE {keys.id} = ANY($1) {_unreferenced(keys.table)}
        RETURNING {keys.id}, {keys.time}
        """,
        list(ids),
    )
    return dict(map(tuple, rows))


async def lock_writers_out(conn: Connection, keys: Keys) -> None:
    """Wait until nobody writes the rows of these keys, and let nobody begin."""
    await conn.execute(f"LOCK TABLE {keys.table} IN SHARE MODE")


async def any_row(conn: Connection, keys: Keys, times: Mapping[UUID, datetime]) -> bool:
    """Tell whether there is a row with any of these ids at its time."""
    found: bool = await conn.fetchval(
        f"""
        SELECT EXISTS (
            SELECT FROM unnest($1::uuid[], $2::timestamptz[]) AS page (id, time)
             WHERE EXISTS ({_row(keys)})
        )
        """,
        list(times),
        list(times.values()),
    )
    return found


# --- The storage report -------------------------------------------------------------


async def tables(conn: Connection) -> dict[str, pb.TableReport]:
    """Return all tables by name, hypertables without what is in their chunks."""
    rows = await conn.fetch(
        """
        SELECT relname AS name, greatest(reltuples, 0)::bigint AS rows,
               pg_total_relation_size(oid) AS total_bytes
          FROM pg_class
         WHERE relkind IN ('r', 'p') AND relpersistence <> 't'
           AND pg_table_is_visible(oid)
           AND relnamespace <> ALL ('{pg_catalog, information_schema}'::regnamespace[])
           AND relname <> ALL ($1)
        """,
        list(VERSION_TABLES.values()),
    )
    return {row["name"]: pb.TableReport(**row) for row in rows}


async def hypertable_reports(conn: Connection) -> dict[str, pb.TableReport]:
    """Return the hypertables and continuous aggregates by name. Needs TimescaleDB."""
    rows = await conn.fetch(
        f"""
        WITH stored (name, hypertable) AS (
            SELECT hypertable_name,
                   format('%I.%I', hypertable_schema, hypertable_name)::regclass
              FROM timescaledb_information.hypertables WHERE {_VISIBLE}
            UNION ALL
            SELECT view_name, format('%I.%I', materialization_hypertable_schema,
                                     materialization_hypertable_name)::regclass
              FROM timescaledb_information.continuous_aggregates WHERE {_VISIBLE}
        ), chunked AS (
            SELECT format('%I.%I', hypertable_schema, hypertable_name)::regclass
                       AS hypertable,
                   count(*) AS chunks,
                   count(*) FILTER (WHERE is_compressed) AS compressed_chunks,
                   min(range_start) AS start_time, max(range_end) AS end_time
              FROM timescaledb_information.chunks
             GROUP BY hypertable_schema, hypertable_name
        ), compressed AS (
            SELECT hypertable_name AS name,
                   before_compression_total_bytes AS bytes_before_compression,
                   after_compression_total_bytes AS bytes_after_compression
              FROM timescaledb_information.hypertables,
                   hypertable_compression_stats(
                       format('%I.%I', hypertable_schema, hypertable_name)::regclass)
             WHERE compression_enabled AND {_VISIBLE}
        )
        SELECT name, approximate_row_count(hypertable) AS rows,
               hypertable_size(hypertable) AS total_bytes,
               chunks, compressed_chunks, start_time, end_time,
               bytes_before_compression, bytes_after_compression
          FROM stored
          LEFT JOIN chunked USING (hypertable)
          LEFT JOIN compressed USING (name)
        """
    )
    return {row["name"]: _hypertable(row) for row in rows}


def _hypertable(row: Any) -> pb.TableReport:
    name, rows, total_bytes, *rest = row
    chunks, compressed_chunks, start_time, end_time, before, after = rest
    hypertable = pb.HypertableReport(
        chunks=chunks,
        compressed_chunks=compressed_chunks,
        start_time=stamp(start_time),
        end_time=stamp(end_time),
        bytes_before_compression=before,
        bytes_after_compression=after,
    )
    return pb.TableReport(
        name=name, rows=rows, total_bytes=total_bytes, hypertable=hypertable
    )


class Policy(NamedTuple):
    """What the database does to a table by itself."""

    table: str
    kind: str
    config: dict[str, Any]
    last_run: Run | None

    @property
    def name(self) -> str:
        return self.kind.removeprefix("policy_").replace("_", " ")

    @property
    def description(self) -> str:
        """What it does, for people."""
        try:
            return POLICIES[self.kind].format_map(self.config)
        except KeyError:  # a policy, or a way to set one, that is not ours
            return self.name


POLICIES = {
    "policy_retention": "drop rows older than {drop_after}",
    "policy_compression": "compress chunks older than {compress_after}",
    "policy_refresh_continuous_aggregate": (
        "refresh what changed from {start_offset} to {end_offset} ago"
    ),
}


async def policies(conn: Connection) -> list[Policy]:
    """Return the policies by table and name. Needs TimescaleDB."""
    rows = await conn.fetch(
        """
        SELECT j.hypertable_name, j.proc_name, j.config,
               s.last_run_started_at, s.last_run_duration,
               s.last_run_status = 'Success',
               CASE WHEN s.last_run_status = 'Failed'
                    THEN (SELECT err_message FROM timescaledb_information.job_errors
                           WHERE job_id = j.job_id ORDER BY finish_time DESC LIMIT 1)
               END
          FROM timescaledb_information.jobs AS j
          LEFT JOIN timescaledb_information.job_stats AS s USING (job_id)
         WHERE j.hypertable_name IS NOT NULL
         ORDER BY 1, 2
        """
    )
    return [_policy(*row) for row in rows]


def _policy(
    table: str,
    kind: str,
    config: str | None,
    started_at: datetime | None,
    duration: timedelta | None,
    succeeded: bool | None,
    error: str | None,
) -> Policy:
    last_run = None
    if started_at and succeeded is not None:
        last_run = Run(started_at, duration or timedelta(), succeeded, error or "")
    return Policy(table, kind, json.loads(config or "{}"), last_run)


async def policy_retention(conn: Connection) -> dict[str, timedelta]:
    """Return how long the database's own policies keep rows. Needs TimescaleDB."""
    rows = await conn.fetch(
        """
        SELECT hypertable_name, (config ->> 'drop_after')::interval
          FROM timescaledb_information.jobs
         WHERE proc_name = 'policy_retention' AND config ? 'drop_after'
        """
    )
    return dict(map(tuple, rows))


# --- The server ---------------------------------------------------------------------


class Server(NamedTuple):
    """A PostgreSQL server, as a connection sees it."""

    version_number: int  # 170011 is 17.11
    version: str
    timescaledb_version: str  # "" without
    database: str
    user: str
    local: bool  # whether it runs on this machine, as far as addresses tell


async def server(conn: Connection) -> Server:
    row = await conn.fetchrow(
        """
        SELECT current_setting('server_version_num')::int,
               split_part(current_setting('server_version'), ' ', 1),
               coalesce((SELECT extversion FROM pg_extension
                          WHERE extname = 'timescaledb'), ''),
               current_database(), current_user,
               inet_server_addr() IS NULL OR inet_server_addr() = inet_client_addr()
        """
    )
    return Server(*row)


async def clock(conn: Connection) -> datetime:
    time: datetime = await conn.fetchval("SELECT clock_timestamp()")
    return time


# --- What the doctor asks -----------------------------------------------------------

# How a person gives a table a retention.
RETAIN = "INSERT INTO retention_policies VALUES ('{table}', '{age}')"
RETAIN_BY_POLICY = "SELECT add_retention_policy('{table}', INTERVAL '{age}')"


async def settings(conn: Connection, *names: str) -> dict[str, str]:
    """Return the settings that this user may see."""
    rows = await conn.fetch(
        "SELECT name, setting FROM pg_settings WHERE name = ANY($1)", names
    )
    return dict(map(tuple, rows))


async def clients(conn: Connection) -> int:
    """Return how many connections there are to the whole server."""
    count: int = await conn.fetchval(
        "SELECT sum(numbackends)::int FROM pg_stat_database"
    )
    return count


async def missing_privileges(conn: Connection) -> dict[str, list[str]]:
    """Return what this user may not do with which tables and views."""
    rows = await conn.fetch(
        """
        SELECT relname, array_agg(privilege ORDER BY number)
          FROM pg_class,
               unnest(CASE WHEN relkind = 'v' OR relname = ANY ($1)
                      THEN '{SELECT}'::text[]
                      ELSE '{SELECT, INSERT, UPDATE, DELETE}' END)
                   WITH ORDINALITY AS wanted (privilege, number)
         WHERE relkind IN ('r', 'p', 'v') AND relpersistence <> 't'
           AND pg_table_is_visible(oid)
           AND relnamespace <> ALL ('{pg_catalog, information_schema}'::regnamespace[])
           AND NOT (relname = ANY ($2) AND privilege = ANY ('{UPDATE, DELETE}'))
           AND NOT has_table_privilege(oid, privilege)
         GROUP BY relname ORDER BY relname
        """,
        list(VERSION_TABLES.values()),
        ADDED_TO,
    )
    return dict(map(tuple, rows))


async def others_hypertables(conn: Connection) -> list[str]:
    """Return the hypertables that this user does not own. Needs TimescaleDB."""
    rows = await conn.fetch(
        f"""
        SELECT hypertable_name FROM timescaledb_information.hypertables
         WHERE {_VISIBLE} AND NOT pg_has_role(owner, 'USAGE') ORDER BY 1
        """
    )
    return [row["hypertable_name"] for row in rows]


async def may_create(conn: Connection) -> tuple[bool, bool]:
    """Tell whether this user may create temporary tables, and tables to stay."""
    row = await conn.fetchrow(
        """
        SELECT has_database_privilege(current_database(), 'TEMP'),
               coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)
        """
    )
    temporary, lasting = row
    return temporary, lasting


# --- Values -------------------------------------------------------------------------


def stamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    value = Timestamp()
    value.FromDatetime(time)
    return value


def span(duration: timedelta | None) -> Duration | None:
    if duration is None:
        return None
    value = Duration()
    value.FromTimedelta(duration)
    return value
