"""Snapshots of the account: asked for, and scheduled."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.db import Database
from quantplane_server.portfolio import queries, snapshots
from quantplane_server.portfolio.snapshots import Snapshots
from quantplane_server.tasks import end
from tests.conftest import both_editions
from tests.market_data import quote
from tests.portfolio import Desk, at, fill


async def listed(client: Client, **fields: Any) -> list[pb.PortfolioSnapshot]:
    """Return the snapshots of all pages."""
    found: list[pb.PortfolioSnapshot] = []
    token = ""
    while True:
        request = pb.ListSnapshotsRequest(page_token=token, **fields)
        response = await client.portfolio.ListSnapshots(request)
        found += response.snapshots
        token = response.next_page_token
        if not token:
            return found
        assert response.snapshots


def dated(minute: float, value: float = 0) -> pb.PortfolioSnapshot:
    snapshot = pb.PortfolioSnapshot(total_value=value)
    snapshot.time.FromDatetime(at(minute))
    return snapshot


async def insert(desk: Desk, *rows: pb.PortfolioSnapshot) -> None:
    async with desk.db.connection() as conn:
        for row in rows:
            await queries.insert_snapshot(conn, row)


# --- Asked for ----------------------------------------------------------------------


@both_editions
async def test_a_snapshot_is_the_account_as_it_is_now(client: Client, desk: Desk):
    await desk.book(fill("A", 2, 100, commission=1), fill("B", -1, 10), fill("C", 1, 1))
    await desk.book(fill("C", -1, 2))
    async with client.publish_quotes() as publisher:
        await publisher.send([quote("A", 1, bid=110, ask=112)])
        await publisher.durable()
    taken = await client.portfolio.TakeSnapshot(pb.TakeSnapshotRequest())
    assert taken.snapshot == pb.PortfolioSnapshot(
        time=taken.snapshot.time,
        total_value=1e6 + 22,
        cash=1e6 - 200 - 1 + 10 + 1,
        positions_value=212,
        total_pnl=22,
        unrealized_pnl=22,
        realized_pnl=0,
        total_exposure=232,
        net_exposure=212,
        n_positions=2,
    )
    assert taken.snapshot in await listed(client)


@both_editions
async def test_snapshots_are_listed_by_pages_in_order_of_time(
    client: Client, desk: Desk
):
    rows = [dated(minute) for minute in range(5)]
    await insert(desk, *reversed(rows))
    before = dated(5).time
    for size in (1, 2, 5, 6):
        assert await listed(client, end_time=before, page_size=size) == rows
    some = await listed(client, start_time=rows[1].time, end_time=rows[3].time)
    assert some == rows[1:3]


async def test_pages_do_not_shift_when_snapshots_are_taken(client: Client, desk: Desk):
    await insert(desk, dated(1), dated(3))
    wanted = pb.ListSnapshotsRequest(page_size=1, end_time=dated(9).time)
    first = await client.portfolio.ListSnapshots(wanted)
    await insert(desk, dated(0), dated(2))
    wanted.page_token = first.next_page_token
    second = await client.portfolio.ListSnapshots(wanted)
    assert list(second.snapshots) == [dated(2)]


@both_editions
async def test_of_two_in_the_same_microsecond_the_later_is_moved(desk: Desk):
    await insert(desk, dated(1, 1), dated(1, 2), dated(1, 3))
    async with desk.db.connection() as conn:
        rows = await queries.snapshots(conn, at(0), at(2), 10)
    assert [row.total_value for row in rows] == [1, 2, 3]
    assert [row.time.nanos for row in rows] == [0, 1_000, 2_000]


# --- Scheduled ----------------------------------------------------------------------


class Process:
    """What takes snapshots in one process, with connections of its own."""

    def __init__(self, db: Database) -> None:
        self.taken = 0
        self.snapshots = Snapshots(db, db, self._latest_quotes)
        self.task = asyncio.create_task(self.snapshots.run())

    async def _latest_quotes(self, symbols: Iterable[str]) -> dict[str, pb.Quote]:
        self.taken += 1
        return {}


@asynccontextmanager
async def process(dsn: str) -> AsyncIterator[Process]:
    db = await Database.open(dsn)
    running = Process(db)
    try:
        yield running
    finally:
        await end(running.task)
        await db.close()


async def count(desk: Desk) -> int:
    ((rows,),) = await desk.fetch("SELECT count(*) FROM portfolio_snapshots")
    return int(rows)


async def grown(desk: Desk, by: int) -> None:
    wanted = await count(desk) + by
    while await count(desk) < wanted:
        await asyncio.sleep(0.02)


@pytest.fixture
async def busy(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """An account with a position, and the shortest interval."""
    monkeypatch.setattr(snapshots, "RETRY_S", 0.02)
    await desk.execute(
        "INSERT INTO configurations (key, value) VALUES ($1, '1')",
        "portfolio.snapshot_interval_s",
    )
    await desk.book(fill("A", 1, 1))
    return desk


async def test_one_of_all_processes_takes_them(dsn: str, busy: Desk):
    async with process(dsn) as first:
        await grown(busy, 1)
        async with process(dsn) as second:
            await grown(busy, 2)
            assert (first.taken, second.taken) == (await count(busy), 0)
            await end(first.task)
            await grown(busy, 1)
            assert second.taken >= 1


async def test_a_shorter_interval_holds_at_once(
    dsn: str, busy: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(snapshots, "LOOK_S", 0.02)
    await busy.execute("UPDATE configurations SET value = '86400'")
    async with process(dsn):
        await grown(busy, 1)
        await busy.execute("UPDATE configurations SET value = '1'")
        await grown(busy, 1)


async def test_they_go_on_when_the_database_was_away(dsn: str, busy: Desk):
    async with process(dsn):
        await grown(busy, 1)
        await busy.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await grown(busy, 2)


async def test_the_last_one_is_left_out_where_a_backend_is_away(desk: Desk):
    async def away(symbols: Iterable[str]) -> dict[str, pb.Quote]:
        raise ConnectionRefusedError

    await desk.book(fill("A", 1, 1))
    await Snapshots(desk.db, desk.db, away).close()
    assert await count(desk) == 0
