"""A database to book in."""

from collections.abc import AsyncIterator

import pytest

from quantplane_server.db import Database
from tests.portfolio import Desk


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


@pytest.fixture
def desk(db: Database) -> Desk:
    return Desk(db)
