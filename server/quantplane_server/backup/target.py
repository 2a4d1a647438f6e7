"""The database that is restored into: whether it may be, and emptying it again."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import asyncpg

from quantplane_server.db import (
    EDITION,
    RESTORING,
    UNAVAILABLE,
    Connection,
    Edition,
)
from quantplane_server.migrate import LOCK, RestoreUnfinished

from .errors import BackupError
from .fingerprint import FIRST_OID, extension_version
from .manifest import Part
from .session import PROGRAM, session

BATCH = 100  # objects, to be dropped together
PATIENCE_S = 60.0
END_S = 30.0
POLL_S = 0.2

AGAIN = "run `quantplane-server restore` again, which empties it first"

# What can be in a database beside tables and the like, in an order to drop it in: what
# belongs to a type goes with it.
CATALOGS = (
    *("pg_type", "pg_proc", "pg_operator", "pg_opclass", "pg_opfamily", "pg_collation"),
    *("pg_conversion", "pg_ts_config", "pg_ts_dict", "pg_ts_parser", "pg_ts_template"),
    *("pg_publication", "pg_foreign_server", "pg_foreign_data_wrapper"),
    "pg_namespace",
)
OTHERS = " UNION ALL ".join(
    f"SELECT tableoid, oid, {turn} FROM {catalog}"
    for turn, catalog in enumerate(CATALOGS, start=3)
)

# Everything that is not PostgreSQL's or an extension's, and how to drop it. Chunks come
# before their hypertables, so that no statement has to lock them all.
OBJECTS = f"""
    SELECT type, identity,
           CASE type WHEN 'large object' THEN format('SELECT lo_unlink(%s)', identity)
                     ELSE format('DROP %s IF EXISTS %s CASCADE',
                                 replace(type, '-', ' '), identity) END AS drop
      FROM (SELECT tableoid, oid, -1 AS turn FROM pg_event_trigger
             UNION ALL
            SELECT tableoid, oid,
                   CASE WHEN relkind = 'S' THEN 2 WHEN relhassubclass THEN 1 ELSE 0 END
              FROM pg_class
             WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND relpersistence <> 't'
             UNION ALL
            SELECT 'pg_largeobject'::regclass, oid, 3 FROM pg_largeobject_metadata
             UNION ALL {OTHERS}) AS objects (catalog, oid, turn),
           pg_identify_object(catalog, oid, 0)
     WHERE oid >= {FIRST_OID} AND identity !~ '^pg_(toast|temp)'
       AND identity <> '{RESTORING}'
       AND NOT EXISTS (SELECT FROM pg_depend AS d
                        WHERE d.classid = catalog AND d.objid = oid
                          AND d.refobjid <> oid AND d.deptype IN ('e', 'i'))
     ORDER BY turn, oid
     LIMIT {BATCH}
"""

LEFT_BEHIND = """
    SELECT pg_terminate_backend(pid, $2) FROM pg_stat_activity
     WHERE datname = current_database() AND application_name = $1
"""


@asynccontextmanager
async def locked(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Yield a connection that keeps other restores, and migrations, away."""
    async with session(dsn) as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
            raise BackupError(
                "another restore or a migration is under way in the target database"
            )
        yield connection


async def refuse_unfinished(connection: Connection) -> None:
    """Raise BackupError if a restore into this database has not ended."""
    if await _mark(connection) is not None:
        raise BackupError(str(RestoreUnfinished()))


class Terms(NamedTuple):
    """What is asked of a restore beside the rows."""

    owners: bool = True  # else all belongs to who restores, without privileges
    upgrade: bool = False  # the target may be of a newer major version of PostgreSQL


async def check(connection: Connection, dsn: str, part: Part, terms: Terms) -> None:
    """Raise BackupError unless a part can be restored into this database."""
    if await _mark(connection) is None:
        await _check_empty(connection)
    major = connection.get_server_version().major
    newer = major > part.server_major
    if major != part.server_major and not (newer and terms.upgrade):
        raise BackupError(
            f"the backup is of PostgreSQL {part.server_major} and the target is"
            f" PostgreSQL {major}",
            "give --upgrade to go on with the newer version"
            if newer
            else f"restore it into PostgreSQL {part.server_major}",
        )
    await _check_timescaledb(connection, dsn, part)
    await _check_roles(connection, part.roles if terms.owners else part.job_owners)


async def _check_empty(connection: Connection) -> None:
    objects = await connection.fetch(OBJECTS)
    if objects:
        first = min(objects, key=lambda object: object["identity"].startswith("_"))
        raise BackupError(
            f"the target database is not empty: it has the {first['type']}"
            f" {first['identity']}",
            "restore into a new one: CREATE DATABASE ... TEMPLATE template0",
        )


