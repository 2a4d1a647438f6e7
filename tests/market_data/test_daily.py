"""Days are aggregated once they are over, and no change of their rows is missed."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.checks import EPOCH
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.market_data import queries
from quantplane_server.market_data.daily import aggregate_days
from quantplane_server.market_data.recorder import Recorder
from quantplane_server.tasks import end
from tests.conftest import both_editions
from tests.market_data.test_bars import START, bar, listed, store

DAY = timedelta(days=1)
DAY_MINUTES = 1_440
FIRST_DAY = (START - EPOCH).days


async def pending(db: Database) -> dict[tuple[str, int], int]:
    """Return the version of each mark by symbol and day after START."""
    async with db.connection() as conn:
        rows = await conn.fetch("SELECT symbol, day, version FROM pending_days")
    return {(symbol, (day - START).days): version for symbol, day, version in rows}


async def daily(client: Client, symbol: str, **fields: Any) -> list[pb.Bar]:
    return await listed(client, symbol, interval={"seconds": 86_400}, **fields)


def day_bar(symbol: str, day: int, close: float) -> pb.Bar:
    """Return what a bar of only a close becomes as the only one of its day."""
    return bar(symbol, day * DAY_MINUTES, close, open=close, high=close, low=close)


def today(symbol: str) -> pb.Bar:
    made = bar(symbol, 0)
    made.time.GetCurrentTime()
    return made


async def write(db: Database, *bars: pb.Bar) -> None:
    async with db.transaction() as conn:
        await queries.store_bars(conn, bars)


@both_editions
async def test_days_that_are_over_are_aggregated_and_lose_their_marks(db: Database):
    await write(db, bar("A", 0), bar("B", DAY_MINUTES), today("A"))
    assert await aggregate_days(db) == "2 days of 2 symbols"
    assert list(await pending(db)) == [("A", (datetime.now(UTC) - START).days)]
    assert await aggregate_days(db) == "0 days of 0 symbols"


@both_editions
async def test_a_day_whose_rows_are_gone_has_no_bar(lone_client: Client, db: Database):
    await store(lone_client, [bar("A", 0, 1.0), bar("A", DAY_MINUTES, 2.0)])
    await aggregate_days(db)
    async with db.transaction() as conn:
        await conn.execute("DELETE FROM market_data WHERE time < $1", START + DAY)
        await queries.mark_days(conn, [("A", FIRST_DAY)])
    for _ in range(2):
        assert await daily(lone_client, "A") == [day_bar("A", 1, 2.0)]
        await aggregate_days(db)
        assert not await pending(db)


@both_editions
async def test_a_writer_under_way_is_neither_waited_for_nor_missed(
    lone_client: Client, db: Database
):
    await write(db, bar("A", 0, 1.0))
    async with db.transaction() as conn:
        await queries.store_bars(conn, [bar("A", 0, 2.0)])
        async with asyncio.timeout(10):
            await aggregate_days(db)
    assert list(await pending(db)) == [("A", 0)]
    for _ in range(2):
        assert await daily(lone_client, "A") == [day_bar("A", 0, 2.0)]
        await aggregate_days(db)
    assert not await pending(db)


@both_editions
async def test_a_writer_that_marks_after_the_aggregation_is_not_missed(
    lone_client: Client, db: Database
):
    await write(db, bar("A", 0, 1.0))
    async with db.transaction() as conn:
        await conn.execute("UPDATE market_data SET close = 2.0")
        await aggregate_days(db)
        assert not await pending(db)
        await queries.mark_days(conn, [("A", FIRST_DAY)])
    for _ in range(2):
        assert await daily(lone_client, "A") == [day_bar("A", 0, 2.0)]
        await aggregate_days(db)


@both_editions
async def test_a_mark_made_again_since_it_was_read_stays(db: Database):
    await write(db, bar("A", 0), bar("B", 0))
    async with db.connection() as conn:
        marks = await queries.pending_by_day(conn, START, 1)
        await write(db, bar("A", 1))
        await queries.unmark_days(conn, marks)
    assert list(await pending(db)) == [("A", 0)]


async def test_a_run_that_comes_behind_another_changes_nothing(
    lone_client: Client, db: Database
):
    await write(db, bar("A", 0, 1.0))
    async with db.connection() as conn:
        await aggregate_days(db)
        await queries.aggregate_days(conn, "A", [START])
    assert await daily(lone_client, "A") == [day_bar("A", 0, 1.0)]


async def test_a_writer_that_meets_an_aggregation_marks_behind_it(db: Database):
    await write(db, bar("A", 0))
    async with db.transaction() as conn:
        marks = await queries.pending_by_symbol(conn, START, ("", START), 1)
        await queries.aggregate_days(conn, "A", [START])
        await queries.unmark_days(conn, marks)
        writing = asyncio.create_task(write(db, bar("A", 1)))
        await someone_waits(db)
    await writing
    assert list(await pending(db)) == [("A", 0)]


async def someone_waits(db: Database) -> None:
    """Return once a session of the database waits for another's lock."""
    async with db.connection() as conn:
        while not await conn.fetchval(
            """
            SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'
            """
        ):
            await asyncio.sleep(0.01)


@both_editions
async def test_days_that_cannot_be_aggregated_do_not_hold_back_others(db: Database):
    await write(db, bar("A", 0, vwap=1e308, volume=1_000))  # their product overflows
    await write(db, bar("B", 9 * DAY_MINUTES))
    assert await aggregate_days(db) == "1 days of 1 symbols"
    assert list(await pending(db)) == [("A", 0)]


# --- The recorder -------------------------------------------------------------------


@pytest.fixture
async def recorder(settings: Settings, db: Database) -> AsyncIterator[None]:
    bus = Bus(settings.redis_url, 1 << 30)
    await bus.open()
    recording = asyncio.create_task(Recorder(bus, db, 1 << 30).run())
    yield
    await end(recording)
    await bus.close()


async def publish(client: Client, *quotes: pb.Quote) -> None:
    async with client.publish_quotes() as publisher:
        await publisher.send(list(quotes))
        await publisher.durable()


def late(symbol: str) -> pb.Quote:
    return pb.Quote(symbol=symbol, bid=1.0, time=bar(symbol, 0).time)


def live(symbol: str) -> pb.Quote:
    return pb.Quote(symbol=symbol, bid=1.0, time=today(symbol).time)


async def test_the_recorder_marks_the_days_of_its_quotes(
    lone_client: Client, recorder: None, db: Database
):
    await publish(lone_client, late("A"), live("A"), late("B"))
    now = (datetime.now(UTC) - START).days
    assert set(await pending(db)) == {("A", 0), ("A", now), ("B", 0)}


async def test_the_recorder_marks_days_before_today_every_time_and_others_once(
    lone_client: Client, recorder: None, db: Database
):
    await publish(lone_client, late("A"), live("A"))
    before = await pending(db)
    await publish(lone_client, late("A"), live("A"))
    after = await pending(db)
    assert [day for (_, day) in after if after["A", day] != before["A", day]] == [0]


async def test_a_recorder_that_connects_again_marks_all_days_again(
    lone_client: Client, recorder: None, db: Database
):
    await publish(lone_client, live("A"))
    async with db.connection() as conn:
        await conn.execute("DELETE FROM pending_days")  # as by a restored backup
        await conn.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()
            """
        )
    await publish(lone_client, live("A"))
    assert [symbol for symbol, _ in await pending(db)] == ["A"]
