"""A database that nothing maintains, and a client of a server on it."""

from collections.abc import AsyncIterator

import pytest

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.main import serving


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


@pytest.fixture
async def lone_client(settings: Settings) -> AsyncIterator[Client]:
    async with serving(settings) as target, Client(target) as client:
        yield client
