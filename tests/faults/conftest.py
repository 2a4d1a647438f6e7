"""A PostgreSQL and a Valkey that can be killed: both keep what they have on disk."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio as redis

from quantplane_server.embedded import Postgres, Valkey
from tests.faults import Desk
from tests.postgres import database


@pytest.fixture(scope="session")
def backends(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Postgres, Valkey]]:
    folder = tmp_path_factory.mktemp("backends")
    postgres, valkey = Postgres(folder), Valkey(folder)
    yield postgres, valkey
    asyncio.run(postgres.close())
    asyncio.run(valkey.close())


@pytest.fixture
def rng() -> random.Random:
    """Chance that can be repeated: QUANTPLANE_TEST_SEED sets what a run printed."""
    seed = os.environ.get("QUANTPLANE_TEST_SEED") or str(random.randrange(10**9))
    print(f"QUANTPLANE_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
async def desk(
    backends: tuple[Postgres, Valkey], rng: random.Random
) -> AsyncIterator[Desk]:
    postgres, valkey = backends
    await postgres.start()
    await valkey.start()
    async with redis.Redis.from_url(valkey.url) as client:
        await client.flushall()
    async with database(postgres.dsn) as dsn:
        yield Desk(postgres, valkey, dsn, rng)
        await postgres.start()  # for the next test, if this one failed halfway
