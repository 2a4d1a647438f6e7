"""Maintenance: who does it, and what each of its tasks does and leaves alone."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane_server.admin import maintenance
from quantplane_server.admin.maintenance import (
    Maintenance,
    OrphanedKeys,
    Task,
    TaskFailed,
    delete_keys,
    kept_since,
    remove_old,
)
from quantplane_server.admin.queries import KEYS
from quantplane_server.db import Database, Edition
from quantplane_server.embedded import Postgres
from quantplane_server.migrate import upgrade
from quantplane_server.tasks import end
from tests.admin import (
    connected,
    execute,
    execution,
    fetch,
    has_chunks,
    keys,
    order,
    signal,
    ticks,
    until,
    value,
    vanish,
)
from tests.conftest import both_editions

FOREVER_S = 3600.0
SOON_S = 0.01
HOLDER = """
    SELECT pid FROM pg_locks JOIN pg_database AS d ON d.oid = database
     WHERE locktype = 'advisory' AND datname = current_database() AND granted
"""


class Worker:
    """A server's maintenance, with a connection pool of its own; counts its runs."""

    def __init__(self, db: Database, interval_s: float, name: str = "count") -> None:
        self.runs = 0
        task = Task(name, "counts", self._run)
        self.maintenance = Maintenance(db, [task], interval_s)

    async def _run(self, db: Database) -> str:
        self.runs += 1
        return f"run {self.runs}"

    async def has_run(self) -> bool:
        return self.runs > 0


@asynccontextmanager
async def working(dsn: str, interval_s: float) -> AsyncIterator[Worker]:
    db = await Database.open(dsn)
    worker = Worker(db, interval_s)
    task = asyncio.create_task(worker.maintenance.run())
    yield worker
    await end(task)
    await db.close()


@asynccontextmanager
async def maintained(db: Database, *tasks: Task) -> AsyncIterator[None]:
    """Run these tasks once, until the last of them is noted."""
    running = asyncio.create_task(Maintenance(db, tasks, FOREVER_S).run())
    noted = "SELECT 1 FROM maintenance_runs WHERE task = $1"
    await until(lambda: value(db, noted, tasks[-1].name))
    yield
    await end(running)


# --- Who does it --------------------------------------------------------------------


@both_editions
async def test_one_server_maintains_and_another_when_its_session_ends(
    dsn: str, db: Database
):
    async with working(dsn, FOREVER_S) as first:
        await until(first.has_run)
        ((holder,),) = await fetch(db, HOLDER)
        async with working(dsn, SOON_S) as second:
            await until(lambda: value(db, TRIED, holder))
            assert (first.runs, second.runs) == (1, 0)
            assert await fetch(db, HOLDER) == [(holder,)]
            await value(db, "SELECT pg_terminate_backend($1, 5000)", holder)
            await until(second.has_run)
            ((successor,),) = await fetch(db, HOLDER)
            assert successor != holder
        assert first.runs == 1


# A session beside the holder's has asked for the lock.
TRIED = """
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> $1 AND pid <> pg_backend_pid()
       AND query LIKE '%pg_try_advisory_lock%'
       AND query_start > (SELECT max(started_at + duration) FROM maintenance_runs)
"""


async def test_the_one_who_maintains_goes_on_doing_it(dsn: str):
    async with working(dsn, SOON_S) as worker:

        async def again() -> bool:
            return worker.runs >= 3

        await until(again)


async def test_a_task_that_fails_is_noted_and_the_others_run(db: Database):
    async def divide(db: Database) -> str:
        return str(await value(db, "SELECT 1 / 0 AS secret"))

    async def read(db: Database) -> str:
        raise FileNotFoundError("/a/secret/path")

    async def break_down(db: Database) -> str:
        raise KeyError("SELECT secret")

    async def look(db: Database) -> str:
        return str(await value(db, "SELECT pg_read_file('/a/secret/path')"))

    async def count(db: Database) -> str:
        return "3 rows"

    tasks = [
        Task(function.__name__, "", function)
        for function in (divide, read, break_down, look, count)
    ]
    async with maintained(db, *tasks):
        runs = await fetch(db, "SELECT task, succeeded, result FROM maintenance_runs")
    assert {task: rest for task, *rest in runs} == {
        "divide": [False, "division by zero"],
        "read": [False, "the database can't be reached"],
        "break_down": [False, "internal error; the server's log has the details"],
        "look": [False, "could not open file a file for reading: "
                        "No such file or directory"],
        "count": [True, "3 rows"],
    }  # fmt: skip


