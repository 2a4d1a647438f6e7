"""The doctor looks at what a server stands on, and says how to mend what is wrong.

Each look is a function that returns findings. One that fails is a finding too, and the
others go on.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, NamedTuple

import asyncpg
from redis.exceptions import ResponseError

from quantplane_server.admin import queries
from quantplane_server.admin.findings import (
    Finding,
    Mark,
    disk,
    fail,
    ok,
    skew,
    warn,
)
from quantplane_server.admin.queries import TIME_SERIES, Server
from quantplane_server.admin.service import clock_offset
from quantplane_server.bus import Bus
from quantplane_server.config import Settings
from quantplane_server.db import Connection, Database, Edition
from quantplane_server.migrate import head_revision, knows

LOOK_S = 10.0
POSTGRESQL, REDIS = 15, 7  # the oldest that do
RECORDING = 3  # connections: the recorder, the maintenance and its task
PROCESSES = 2  # at least: one that serves, one that records
LATE_RUNS = 5  # that did not happen

EDITIONS = {
    Edition.PLAIN: "plain: no TimescaleDB, so no chunks and no compression; the"
    " servers delete old rows and aggregate days",
    Edition.APACHE: "apache: TimescaleDB {} under the Apache licence, so no"
    " compression; the servers drop old chunks and aggregate days",
    Edition.COMMUNITY: "community: TimescaleDB {}, which compresses and drops old"
    " chunks by itself",
}
# What would grow without end.
RETENTION = {
    "market_data": "5 years",
    "options_chains": "5 years",
    "signals": "5 years",
    "portfolio_snapshots": "10 years",
}
# Other policies that the database runs by itself, and how to add them.
POLICIES = {
    ("market_data", "policy_compression"): (
        "SELECT add_compression_policy('market_data', INTERVAL '7 days')"
    ),
    ("market_data_daily", "policy_refresh_continuous_aggregate"): (
        "SELECT add_continuous_aggregate_policy('market_data_daily', start_offset =>"
        " INTERVAL '3 days', end_offset => INTERVAL '1 hour', schedule_interval =>"
        " INTERVAL '1 hour')"
    ),
}

Count = Callable[[Connection], Awaitable[int]]


class Site(NamedTuple):
    """A database that is looked at."""

    settings: Settings
    part: str
    db: Database
    server: Server
    overdue_days: Count


async def examine(settings: Settings, overdue_days: Count) -> AsyncIterator[Finding]:
    """Yield what there is to say of the databases and the bus.

    `overdue_days` counts the days that should have been aggregated.
    """
    dsn = settings.postgres_dsn
    async for finding in _database(settings, "timeseries", dsn, overdue_days):
        yield finding
    if dsn := settings.reference_dsn:
        async for finding in _database(settings, "reference", dsn, overdue_days):
            yield finding._replace(subject=f"reference {finding.subject}")
    async for finding in _bus(settings):
        yield finding


async def _looked(subject: str, look: Awaitable[list[Finding]]) -> list[Finding]:
    """Return what a look finds, or why it can't."""
    try:
        async with asyncio.timeout(LOOK_S):
            findings = await look
    except Exception as error:
        mend = "see the log of the database or the bus"
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            mend = "see `privileges`"
        findings = [fail(f"can't be seen: {_why(error)}", mend)]
    return [finding._replace(subject=subject) for finding in findings]


def _why(error: Exception) -> str:
    """Return an error in one line, without what PostgreSQL adds to it."""
    text = error.args[0] if isinstance(error, asyncpg.PostgresError) else str(error)
    return text.partition("\n")[0] or type(error).__name__


# --- The database -------------------------------------------------------------------


async def _database(
    settings: Settings, part: str, dsn: str | None, overdue_days: Count
) -> AsyncIterator[Finding]:
    variable = VARIABLES[part]
    if not dsn:
        yield _not_set("database", variable)
        return
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(LOOK_S):
                db = await Database.open(dsn, pool_size=2)
                stack.push_async_callback(db.close)
                async with db.connection() as conn:
                    server = await queries.server(conn)
        except Exception as error:
            mend = f"start PostgreSQL, or correct {variable}"
            yield _not_usable("database", error, mend)
            return
        site = Site(settings, part, db, server, overdue_days)
        findings: list[Finding] = []
        for subject, look in LOOKS.items():
            findings = await _looked(subject, look(site))
            for finding in findings:
                yield finding
        current = findings[-1].mark is Mark.OK  # the schema, which came last
        if current and part == "timeseries":
            for subject, look in TIME_SERIES_LOOKS.items():
                for finding in await _looked(subject, look(site)):
                    yield finding


