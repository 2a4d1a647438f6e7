"""What attacks are made with, and on."""

from collections.abc import AsyncIterator

import pytest

from tests.conftest import Server
from tests.identity.callers import (
    Channel,
    Metadata,
    People,
    bearer,
    channel,
    people_of,
)
from tests.postgres import KEY


@pytest.fixture
def admin() -> Metadata:
    return bearer(KEY)


@pytest.fixture
async def people(dsn: str) -> AsyncIterator[People]:
    async with people_of(dsn) as people:
        yield people


@pytest.fixture
async def calls(server: Server) -> AsyncIterator[Channel]:
    async with channel(server.target) as opened:
        yield opened