async def test_a_run_is_noted_with_when_it_began_and_how_long_it_took(db: Database):
    before = await value(db, "SELECT clock_timestamp()")

    async def wait(db: Database) -> str:
        await execute(db, "SELECT pg_sleep(0.2)")
        return "waited"

    async with maintained(db, Task("wait", "", wait)):
        ((started_at, duration),) = await fetch(
            db, "SELECT started_at, duration FROM maintenance_runs"
        )
        now = await value(db, "SELECT clock_timestamp()")
    assert before - duration / 10 < started_at < started_at + duration < now
    assert duration.total_seconds() >= 0.2


async def test_maintenance_goes_on_once_the_database_is_back():
    async with Postgres() as postgres:
        await upgrade(postgres.dsn)
        async with working(postgres.dsn, SOON_S) as worker:
            await until(worker.has_run)
            await postgres.kill()
            await postgres.start()
            worker.runs = 0
            await until(worker.has_run)


# --- Retention ----------------------------------------------------------------------


@both_editions
async def test_what_is_older_than_its_retention_goes(db: Database):
    # A chunk holds a week: one ends long before, one reaches beyond the horizon.
    await ticks(db, "10 years", "5 years 1 second", "5 years -1 minute", "1 second")
    left = "SELECT count(*) FROM market_data"
    if db.edition is Edition.COMMUNITY:
        assert await remove_old(db) == "nothing to remove"
        assert await value(db, left) == 4
        async with db.connection() as conn:
            ((job,),) = await conn.fetch(
                "SELECT job_id FROM timescaledb_information.jobs WHERE proc_name ="
                " 'policy_retention' AND hypertable_name = 'market_data'"
            )
            await conn.execute(f"CALL run_job({job})")
    elif db.edition is Edition.APACHE:
        assert await remove_old(db) == "market_data: 1 chunk"
    else:
        assert await remove_old(db) == "market_data: 2 rows"
    ages = "SELECT count(*) FROM market_data WHERE time > now() - INTERVAL '5 years'"
    assert await value(db, ages) == 2
    assert await value(db, left) == (3 if has_chunks(db) else 2)
    assert await remove_old(db) == "nothing to remove"