async def _check_timescaledb(connection: Connection, dsn: str, part: Part) -> None:
    wanted, found = part.timescaledb, await extension_version(connection)
    if wanted is None:
        if found:
            raise BackupError(
                "the backup is of a database without TimescaleDB, and the target"
                f" database has TimescaleDB {found}",
                "restore into one without: CREATE DATABASE ... TEMPLATE template0",
            )
        return
    create = f"CREATE EXTENSION timescaledb VERSION '{wanted}'"
    if found and found != wanted:
        raise BackupError(
            f"the backup is of TimescaleDB {wanted} and the target database has"
            f" {found}",
            f"DROP EXTENSION timescaledb, then in a new session {create}",
        )
    if not found and not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_available_extension_versions"
        " WHERE name = 'timescaledb' AND version = $1)",
        wanted,
    ):
        raise BackupError(
            f"the backup is of TimescaleDB {wanted}, which the target's server does"
            " not have",
            f"install that version, so that {create} works",
        )
    edition = await _edition(dsn, None if found else create)
    ranks = list(Edition)
    if ranks.index(edition) < ranks.index(part.edition):
        raise BackupError(
            f"the backup is of TimescaleDB's {part.edition} edition and the target is"
            f" of the {edition} edition",
            "set timescaledb.license = 'timescale' on a server that has that edition",
        )


async def _edition(dsn: str, create: str | None) -> Edition:
    """Return what the database is, or would be with the extension."""
    # In a session of its own, which has then loaded TimescaleDB, and never committed.
    async with session(dsn) as connection:
        await connection.execute("BEGIN")
        if create:
            try:
                await connection.execute(create)
            except (asyncpg.PostgresError, *UNAVAILABLE) as error:
                raise BackupError(
                    f"the target refuses {create}: {error}",
                    "an administrator may create it; it must be in"
                    " shared_preload_libraries",
                ) from error
        return Edition(await connection.fetchval(EDITION))


async def _check_roles(connection: Connection, roles: list[str]) -> None:
    missing = await connection.fetchval(
        "SELECT string_agg(name, ', ') FROM unnest($1::text[]) AS name"
        " WHERE to_regrole(name) IS NULL",
        roles,
    )
    if missing:
        raise BackupError(
            f"the backup has tables or privileges of {missing}, which the target's"
            " server does not know",
            f"CREATE ROLE {missing.split(', ')[0]}, or give --no-owner",
        )


async def begin(connection: Connection, dsn: str, timescaledb: str | None) -> None:
    """Mark the database, and make it ready for pg_restore.

    The mark stays when a restore cannot clean up behind itself. Nothing is served from
    a marked database, so all that it holds is what the next restore may drop.
    """
    if await _mark(connection) is not None:
        await empty(dsn)
    extensions = await connection.fetchval(
        "SELECT coalesce(string_agg(extname, ','), '') FROM pg_extension"
    )
    await connection.execute(
        f"CREATE SCHEMA {RESTORING}; COMMENT ON SCHEMA {RESTORING} IS '{extensions}'"
    )
    if timescaledb:
        async with session(dsn) as restoring:
            await restoring.execute(
                f"CREATE EXTENSION IF NOT EXISTS timescaledb VERSION '{timescaledb}'"
            )
            await restoring.execute("SELECT timescaledb_pre_restore()")


async def finish(dsn: str, timescaledb: str | None) -> None:
    """Let the database be used: its jobs run, and it can be backed up."""
    async with session(dsn) as connection:
        if timescaledb:
            await connection.execute("SELECT timescaledb_post_restore()")
        await connection.execute(f"DROP SCHEMA {RESTORING}")


async def empty(dsn: str) -> None:
    """Drop what a restore has created, if one has begun.

    The database was empty before, so this is everything that it has. A server that
    is away is waited for. Raises BackupError if it stays away, or refuses.
    """
    await _reach(dsn)
    try:
        await _empty(dsn)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, *UNAVAILABLE) as error:
        raise BackupError(f"the target can't be emptied: {error}", AGAIN) from error


async def _empty(dsn: str) -> None:
    async with session(dsn) as connection:
        mark = await _mark(connection)
        if mark is None:
            return
        await connection.execute(LEFT_BEHIND, PROGRAM, int(END_S * 1000))
        version = await extension_version(connection)
        if version:
            await connection.execute("SELECT timescaledb_pre_restore()")
        while objects := await connection.fetch(OBJECTS):
            await connection.execute(";".join(row["drop"] for row in objects))
        before = set(mark.split(","))
        for extension in await connection.fetch("SELECT extname FROM pg_extension"):
            name = extension["extname"]
            if name not in before or name == "timescaledb":
                await connection.execute(f'DROP EXTENSION "{name}" CASCADE')
        if version:
            name = await connection.fetchval("SELECT quote_ident(current_database())")
            await connection.execute(
                f"ALTER DATABASE {name} RESET timescaledb.restoring"
            )
    async with session(dsn) as connection:
        if version and "timescaledb" in before:
            await connection.execute(
                f"CREATE EXTENSION timescaledb VERSION '{version}'"
            )
        await connection.execute(f"DROP SCHEMA {RESTORING}")


async def _reach(dsn: str) -> None:
    began = time.monotonic()
    while True:
        try:
            async with session(dsn):
                return
        except UNAVAILABLE as error:
            if time.monotonic() > began + PATIENCE_S:
                raise BackupError(
                    f"the target can't be reached any more: {error}", AGAIN
                ) from error
            await asyncio.sleep(POLL_S)


async def _mark(connection: Connection) -> str | None:
    """Return the extensions from before the restore that runs or was cut off."""
    mark: str | None = await connection.fetchval(
        "SELECT coalesce(obj_description(oid), '') FROM pg_namespace"
        " WHERE nspname = $1",
        RESTORING,
    )
    return mark
