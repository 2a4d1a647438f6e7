"""A server without what would aggregate days by itself, and its database."""

from collections.abc import AsyncIterator

import pytest

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.main import serving


@pytest.fixture
async def lone_client(settings: Settings) -> AsyncIterator[Client]:
    """A client of a server without a recorder and maintenance beside it."""
    async with serving(settings) as target, Client(target) as client:
        yield client


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()