async def _server(site: Site) -> list[Finding]:
    server = site.server
    found = (
        f"PostgreSQL {server.version}, database {server.database}, user {server.user}"
    )
    if server.version_number < POSTGRESQL * 10_000:
        mend = f"upgrade to PostgreSQL {POSTGRESQL} or newer"
        return [fail(found, mend)]
    return [ok(found)]


async def _edition(site: Site) -> list[Finding]:
    if site.part != "timeseries":
        return []
    return [ok(EDITIONS[site.db.edition].format(site.server.timescaledb_version))]


async def _clock(site: Site) -> list[Finding]:
    async with site.db.connection() as conn:
        return [skew(await clock_offset(conn))]


async def _durability(site: Site) -> list[Finding]:
    names = ("fsync", "full_page_writes", "synchronous_commit")
    async with site.db.connection() as conn:
        values = await queries.settings(conn, *names)
    findings = [
        fail(
            f"{name} is off: a crash can cost what was told to be durable",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()",
        )
        for name in names
        if values[name] == "off"
    ]
    kept = ", ".join(f"{name} {values[name]}" for name in names)
    return findings or [ok(kept)]


async def _connections(site: Site) -> list[Finding]:
    pool_size = site.settings.pool_size
    async with site.db.connection() as conn:
        values = await queries.settings(
            conn,
            "max_connections",
            "superuser_reserved_connections",
            "reserved_connections",  # since PostgreSQL 16
        )
        used = await queries.clients(conn)
    most = int(values.pop("max_connections"))
    free = most - sum(map(int, values.values()))
    found = f"{used} of {most} in use; each process of a server takes up to {pool_size}"
    if pool_size < RECORDING:
        mend = f"set QUANTPLANE_POOL_SIZE to at least {RECORDING}"
        return [fail(f"{found}, and recording needs {RECORDING}", mend)]
    if pool_size * PROCESSES > free:
        mend = (
            f"ALTER SYSTEM SET max_connections = {most + pool_size * PROCESSES} and"
            " restart PostgreSQL, or lower QUANTPLANE_POOL_SIZE"
        )
        return [warn(f"{found}, and there are at least {PROCESSES}", mend)]
    return [ok(found)]


async def _disk(site: Site) -> list[Finding]:
    async with site.db.connection() as conn:
        values = await queries.settings(conn, "data_directory")
    return [disk(values.get("data_directory") if site.server.local else None)]


async def _schema(site: Site) -> list[Finding]:
    found, needed = await site.db.schema_revision(site.part), head_revision()
    if await site.db.is_partial():
        mend = "quantplane-server restore, again"
        return [fail("a part of a backup: a restore runs, or was cut off", mend)]
    if found == needed:
        return [ok(f"at {found}")]
    mend = "quantplane-server migrate"
    if found and not knows(found):
        mend = "upgrade quantplane-server: the schema is newer than it"
    return [fail(f"at {found or 'nothing'}; this server needs {needed}", mend)]


async def _privileges(site: Site) -> list[Finding]:
    user = f'"{site.server.user}"'
    async with site.db.connection() as conn:
        missing = await queries.missing_privileges(conn)
        temporary, lasting = await queries.may_create(conn)
        others = []
        if site.db.edition is not Edition.PLAIN:
            others = await queries.others_hypertables(conn)
    findings = []
    if missing:
        told = (f"{name} ({', '.join(what)})" for name, what in missing.items())
        tables = defaultdict[str, list[str]](list)
        for name, what in missing.items():
            tables[", ".join(what)].append(name)
        grants = (
            f"GRANT {what} ON {', '.join(names)} TO {user}"
            for what, names in tables.items()
        )
        findings.append(
            fail(
                f"{site.server.user} lacks {', '.join(told)}",
                "; ".join(grants),
            )
        )
    if not temporary:
        findings.append(
            fail(
                "recording needs temporary tables",
                f'GRANT TEMPORARY ON DATABASE "{site.server.database}" TO {user}',
            )
        )
    if others:
        findings.append(
            fail(
                f"only the owner can drop chunks, of {', '.join(others)}",
                "; ".join(f"ALTER TABLE {name} OWNER TO {user}" for name in others),
            )
        )
    if not lasting:
        findings.append(
            warn(
                "`quantplane-server migrate` could not create tables",
                f"GRANT CREATE ON SCHEMA public TO {user}, or migrate as another user",
            )
        )
    return findings or [ok("reads and writes all tables")]


# --- The time series ----------------------------------------------------------------


