"""A PostgreSQL and a Valkey that can be killed: both keep what they have on disk."""

import os
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio as redis

from tests.faults import Desk
from tests.faults.backends import Service, backends
from tests.postgres import database

Backends = tuple[Service, Service]


@pytest.fixture(scope="session")
def postgres_and_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    with backends(tmp_path_factory.mktemp("backends")) as services:
        yield services


@pytest.fixture
def rng() -> random.Random:
    """Chance that can be repeated: QUANTPLANE_TEST_SEED sets what a run printed."""
    seed = os.environ.get("QUANTPLANE_TEST_SEED") or str(random.randrange(10**9))
    print(f"QUANTPLANE_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
async def desk(
    postgres_and_valkey: Backends, rng: random.Random
) -> AsyncIterator[Desk]:
    postgres, valkey = postgres_and_valkey
    await postgres.start()
    await valkey.start()
    async with redis.Redis.from_url(valkey.address) as client:
        await client.flushall()
    async with database(postgres.address) as dsn:
        yield Desk(postgres, valkey, dsn, rng)
        await postgres.start()  # a test that failed may have left it killed
