"""Databases for tests: each test has its own, on a server that all share."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from quantplane_server import migrate
from quantplane_server.identity.local import OwnKey, put_keys
from quantplane_server.testing import (
    EMPTY,
    fresh_database,
    name_of,
    temporary_database,
)

MIGRATIONS = Path(__file__).parents[1] / "migrations"
KEY = "qp_" + 43 * "t"  # of the user "test", who may do everything
LOCK = 0x74656D706C617465  # held while a template is made


@asynccontextmanager
async def database(server_dsn: str, migrated: bool = True) -> AsyncIterator[str]:
    """Yield the DSN of a new database with the current schema, or an empty one."""
    template = await migrated_template(server_dsn) if migrated else EMPTY
    async with temporary_database(server_dsn, template) as dsn:
        yield dsn


async def migrated_template(server_dsn: str) -> str:
    """The name of a database to copy that has the schema of the migrations now.

    It has the user "test" besides.

    Made once per server, since migrating takes longer than copying.
    """
    name = f"template_{_digest()}"
    server = await asyncpg.connect(server_dsn)
    try:
        await server.execute("SELECT pg_advisory_lock($1)", LOCK)
        if not await server.fetchval(
            "SELECT count(*) FROM pg_database WHERE datname = $1", name
        ):
            dsn = await fresh_database(server_dsn)
            await migrate.upgrade(dsn)
            await let_in(dsn)
            await _seal(server, name_of(dsn), name)
    finally:
        await server.close()
    return name


async def let_in(dsn: str) -> None:
    """Make the user "test" with KEY, of whom the audit log says nothing."""
    await put_keys(dsn, "test", [OwnKey("test", "admin", KEY)])
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute("TRUNCATE audit_logs RESTART IDENTITY")
    finally:
        await conn.close()


async def _seal(server: asyncpg.Connection, made: str, name: str) -> None:
    # Only a database without sessions can be copied: TimescaleDB's workers would
    # connect to it again and again.
    await server.execute(f"ALTER DATABASE {made} ALLOW_CONNECTIONS false")
    await server.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = $1",
        made,
    )
    await server.execute(f"ALTER DATABASE {made} RENAME TO {name}")


def _digest() -> str:
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(MIGRATIONS.rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