async def _hypertables(site: Site) -> list[Finding]:
    if site.db.edition is Edition.PLAIN:
        return []
    async with site.db.connection() as conn:
        hypertables = await queries.hypertables(conn)
    if plain := [name for name in TIME_SERIES if name not in hypertables]:
        found = (
            f"{', '.join(plain)}: no hypertables; TimescaleDB came after the schema and"
            " does nothing for them"
        )
        mend = (
            "DROP EXTENSION timescaledb, or `quantplane-server migrate` a new database,"
            " which gets hypertables, and copy the rows"
        )
        return [fail(found, mend)]
    return [ok(f"all {len(TIME_SERIES)} time series")]


async def _retention(site: Site) -> list[Finding]:
    community = site.db.edition is Edition.COMMUNITY
    async with site.db.connection() as conn:
        kept = await queries.retention(conn)
        if community:
            kept |= await queries.policy_retention(conn)
    findings = []
    for table, age in RETENTION.items():
        if table not in kept:
            mend = queries.RETAIN.format(table=table, age=age)
            if community:
                mend = queries.RETAIN_BY_POLICY.format(table=table, age=age)
            findings.append(warn(f"{table} keeps its rows for ever", mend))
    told = ", ".join(f"{table} {_days(age)}" for table, age in kept.items())
    return findings or [ok(told)]


async def _policies(site: Site) -> list[Finding]:
    if site.db.edition is not Edition.COMMUNITY:
        return []
    async with site.db.connection() as conn:
        policies = await queries.policies(conn)
        workers = await queries.settings(conn, "timescaledb.max_background_workers")
    there = {(policy.table, policy.kind) for policy in policies}
    findings = [
        warn(f"{table} has no {kind}", mend)
        for (table, kind), mend in POLICIES.items()
        if (table, kind) not in there
    ]
    if workers.get("timescaledb.max_background_workers") == "0":
        mend = (
            "ALTER SYSTEM SET timescaledb.max_background_workers = 16 and restart"
            " PostgreSQL"
        )
        findings.append(warn("the database has no workers to run its policies", mend))
    for policy in policies:
        if policy.last_run and not policy.last_run.succeeded:
            found = f"{policy.table}: {policy.name} failed: {policy.last_run.result}"
            mend = "SELECT * FROM timescaledb_information.job_errors"
            findings.append(warn(found, mend))
    return findings or [ok(f"{len(policies)}, and none has failed last")]


async def _maintenance(site: Site) -> list[Finding]:
    async with site.db.connection() as conn:
        runs = await queries.runs(conn)
        now = await queries.clock(conn)
    if not runs:
        return [warn("has never run", "start a server: quantplane-server serve")]
    findings = [
        warn(f"{name} failed: {run.result}", "see the log of the server that records")
        for name, run in runs.items()
        if not run.succeeded
    ]
    age = now - max(run.started_at + run.duration for run in runs.values())
    if age > timedelta(seconds=LATE_RUNS * site.settings.maintenance_s):
        mend = "start a server (quantplane-server serve), or see the log of those"
        findings.append(warn(f"last run {_ago(age)}", mend))
    return findings or [ok(f"last run {_ago(age)}")]


async def _daily_bars(site: Site) -> list[Finding]:
    async with site.db.connection() as conn:
        days = await site.overdue_days(conn)
    if days:
        found = f"{days:,} days of symbols want aggregating; reads compute them anew"
        return [warn(found, "wait for the maintenance; it should not become more")]
    return [ok("all days that are over are aggregated")]


VARIABLES = {
    "timeseries": "QUANTPLANE_POSTGRES_DSN",
    "reference": "QUANTPLANE_REFERENCE_DSN",
}
Look = Callable[[Site], Awaitable[list[Finding]]]
LOOKS: dict[str, Look] = {
    "database": _server,
    "edition": _edition,
    "clock": _clock,
    "durability": _durability,
    "connections": _connections,
    "disk": _disk,
    "privileges": _privileges,
    "schema": _schema,
}
TIME_SERIES_LOOKS: dict[str, Look] = {
    "hypertables": _hypertables,
    "retention": _retention,
    "policies": _policies,
    "maintenance": _maintenance,
    "daily bars": _daily_bars,
}


# --- The bus ------------------------------------------------------------------------


class BusSite(NamedTuple):
    """The bus that is looked at."""

    settings: Settings
    bus: Bus
    info: Mapping[str, Any]  # what INFO says
    offset_s: float  # how far its clock is ahead


