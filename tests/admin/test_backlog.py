"""What the bus holds and the database does not: how much, and since when."""

import time
from collections.abc import AsyncIterator

import pytest

from quantplane_server.admin.backlog import Backlog
from quantplane_server.bus import (
    START,
    Bus,
    FeedLease,
    Mark,
    Position,
    Round,
    shard_of,
)
from quantplane_server.fanout import framed
from quantplane_server.stamps import accepted_s

CAP = 1 << 20
KEY = b"A"
SHARD = shard_of(KEY)


@pytest.fixture
async def bus(redis_url: str) -> AsyncIterator[Bus]:
    bus = Bus(redis_url, CAP)
    await bus.open()
    yield bus
    await bus.close()


async def nothing_recorded() -> dict[int, Position]:
    return {}


async def append(bus: Bus, lease: FeedLease, batch: int) -> Position:
    parts = {SHARD: {KEY: [framed(b"x" * batch)]}}
    positions = await bus.append(lease, Round(batch, {SHARD: batch}, parts), batch - 1)
    return positions[SHARD]


async def test_an_empty_bus_has_no_backlog(bus: Bus):
    backlog = Backlog(bus)
    assert backlog.status() is None
    await backlog.check()
    status = backlog.status()
    assert status is not None
    assert (status.appended_bytes, status.unrecorded_bytes) == (0, 0)
    assert status.max_unrecorded_bytes == bus.cap_bytes
    assert backlog.lag_s == 0


async def test_what_waits_is_known_and_since_when(bus: Bus):
    lease = await bus.open_feed("feed", nothing_recorded)
    before = time.time()
    positions = [await append(bus, lease, batch) for batch in (1, 2, 3)]
    entries = await bus.read(SHARD, START)
    stamps = [entry.stamp for entry in entries]
    appended = [entry.appended for entry in entries]
    found = (await bus.backlog())[SHARD]
    assert (found.appended, found.recorded) == (appended[-1], 0)
    assert found.stamp == stamps[0]
    assert before <= accepted_s(found.stamp) <= time.time()
    for done in (0, 1):
        await bus.mark_recorded([Mark(SHARD, positions[done], appended[done])])
        found = (await bus.backlog())[SHARD]
        assert (found.recorded, found.stamp) == (appended[done], stamps[done + 1])
    await bus.mark_recorded([Mark(SHARD, positions[2], appended[2])])
    found = (await bus.backlog())[SHARD]
    assert (found.recorded, found.stamp) == (appended[2], b"")
