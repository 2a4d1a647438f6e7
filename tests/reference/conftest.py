"""Reference data with the time series, or in a database of its own."""

from collections.abc import AsyncIterator

import pytest

from quantplane_server.config import Settings
from tests.postgres import database


@pytest.fixture
def databases(request: pytest.FixtureRequest) -> int:
    return int(getattr(request, "param", 1))


@pytest.fixture
async def settings(
    settings: Settings, databases: int, edition: str
) -> AsyncIterator[Settings]:
    if databases == 1:
        yield settings
        return
    async with database(edition) as dsn:
        yield settings.model_copy(update={"reference_dsn": dsn})


@pytest.fixture
def reference_dsn(settings: Settings) -> str:
    """Where the reference data is."""
    return settings.reference_dsn or str(settings.postgres_dsn)
