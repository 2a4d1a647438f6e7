"""The bus when its process starts again, with the last of what it had or without."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from time import time

import pytest
import redis.asyncio as redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane_server import bus as buses
from quantplane_server.bus import (
    START,
    Bus,
    FeedLease,
    Forgotten,
    Full,
    Mark,
    Position,
    Replaced,
    Round,
    shard_of,
    unbroken,
)
from quantplane_server.fanout import framed
from quantplane_server.market_data.durability import Durability
from quantplane_server.tasks import end
from tests.faults import until

CAP = 1 << 20
KEY = b"A"
SHARD = shard_of(KEY)
RECORD = framed(b"x")


@pytest.fixture
async def bus(redis_url: str) -> AsyncIterator[Bus]:
    bus = Bus(redis_url, CAP)
    await bus.open()
    yield bus
    await bus.close()


@pytest.fixture
async def valkey(redis_url: str) -> AsyncIterator[redis.Redis]:
    async with redis.Redis.from_url(redis_url) as valkey:
        yield valkey


async def append(bus: Bus, lease: FeedLease, batch: int = 1) -> Position:
    batches = Round(batch, {SHARD: batch}, {SHARD: {KEY: [RECORD]}})
    return (await bus.append(lease, batches, batch - 1))[SHARD]


async def kept(valkey: redis.Redis) -> dict[bytes, bytes]:
    """Return what the disk has: every key as it is now."""
    return {key: await valkey.dump(key) for key in await valkey.keys()}


async def flush(valkey: redis.Redis) -> None:
    """Remove everything, in a millisecond that no epoch begins in."""

    async def now_ms() -> int:
        seconds, us = await valkey.time()
        return int(seconds * 1_000 + us // 1_000)

    await valkey.flushall()
    flushed_ms = await now_ms()
    while await now_ms() == flushed_ms:
        pass


async def start_again(valkey: redis.Redis, disk: dict[bytes, bytes]) -> None:
    """Make of Valkey what a new process makes of its disk."""
    await valkey.flushall()
    for key, value in disk.items():
        await valkey.restore(key, 0, value)
    for meta in await valkey.keys("*:meta"):
        await valkey.hset(meta, "run", "that of before")


# Is the bus flushed first, how many entries are appended and kept, how many and lost,
# and, from 1 on, how many of these are in the database.
few = st.integers(0, 3)
lives = st.tuples(st.booleans(), few, few, few)


async def position(stored: list[Position]) -> dict[int, Position]:
    return {SHARD: stored[-1]} if stored else {}


nothing = partial(position, [])


async def recorded(bus: Bus) -> Position:
    return (await anext(bus.follow_recorded()))[SHARD]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(lives, max_size=6))
async def test_who_goes_on_misses_nothing_that_there_is_and_gets_nothing_twice(
    bus: Bus, valkey: redis.Redis, lives: list[tuple[bool, int, int, int]]
):
    await valkey.flushall()
    seen: list[list[Position]] = [[]]  # what readers have that once were at the head
    there: list[Position] = []  # on the bus, or in the database
    stored: list[Position] = []  # in the database

    async def opened() -> FeedLease:
        lease = await bus.open_feed("feed", partial(position, stored))
        if stored and (not there or stored[-1] > there[-1]):
            there[:] = stored
        return lease

    for rebuilt, keep, lose, store in lives:
        if rebuilt:
            await flush(valkey)
            there = []
        lease = await opened()
        last = lease.lasts[SHARD]
        for batch in range(last + 1, last + 1 + keep):
            there.append(await append(bus, lease, batch))
            seen.append([*there])
        disk, alive = await kept(valkey), [*there]
        for batch in range(last + 1 + keep, last + 1 + keep + lose):
            alive.append(await append(bus, lease, batch))
            seen.append([*alive])
        if store:
            stored = max(stored, alive[: len(there) + store - 1])
        await start_again(valkey, disk)
    lease = await opened()
    there.append(await append(bus, lease, lease.lasts[SHARD] + 1))
    assert there == sorted(set(there))
    here = [entry.position for entry in await bus.read(SHARD, START)]
    assert {*here, *stored} == {*there}
    assert here[-1] == (await bus.heads([SHARD]))[SHARD]
    for had in seen:
        at = had[-1] if had else START
        left = await bus.read(SHARD, at)
        following = [entry.position for entry in left]
        assert (had + following == there) == ([*unbroken(at, left)] == left)
        before = await recorded(bus)
        await bus.mark_recorded([Mark(SHARD, at, 0)])
        after = await recorded(bus)
        assert after.number == (len(had) if at in here else before.number)


async def test_a_session_is_forgotten_when_the_process_starts_again(
    bus: Bus, valkey: redis.Redis
):
    lease = await bus.open_feed("feed", nothing)
    await append(bus, lease)
    await start_again(valkey, await kept(valkey))
    with pytest.raises(Forgotten):
        await append(bus, lease, 2)
    again = await bus.open_feed("feed", nothing)
    assert again.lasts[SHARD] == 1
    await append(bus, again, 2)


async def test_a_session_that_was_lost_is_not_taken_for_the_next_one(
    bus: Bus, valkey: redis.Redis
):
    await bus.open_feed("feed", nothing)
    disk = await kept(valkey)
    lost = await bus.open_feed("feed", nothing)
    await start_again(valkey, disk)
    again = await bus.open_feed("feed", nothing)
    assert not set(lost.sessions) & set(again.sessions)
    with pytest.raises(Forgotten):
        await append(bus, lost)


async def test_a_newer_session_replaces_one(bus: Bus):
    lease = await bus.open_feed("feed", nothing)
    await bus.open_feed("feed", nothing)
    with pytest.raises(Replaced):
        await append(bus, lease)


async def test_what_is_noted_of_a_batch_that_is_lost_counts_for_nothing(
    bus: Bus, valkey: redis.Redis
):
    lease = await bus.open_feed("feed", nothing)
    await append(bus, lease)
    disk = await kept(valkey)
    await append(bus, lease, 2)
    await start_again(valkey, disk)
    await bus.note_accepted(lease, SHARD, 2)
    assert (await bus.open_feed("feed", nothing)).accepted_through == 0


async def test_positions_go_on_beyond_the_database_whatever_the_clock_says(bus: Bus):
    ahead = Position(int(time() * 1000) + 10**9, 5)
    lease = await bus.open_feed("feed", partial(position, [ahead]))
    at = await append(bus, lease)
    (entry,) = await bus.read(SHARD, START)
    assert at > ahead
    assert (entry.position, entry.previous) == (at, ahead)
    assert await append(bus, lease, 2) == Position(at.epoch, at.number + 1)


async def test_what_may_be_lost_is_not_durable_whatever_is_recorded_after_it(
    bus: Bus, valkey: redis.Redis
):
    durability = Durability(bus)
    lease = await bus.open_feed("feed", nothing)
    disk = await kept(valkey)
    lost = await append(bus, lease)
    await start_again(valkey, disk)
    recorded = await append(bus, await bus.open_feed("other", nothing))
    assert recorded.epoch > lost.epoch and recorded.number == lost.number
    await bus.mark_recorded([Mark(SHARD, recorded, 0)])
    following = asyncio.create_task(durability.run())
    await until(lambda: durability.covers({SHARD: recorded}), "what is recorded")
    assert not durability.covers({SHARD: lost})
    await end(following)


async def test_another_process_that_opens_the_bus_changes_nothing(
    bus: Bus, redis_url: str
):
    lease = await bus.open_feed("feed", nothing)
    another = Bus(redis_url, CAP)
    await another.open()
    await append(bus, lease)
    assert (await another.open_feed("other", nothing)).places[SHARD].epoch == (
        lease.places[SHARD].epoch
    )
    await another.close()


async def test_servers_of_two_versions_share_the_bus(
    bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    lease = await bus.open_feed("feed", nothing)
    await append(bus, lease)
    newer = buses._source() + "\n-- newer"
    monkeypatch.setattr(buses, "_source", lambda: newer)
    another = Bus(redis_url, CAP)
    await another.open()
    assert another.library != bus.library
    others = await another.open_feed("other", nothing)
    await append(another, others)
    await append(bus, lease, 2)
    await append(another, others, 2)
    positions = [entry.position for entry in await bus.read(SHARD, START)]
    assert [number for _, number in positions] == [1, 2, 3, 4]
    assert len({epoch for epoch, _ in positions}) == 1
    await another.close()


async def test_a_bus_without_memory_is_full_until_what_is_recorded_is_removed(
    bus: Bus, valkey: redis.Redis
):
    lease = await bus.open_feed("feed", nothing)
    epoch, number = position = await append(bus, lease)
    await valkey.config_set("maxmemory", 1)
    try:
        lease = await bus.open_feed("feed", nothing)
        await bus.note_accepted(lease, SHARD, 1)
        with pytest.raises(Full):
            await append(bus, lease, 2)
        after = Position(epoch, number + 1)
        await bus.mark_recorded([Mark(SHARD, position, 0, trim_before=after)])
    finally:
        await valkey.config_set("maxmemory", 0)
    assert not await bus.read(SHARD, START)
    await append(bus, lease, 2)


async def test_a_feed_that_sends_nothing_is_forgotten_some_day(
    bus: Bus, valkey: redis.Redis
):
    await bus.open_feed("feed", nothing)
    keys = await valkey.keys("*:feed:*")
    assert keys and all([await valkey.ttl(key) > 0 for key in keys])