async def _bus(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.redis_url:
        yield _not_set("bus", "QUANTPLANE_REDIS_URL")
        return
    async with AsyncExitStack() as stack:
        try:
            bus = Bus(settings.redis_url, cap_bytes=0)
            stack.push_async_callback(bus.close)
            async with asyncio.timeout(LOOK_S):
                before = time.time()
                info = await bus.info()
                offset_s = info["server_time_usec"] / 1e6 - (before + time.time()) / 2
        except Exception as error:
            mend = "start Valkey or Redis, or correct QUANTPLANE_REDIS_URL"
            yield _not_usable("bus", error, mend)
            return
        site = BusSite(settings, bus, info, offset_s)
        for subject, look in BUS_LOOKS.items():
            for finding in await _looked(subject, look(site)):
                yield finding


async def _bus_server(site: BusSite) -> list[Finding]:
    version = await site.bus.version()
    if int(site.info["redis_version"].split(".")[0]) < REDIS:
        return [fail(version, f"upgrade to Redis {REDIS} or newer, or to Valkey 8")]
    return [ok(version)]


async def _bus_clock(site: BusSite) -> list[Finding]:
    return [skew(site.offset_s)]


async def _bus_log(site: BusSite) -> list[Finding]:
    if not site.info["aof_enabled"]:
        mend = "CONFIG SET appendonly yes, and the same in its configuration file"
        return [fail("appendonly no: a restart loses what was accepted", mend)]
    if site.info["aof_last_write_status"] != "ok":
        mend = "make room on its disk, and see its log"
        return [fail("its log can't be written, so it accepts nothing", mend)]
    try:
        config = await site.bus.config("appendfsync")
    except ResponseError:  # some who host it keep its settings to themselves
        return [ok("appendonly yes, appendfsync unknown")]
    found = f"appendonly yes, appendfsync {config['appendfsync']}"
    if config["appendfsync"] == "no":
        found += ": losing its machine costs what was accepted in half a minute or so"
        mend = "CONFIG SET appendfsync everysec, and the same in its configuration file"
        return [warn(found, mend)]
    if config["appendfsync"] == "everysec":
        found += ": losing its machine can cost the last second, of a slow disk more"
    return [ok(found)]


async def _bus_eviction(site: BusSite) -> list[Finding]:
    found = f"maxmemory-policy {site.info['maxmemory_policy']}"
    if site.info["maxmemory"] and site.info["maxmemory_policy"] != "noeviction":
        mend = "CONFIG SET maxmemory-policy noeviction, and in its configuration file"
        return [fail(f"{found}: when full it forgets what was accepted", mend)]
    return [ok(found)]


async def _bus_memory(site: BusSite) -> list[Finding]:
    settings, info = site.settings, site.info
    wanted = settings.cap_mb + settings.window_mb
    most = (info["maxmemory"] or info["total_system_memory"]) >> 20
    used = info["used_memory"] >> 20
    found = f"{used:,} MB used, of {wanted:,} MB for QUANTPLANE_CAP_MB and _WINDOW_MB"
    if most < wanted:
        mend = "give it more (maxmemory, or the machine), or lower QUANTPLANE_CAP_MB"
        return [warn(f"{found}, but there are only {most:,} MB", mend)]
    if used > wanted:
        mend = "see what else lives there, and whether recording keeps up"
        return [warn(found, mend)]
    return [ok(found)]


async def _bus_disk(site: BusSite) -> list[Finding]:
    try:
        local = await site.bus.is_local()
        folder = (await site.bus.config("dir"))["dir"] if local else None
    except ResponseError:
        folder = None
    return [disk(folder)]


BUS_LOOKS: dict[str, Callable[[BusSite], Awaitable[list[Finding]]]] = {
    "bus": _bus_server,
    "bus clock": _bus_clock,
    "bus log": _bus_log,
    "bus eviction": _bus_eviction,
    "bus memory": _bus_memory,
    "bus disk": _bus_disk,
}


# --- Either -------------------------------------------------------------------------


def _not_set(subject: str, variable: str) -> Finding:
    mend = (
        f"set {variable}; or run `quantplane-server up`, which brings its own, and give"
        " doctor its --data-dir"
    )
    return fail(f"{variable} is not set", mend)._replace(subject=subject)


def _not_usable(subject: str, error: Exception, mend: str) -> Finding:
    return fail(f"can't be used: {_why(error)}", mend)._replace(subject=subject)


def _days(age: timedelta) -> str:
    years, days = divmod(age.days, 365)
    return f"{age.days:,} days" if days or not years else f"{years} years"


def _ago(age: timedelta) -> str:
    seconds = max(age.total_seconds(), 0)
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
