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
from quantplane_server.main import recording, serving
from quantplane_server.migrate import upgrade

TEMPLATE = "migrated"


@asynccontextmanager
async def servers() -> AsyncIterator[Callable[[], AbstractAsyncContextManager[str]]]:
    """Run PostgreSQL and Valkey; yield what serves on them, and yields the target.

    One server at a time. Each begins with nothing, on a copy of one migrated
    database: migrating takes longer than copying.
    """
    async with services(None) as backends:
        await _execute(backends.postgres_dsn, f"CREATE DATABASE {TEMPLATE}")
        await upgrade(_named(backends.postgres_dsn, TEMPLATE))
        yield partial(_server, backends.postgres_dsn, backends.redis_url)


@asynccontextmanager
async def _server(dsn: str, redis_url: str) -> AsyncIterator[str]:
    async with redis.Redis.from_url(redis_url) as bus:
        await bus.flushall()
    async with _database(dsn) as own:
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
async def _database(dsn: str) -> AsyncIterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    copy = f"TEMPLATE {TEMPLATE} STRATEGY file_copy"
    await _execute(dsn, f"CREATE DATABASE {name} {copy}")
    try:
        yield _named(dsn, name)
    finally:
        await _execute(dsn, f"DROP DATABASE {name} WITH (FORCE)")


def _named(dsn: str, name: str) -> str:
    """Return the DSN of another database of the same server."""
    parts = urlsplit(dsn)
    return f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
