"""A database with rows in every table, and a backup of it, once per server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantplane_server.testing import drop_database, fresh_database
from tests.backup import backup, populate
from tests.postgres import database, migrated_template


@dataclass(frozen=True)
class Source:
    """A database that tests only read, and its backup."""

    dsn: str
    file: Path


@contextmanager
def populated(server_dsn: str, folder: Path) -> Iterator[Source]:
    async def make() -> Source:
        dsn = await fresh_database(server_dsn, await migrated_template(server_dsn))
        await populate(dsn)
        return Source(dsn, await backup(dsn, folder / "backup"))

    source = asyncio.run(make())
    yield source
    asyncio.run(drop_database(source.dsn))


@pytest.fixture(scope="session")
def postgres_source(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Source]:
    with populated(postgres_dsn, tmp_path_factory.mktemp("postgres")) as source:
        yield source


@pytest.fixture(scope="session")
def timescale_source(
    timescale_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Source]:
    with populated(timescale_dsn, tmp_path_factory.mktemp("timescale")) as source:
        yield source


@pytest.fixture
def source(request: pytest.FixtureRequest, edition: str) -> Source:
    """On the server of `edition`."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("edition", "postgres") if callspec else "postgres"
    found: Source = request.getfixturevalue(f"{name}_source")
    return found


@pytest.fixture(scope="session")
def untouched(postgres_dsn: str) -> Iterator[str]:
    """An empty database, for tests that leave it so."""
    dsn = asyncio.run(fresh_database(postgres_dsn))
    yield dsn
    asyncio.run(drop_database(dsn))


@pytest.fixture
async def empty(edition: str) -> AsyncIterator[str]:
    """An empty database on the source's server."""
    async with database(edition, migrated=False) as dsn:
        yield dsn
