"""Signals expire by themselves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.db import Database
from quantplane_server.embedded import Postgres
from quantplane_server.log import Logs
from quantplane_server.signals import expiry
from quantplane_server.signals.expiry import Expiry
from quantplane_server.tasks import end
from tests.admin import connected, until
from tests.conftest import both_editions
from tests.postgres import database
from tests.signals import (
    NEVER,
    events,
    get,
    happened,
    insert,
    publish,
    signal,
    snapshot,
    type_of,
    value,
    waiting,
    watch,
)

PAST, AHEAD = "now() - INTERVAL '1 s'", "now() + INTERVAL '1 h'"


@asynccontextmanager
async def expiring(dsn: str, redis_url: str, processes: int = 1) -> AsyncIterator[None]:
    """Let signals expire, in so many processes with connections of their own."""
    async with AsyncExitStack() as stack:
        tasks = []
        for _ in range(processes):
            db = await Database.open(dsn)
            stack.push_async_callback(db.close)
            bus = Bus(redis_url, cap_bytes=0)
            stack.push_async_callback(bus.close)
            tasks.append(asyncio.create_task(Expiry(db, Logs(db, bus, {})).run()))
        yield
        await end(*tasks)


async def expired(dsn: str, count: int) -> list[str]:
    """Return the ids of all that have expired, once there are so many."""
    query = "SELECT count(*) >= $1 FROM signals WHERE status = 'expired'"
    async with connected(dsn) as connection:
        await until(lambda: connection.fetchval(query, count))
    return [key for type, key in await happened(dsn) if type == "EXPIRED"]


@both_editions
async def test_a_signal_expires_and_who_watches_is_told(client: Client):
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    sent = signal(expiration=soon), signal(expiration=NEVER), signal()
    published = await publish(client, *sent)
    responses = watch(client)
    assert len((await snapshot(responses)).signals) == 3
    (event,) = await events(responses, 1)
    published[0].status = pb.SIGNAL_STATUS_EXPIRED
    assert (type_of(event), event.signal) == ("EXPIRED", published[0])
    assert event.time.ToDatetime(UTC) > soon
    assert [await get(client, one.signal_id) for one in published] == published


@both_editions
async def test_only_what_is_active_and_past_its_expiration_expires(
    dsn: str, redis_url: str
):
    due = [
        await insert(dsn, expiration=PAST),
        await insert(dsn, expiration=PAST, time="now() - INTERVAL '300 days'"),
    ]
    kept = {
        await insert(dsn, expiration=AHEAD): "active",
        await insert(dsn): "active",
        await insert(dsn, expiration=PAST, status="'executed'"): "executed",
        await insert(dsn, expiration=PAST, status="'cancelled'"): "cancelled",
    }
    async with expiring(dsn, redis_url):
        assert sorted(await expired(dsn, 2)) == sorted(due)
        last = await insert(dsn, expiration=PAST)  # which a later round finds
        assert (await expired(dsn, 3))[2:] == [last]
    async with connected(dsn) as connection:
        rows = await connection.fetch("SELECT signal_id::text, status FROM signals")
    assert dict(map(tuple, rows)) == kept | dict.fromkeys([*due, last], "expired")


@both_editions
async def test_several_processes_expire_each_signal_once(
    dsn: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expiry, "BATCH", 3)
    monkeypatch.setattr(expiry, "INTERVAL_S", 0.01)
    due = [await insert(dsn, expiration=PAST) for _ in range(40)]
    async with expiring(dsn, redis_url, processes=3):
        assert sorted(await expired(dsn, 40)) == sorted(due)


async def test_a_transaction_expires_a_bounded_batch(
    dsn: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expiry, "BATCH", 2)
    for _ in range(5):
        await insert(dsn, expiration=PAST)
    async with expiring(dsn, redis_url):
        await expired(dsn, 5)
    transactions = "SELECT count(DISTINCT xmin::text) FROM event_log"
    assert await value(dsn, transactions) == 3


@both_editions
async def test_what_someone_else_changes_is_passed_over(dsn: str, redis_url: str):
    held, due = [await insert(dsn, expiration=PAST) for _ in range(2)]
    lock = "SELECT FROM signal_keys WHERE signal_id = $1 FOR NO KEY UPDATE"
    async with connected(dsn) as holder:
        async with expiring(dsn, redis_url):
            async with holder.transaction():
                await holder.fetch(lock, held)
                assert await expired(dsn, 1) == [due]
                await holder.execute(
                    "UPDATE signals SET status = 'cancelled' WHERE signal_id = $1", held
                )
                later = await insert(dsn, expiration=PAST)
                assert await expired(dsn, 2) == [due, later]
            last = await insert(dsn, expiration=PAST)
            assert await expired(dsn, 3) == [due, later, last]


@both_editions
async def test_what_is_cancelled_at_the_last_moment_does_not_expire(
    dsn: str, redis_url: str
):
    await insert(dsn, expiration=PAST)
    async with connected(dsn) as holder, connected(dsn) as watcher:
        await holder.execute("BEGIN; LOCK TABLE signal_keys IN EXCLUSIVE MODE")
        async with expiring(dsn, redis_url):
            await waiting(watcher, 1)  # it has found the signal, and not locked it
            await holder.execute("UPDATE signals SET status = 'cancelled'; COMMIT")
            other = await insert(dsn, expiration=PAST)
            assert await expired(dsn, 1) == [other]


async def test_signals_expire_once_the_database_is_back(
    redis_url: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(expiry, "INTERVAL_S", 0.05)
    async with Postgres() as postgres, database(postgres.dsn) as dsn:
        async with expiring(dsn, redis_url):
            first = await insert(dsn, expiration=PAST)
            assert await expired(dsn, 1) == [first]
            await postgres.kill()

            async def warned() -> bool:
                return "expiring signals fails" in caplog.text

            await until(warned)
            await postgres.start()
            second = await insert(dsn, expiration=PAST)
            assert await expired(dsn, 2) == [first, second]
