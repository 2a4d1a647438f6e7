"""Servers for the tests of whoever uses quantplane; its client's fixtures load this."""

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from urllib.parse import urlsplit

import asyncpg
import redis.asyncio as redis

from quantplane_server.config import Settings
from quantplane_server.embedded import services
from quantplane_server.identity.local import OwnKey, put_keys
from quantplane_server.main import recording, serving
from quantplane_server.migrate import upgrade

EMPTY = "template0"


@asynccontextmanager
async def servers(
    api_key: str,
) -> AsyncIterator[Callable[[], AbstractAsyncContextManager[str]]]:
    """Run PostgreSQL and Valkey; yield what serves on them, and yields the target.

    One server at a time. Each begins with nothing but a user "test", who may do
    everything with `api_key`, on a copy of one migrated database: migrating takes
    longer than copying.
    """
    async with services(None) as backends:
        migrated = await fresh_database(backends.postgres_dsn)
        await upgrade(migrated)
        await put_keys(migrated, "test", [OwnKey("test", "admin", api_key)])
        yield partial(_server, migrated, backends.redis_url)


@asynccontextmanager
async def _server(migrated: str, redis_url: str) -> AsyncIterator[str]:
    async with redis.Redis.from_url(redis_url) as bus:
        await bus.flushall()
    async with temporary_database(migrated, name_of(migrated)) as own:
        settings = Settings(
            postgres_dsn=own,
            reference_dsn=None,
            redis_url=redis_url,
            listen="127.0.0.1:0",
            grace_s=1,
            maintenance_s=3600,  # retention would take old history from under a test
        )
        async with recording(settings), serving(settings) as target:
            yield target


@asynccontextmanager
async def temporary_database(dsn: str, template: str) -> AsyncIterator[str]:
    """Yield the DSN of a fresh database, which is dropped at the end."""
    own = await fresh_database(dsn, template)
    try:
        yield own
    finally:
        await drop_database(own)


async def fresh_database(dsn: str, template: str = EMPTY) -> str:
    """Create a database, as a copy of one without sessions, and return its DSN.

    `dsn` is that of any database on the same server.
    """
    name = f"test_{uuid.uuid4().hex}"
    copy = f"TEMPLATE {template} STRATEGY file_copy"
    await _execute(dsn, f"CREATE DATABASE {name} {copy}")
    parts = urlsplit(dsn)
    return f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"


async def drop_database(dsn: str) -> None:
    """Drop it, ending the sessions it still has."""
    await _execute(dsn, f"DROP DATABASE {name_of(dsn)} WITH (FORCE)")


def name_of(dsn: str) -> str:
    """Return the name of a database."""
    return urlsplit(dsn).path[1:]


async def _execute(dsn: str, statement: str) -> None:
    """Execute a statement on the server of a database."""
    connection = await asyncpg.connect(dsn, database="postgres")
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