@both_editions
async def test_a_run_removes_a_bounded_part(
    db: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(maintenance, "CHUNKS", 2)
    monkeypatch.setattr(maintenance, "BATCH_ROWS", 1)
    monkeypatch.setattr(maintenance, "BATCHES", 2)
    await ticks(db, "9 years", "8 years", "7 years", "1 day")
    await execute(db, "DELETE FROM retention_policies", RETAIN_MARKET_DATA)
    what = "chunk" if has_chunks(db) else "row"
    assert await remove_old(db) == f"market_data: 2 {what}s"
    assert await value(db, "SELECT min(time) < now() - '7 years'::interval"
                           "  FROM market_data")  # fmt: skip
    assert await remove_old(db) == f"market_data: 1 {what}"
    assert await value(db, "SELECT count(*) FROM market_data") == 1


RETAIN_MARKET_DATA = "INSERT INTO retention_policies VALUES ('market_data', '1 year')"


@both_editions
async def test_a_policy_that_makes_no_sense_is_told_and_stops_no_other(db: Database):
    await ticks(db, "9 years")
    await execute(
        db,
        "DELETE FROM retention_policies",
        RETAIN_MARKET_DATA,
        """
        INSERT INTO retention_policies VALUES
            ('signals; DROP TABLE positions', '1 day'), ('signal_keys', '1 day'),
            ('signals', '0'), ('orders', '-1 day')
        """,
    )
    with pytest.raises(TaskFailed) as failed:
        await remove_old(db)
    assert str(failed.value) == (
        "orders: drop_after must be above 0, "
        "signal_keys: not a table of time series, "
        "signals: drop_after must be above 0, "
        "signals; DROP TABLE positions: not a table of time series, "
        f"market_data: 1 {'chunk' if has_chunks(db) else 'row'}"
    )
    assert await value(db, "SELECT count(*) FROM positions") == 0


async def test_a_table_that_is_missing_stops_no_other(db: Database):
    await ticks(db, "9 years")
    await execute(db, "DROP TABLE options_chains")
    with pytest.raises(TaskFailed) as failed:
        await remove_old(db)
    assert str(failed.value) == (
        'options_chains: relation "options_chains" does not exist, market_data: 1 row'
    )


async def test_rows_that_others_refer_to_stay_on_plain_postgresql(db: Database):
    more = "('orders', '1 y'), ('executions', '1 y')"
    await execute(db, f"INSERT INTO retention_policies VALUES {more}")
    used, unused = await signal(db, "9 years"), await signal(db, "9 years")
    filled, unfilled = await order(db, "9 years", used), await order(db, "9 years")
    recent = await execution(db, "1 day", filled)
    await execution(db, "9 years", unfilled)
    assert await remove_old(db) == "executions: 1 row, orders: 1 row, signals: 1 row"
    assert await keys(db) == {used, filled, recent}
    assert unused not in await keys(db)


@both_editions
async def test_a_database_that_got_the_extension_later_deletes_rows(
    db: Database, dsn: str
):
    """Hypertables lose chunks and plain tables rows, whatever the edition."""
    await execute(
        db,
        "CREATE SCHEMA other",
        "CREATE TABLE other.market_data (LIKE market_data INCLUDING ALL)",
        "DELETE FROM retention_policies",
        RETAIN_MARKET_DATA,
    )
    async with connected(dsn) as admin:
        name = await admin.fetchval("SELECT current_database()")
        await admin.execute(f"ALTER DATABASE {name} SET search_path = other, public")
    later = await Database.open(dsn)
    await ticks(later, "9 years", "1 day")
    assert await remove_old(later) == "market_data: 1 row"
    assert await value(later, "SELECT count(*) FROM other.market_data") == 1
    await later.close()


@both_editions
async def test_the_times_of_chains_go_with_the_chains(db: Database):
    await execute(
        db,
        """
        INSERT INTO option_chain_times
        SELECT 'A', now() - age, true
          FROM unnest('{9 years, 5 years 1 second, 1 day}'::interval[]) AS age
        """,
    )
    assert await remove_old(db) == "option_chain_times: 2 rows"
    assert await value(db, "SELECT count(*) FROM option_chain_times") == 1


@both_editions
async def test_what_is_kept_is_known_from_the_policy(db: Database):
    horizon = await value(db, "SELECT now() - INTERVAL '5 years'")
    since = await kept_since(db, "market_data")
    assert since is not None and 0 <= (since - horizon).total_seconds() < 60
    assert await kept_since(db, "orders") is None


# --- Keys ---------------------------------------------------------------------------


@both_editions
async def test_the_keys_of_dropped_chunks_go_unless_something_refers_to_them(
    db: Database,
):
    if not has_chunks(db):
        return  # no chunks, and triggers remove the keys of rows
    used, unused, live = [await signal(db, age) for age in ("9 y", "9 y", "1 day")]
    filled, unfilled = await order(db, "8 y", used), await order(db, "8 y", used)
    recent, old = (
        await execution(db, "1 h", filled),
        await execution(db, "8 y", unfilled),
    )
    for table in ("signals", "executions"):
        await value(db, f"SELECT drop_chunks('{table}', INTERVAL '5 years')::text")
    orphaned = OrphanedKeys()
    assert await orphaned.run(db) == "execution_keys: 1 key, signal_keys: 1 key"
    assert await keys(db) == {used, live, filled, unfilled, recent}
    await value(db, "SELECT drop_chunks('orders', INTERVAL '5 years')::text")
    assert await orphaned.run(db) == "order_keys: 1 key, signal_keys: 1 key"
    assert await keys(db) == {live, filled, recent}
    assert {used, unused, unfilled, old}.isdisjoint(await keys(db))


AGES = st.sampled_from(["1 hour", "2 days", "40 days"])
ROWS = st.lists(st.tuples(AGES, st.booleans(), st.integers(0, 5)), max_size=6)


@both_editions
@given(signals=ROWS, orders=ROWS, executions=ROWS, page=st.sampled_from([1, 2, 500]))
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_a_key_goes_once_its_row_is_gone_and_nothing_refers_to_it(
    db: Database, signals: list, orders: list, executions: list, page: int
):
    """Each row has an age, whether it vanishes, and what it refers to."""
    await execute(
        db,
        "TRUNCATE signals, orders, executions, signal_keys, order_keys, execution_keys",
    )
    signal_ids = [await signal(db, age) for age, _, _ in signals]
    order_ids = [
        await order(db, age, signal_ids[to] if to < len(signal_ids) else None)
        for age, _, to in orders
    ]
    execution_ids = [
        await execution(db, age, order_ids[to] if to < len(order_ids) else None)
        for age, _, to in executions
    ]
    made = {"signals": (signals, signal_ids), "orders": (orders, order_ids),
            "executions": (executions, execution_ids)}  # fmt: skip
    for table, (rows, ids) in made.items():
        for (_, vanishes, _), id in zip(rows, ids, strict=True):
            if vanishes:
                await vanish(db, table, id)

    def orphans(rows: list, ids: list[str], referred: set[str]) -> set[str]:
        return {
            id
            for (age, vanishes, _), id in zip(rows, ids, strict=True)
            if vanishes and age != "1 hour" and id not in referred
        }

    gone = orphans(executions, execution_ids, set())
    referred = {
        order_ids[to]
        for (_, _, to), id in zip(executions, execution_ids, strict=True)
        if to < len(order_ids) and id not in gone
    }
    gone |= orphans(orders, order_ids, referred)
    referred = {
        signal_ids[to]
        for _, vanishes, to in orders
        if to < len(signal_ids) and not vanishes
    }
    gone |= orphans(signals, signal_ids, referred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maintenance, "PAGE_KEYS", page)
        orphaned = OrphanedKeys()
        for _ in range(3 * 7 // page + 3):  # each table thrice around
            await orphaned.run(db)
    assert await keys(db) == {*signal_ids, *order_ids, *execution_ids} - gone


@both_editions
async def test_a_key_stays_whose_row_is_just_being_written(dsn: str, db: Database):
    id = await signal(db, "2 days")
    ((row,),) = await fetch(db, "SELECT signals FROM signals")
    await vanish(db, "signals", id)
    orphaned = OrphanedKeys()
    async with connected(dsn) as writer:
        writing = writer.transaction()
        await writing.start()
        await writer.execute(
            "INSERT INTO signals (signal_id, time, strategy_id, symbol, signal_type,"
            " strength, confidence) VALUES ($1, $2, 's', 'A', 'LONG', 1, 1)",
            row["signal_id"],
            row["time"],
        )
        with pytest.raises(asyncpg.LockNotAvailableError):
            await orphaned.run(db)
        await writing.commit()
    assert await orphaned.run(db) == "nothing to remove"
    assert await keys(db) == {id}


@both_editions
async def test_a_key_stays_whose_row_came_back(db: Database):
    id = await signal(db, "2 days")
    (signal_keys,) = (keys for keys in KEYS if keys.name == "signal_keys")
    with pytest.raises(TaskFailed, match="came back"):
        await delete_keys(db, signal_keys, [uuid.UUID(id)])
    assert await keys(db) == {id}
