"""The real parts that tests talk to: servers for the session, a database per test."""

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as redis

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.embedded import Postgres, Valkey
from quantplane_server.main import recording, serving
from tests.postgres import KEY, database
from tests.timescale import timescale_server

# Most tests have a copy of a database, which in memory takes a tenth of the time.
MEMORY, ROOM_BYTES = Path("/dev/shm"), 8 << 30
if "TMPDIR" not in os.environ and MEMORY.is_dir():
    if shutil.disk_usage(MEMORY).free > ROOM_BYTES:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# Of every client of this process and its children. Their files are none of the user's.
os.environ["QUANTPLANE_API_KEY"] = KEY
STATE = tempfile.TemporaryDirectory(prefix="quantplane-test-")
atexit.register(STATE.cleanup)
os.environ["XDG_STATE_HOME"] = STATE.name


@dataclass(frozen=True)
class Server:
    """A server that runs in the test's own event loop, its recorder beside it."""

    target: str
    settings: Settings


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """A plain PostgreSQL's superuser."""
    postgres = Postgres()
    asyncio.run(postgres.start())
    yield postgres.dsn
    asyncio.run(postgres.close())


@pytest.fixture(scope="session")
def timescale_dsn() -> Iterator[str]:
    """A TimescaleDB's superuser."""
    with timescale_server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    valkey = Valkey()
    asyncio.run(valkey.start())
    yield valkey.url
    asyncio.run(valkey.close())


@pytest.fixture
def edition(request: pytest.FixtureRequest) -> str:
    """The server that a test's database is on; storage tests ask for both."""
    name = getattr(request, "param", "postgres")
    return str(request.getfixturevalue(f"{name}_dsn"))


both_editions = pytest.mark.parametrize(
    "edition", ["postgres", "timescale"], indirect=True
)


@pytest.fixture
async def dsn(edition: str) -> AsyncIterator[str]:
    """A migrated database of the test's own."""
    async with database(edition) as dsn:
        yield dsn


@pytest.fixture
async def redis_url(valkey_url: str) -> AsyncIterator[str]:
    """An empty Valkey."""
    async with redis.Redis.from_url(valkey_url) as client:
        await client.flushall()
    yield valkey_url


@pytest.fixture
def settings(dsn: str, redis_url: str) -> Settings:
    return Settings(
        postgres_dsn=dsn,
        redis_url=redis_url,
        listen="127.0.0.1:0",
        grace_s=2,
        maintenance_s=3600,  # retention would take old history from under a test
    )


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    async with recording(settings), serving(settings) as target:
        yield Server(target, settings)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.target) as client:
        yield client
