"""The durable log: how it is numbered, followed and trimmed."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
import redis.asyncio as redis
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane_server import log as logs
from quantplane_server import main
from quantplane_server.admin.maintenance import kept_since, remove_old
from quantplane_server.db import Database
from quantplane_server.errors import Compacted
from quantplane_server.log import (
    START,
    Event,
    append,
    head,
    read,
    trim,
    trim_logs,
)
from tests.conftest import both_editions
from tests.logs import (
    NOBODY,
    Process,
    Reader,
    event,
    forget,
    process,
    set_back,
    write,
)

SHARED = [HealthCheck.function_scoped_fixture]


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


@pytest.fixture
async def here(dsn: str, redis_url: str) -> AsyncIterator[Process]:
    async with process(dsn, redis_url) as made:
        yield made


@pytest.fixture
async def there(dsn: str, redis_url: str) -> AsyncIterator[Process]:
    async with process(dsn, redis_url) as made:
        yield made


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave it to news that tails read the table."""
    monkeypatch.setattr(logs, "POLL_S", 3600.0)


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_S", 0.02)
    monkeypatch.setattr(logs, "RETRY_S", 0.02)


def upto(last: int, first: int = 1) -> list[int]:
    return list(range(first, last + 1))


async def revisions(db: Database, log: str = "signals") -> list[int]:
    async with db.connection() as conn:
        rows = await conn.fetch(
            "SELECT revision FROM event_log WHERE log = $1 ORDER BY revision", log
        )
    return [row["revision"] for row in rows]


async def heard(here: Process, there: Process) -> None:
    """Wait until what one commits is heard by the other."""
    log = f"probe {uuid.uuid4()}"
    async with Reader(there, log) as reader:
        while not reader.revisions:
            here.logs.committed(log, 1, [event(0)])
            await asyncio.sleep(0.02)
            if not await revisions(here.db, log):
                await write(here.db, [0], log)


# --- Appending ----------------------------------------------------------------------


class Undone(Exception):
    pass


@both_editions
async def test_who_polls_never_sees_a_revision_before_the_one_below_it(dsn: str):
    """Many transactions from several pools; some are slow, some are undone."""
    committed: list[int] = []
    seen: list[int] = []

    async def writer(db: Database, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(15):
            events = [event(0)] * chance.randint(1, 4)
            with suppress(Undone):
                async with db.transaction() as conn:
                    first = await append(conn, "signals", events)
                    await conn.execute("SELECT pg_sleep($1)", chance.random() / 200)
                    if chance.random() < 0.3:
                        raise Undone
                committed.extend(range(first, first + len(events)))

    async def poller(db: Database) -> None:
        while True:
            found = await revisions(db)
            assert found == upto(len(found))
            seen.append(len(found))

    async with AsyncExitStack() as stack:
        pools = [await Database.open(dsn, pool_size=4) for _ in range(4)]
        for pool in pools:
            stack.push_async_callback(pool.close)
        polling = asyncio.create_task(poller(pools[0]))
        await asyncio.gather(*(writer(pools[n % 4], n) for n in range(12)))
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling
        assert await revisions(pools[0]) == upto(len(committed)) == sorted(committed)
        assert len(set(seen)) > 10  # it did look in between
        async with pools[0].connection() as conn:
            assert await conn.fetchval(
                "SELECT bool_and(time >= before) FROM (SELECT time, lag(time, 1, time)"
                " OVER (ORDER BY revision) AS before FROM event_log) AS entry"
            )


async def test_appending_to_two_logs_beside_others_that_append_to_one(db: Database):
    async def writer(names: list[str]) -> None:
        for _ in range(20):
            async with db.transaction() as conn:
                for name in names:
                    await append(conn, name, [event(0)])

    both = ["orders", "signals"]
    alone = [[name] for name in both]
    await asyncio.gather(*(writer(names) for names in [both, *alone] * 3))
    assert await revisions(db, "orders") == await revisions(db, "signals") == upto(120)


async def test_an_entry_has_all_that_was_said_of_it(db: Database):
    said = Event("published", "A", event(1).payload, "ada", "4bf9")
    async with db.transaction() as conn:
        assert await append(conn, "signals", [said, event(2)]) == 1
        assert await append(conn, "signals", [event(3)]) == 3
    async with db.connection() as conn:
        rows = await conn.fetch(
            "SELECT type, key, payload, actor, trace_id FROM event_log"
            " ORDER BY revision LIMIT 2"
        )
        assert [tuple(row) for row in rows] == [said, (*event(2)[:3], None, None)]
        assert (await head(conn, "signals")).revision == 3
        assert await head(conn, "orders") == START


# --- Following ----------------------------------------------------------------------


SEGMENTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), max_size=12)


@given(pushed=SEGMENTS)
@examples(max_examples=40, deadline=None, suppress_health_check=SHARED)
async def test_however_news_come_each_entry_is_read_once_in_order(
    here: Process, no_polls: None, pushed: list[tuple[int, int]]
):
    """News are runs of entries, or only the place of one that is not told."""
    log = str(uuid.uuid4())
    async with Reader(here, log) as reader:
        _, events = await write(here.db, upto(17), log)
        payloads = [event.payload for event in events]
        for first, length in pushed:
            reader.tail.push(first, payloads[first - 1 : first - 1 + length])
            await asyncio.sleep(0)
        last = max((first + max(0, n - 1) for first, n in pushed), default=0)
        found = await reader.reached(last)
        assert found == reader.numbers == upto(len(found))


async def test_a_reader_hears_what_other_processes_commit(
    here: Process, there: Process, no_polls: None
):
    await heard(here, there)
    async with Reader(here) as one, Reader(there) as other:
        for n in upto(20):
            await here.commit([n])
        for reader in one, other:
            assert await reader.reached(20) == upto(20)


async def test_what_is_too_large_to_be_told_is_read(
    here: Process, there: Process, no_polls: None
):
    await heard(here, there)
    async with Reader(there) as reader:
        await here.commit([1], size=2 << 20)
        await here.commit([2])
        assert await reader.reached(2) == [1, 2]


async def test_processes_that_write_at_once_agree(here: Process, there: Process):
    async def writer(process: Process) -> None:
        for n in range(25):
            await process.commit([n] * (n % 3 + 1))

    async with Reader(here) as one, Reader(there) as other, Reader(there) as third:
        await asyncio.gather(*map(writer, [here, there] * 3))
        last = len(await revisions(here.db))
        for reader in one, other, third:
            assert await reader.reached(last) == upto(last)
        assert one.numbers == other.numbers == third.numbers


async def test_without_the_bus_entries_come_by_the_table(dsn: str, quick_polls: None):
    async with process(dsn, NOBODY) as here, process(dsn, NOBODY) as there:
        async with Reader(there) as reader:
            for n in upto(20):
                await here.commit([n])
            assert await reader.reached(20) == upto(20)


async def test_without_the_bus_a_process_knows_what_it_commits_itself(
    dsn: str, no_polls: None
):
    async with process(dsn, NOBODY) as here, Reader(here) as reader:
        await here.commit([1, 2])
        assert await reader.reached(2) == [1, 2]


async def test_news_that_are_lost_while_reconnecting_are_made_up_for(
    here: Process, there: Process, redis_url: str, quick_polls: None
):
    await heard(here, there)
    async with redis.Redis.from_url(redis_url) as valkey, Reader(there) as reader:
        for n in upto(30):
            if n % 10 == 0:
                await valkey.client_kill_filter(_type="pubsub")
            await here.commit([n])
        assert await reader.reached(30) == upto(30)


async def test_a_bus_that_refuses_is_told_again_later(
    here: Process,
    there: Process,
    redis_url: str,
    no_polls: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(logs, "RETRY_S", 0.02)
    await heard(here, there)
    async with redis.Redis.from_url(redis_url) as valkey:
        await valkey.execute_command("ACL", "SETUSER", "default", "-publish")
        try:
            await here.commit([1])
            while "trying again" not in caplog.text:
                await asyncio.sleep(0.01)
        finally:
            await valkey.execute_command("ACL", "SETUSER", "default", "+publish")
    await heard(here, there)


async def test_what_waits_to_be_told_is_bounded(
    dsn: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "OUTBOX_BYTES", 10_000)
    async with process(dsn, NOBODY) as here:
        for first in upto(100):
            here.logs.committed("signals", first, [event(first, size=1_000)])
        waiting = [payload for _, _, told, _ in here.logs._outbox for payload in told]
        assert 8_000 < sum(map(len, waiting)) <= 10_000


@pytest.mark.parametrize("size", [0, 500])
async def test_a_reader_far_behind_comes_from_the_table_into_memory(
    here: Process, monkeypatch: pytest.MonkeyPatch, size: int
):
    """Pages and memory end by number, or by bytes."""
    monkeypatch.setattr(logs, "PAGE", 7)
    monkeypatch.setattr(logs, "PAGE_BYTES", 2_000)
    monkeypatch.setattr(logs, "KEPT", 20)
    monkeypatch.setattr(logs, "KEPT_BYTES", 6_000)
    await write(here.db, upto(200), size=size)
    async with Reader(here) as behind, Reader(here) as other:
        for n in range(201, 301):
            await here.commit([n], size=size)
        for reader in behind, other:
            assert await reader.reached(300) == reader.numbers == upto(300)
        kept = [len(entry.wire) for entry in behind.tail._kept]
        assert len(kept) == (20 if size == 0 else 11)
        assert sum(kept) == behind.tail._kept_bytes


async def test_a_page_is_bounded_wherever_it_comes_from(
    here: Process, monkeypatch: pytest.MonkeyPatch
):
    """By number, or by bytes."""
    monkeypatch.setattr(logs, "PAGE", 7)
    monkeypatch.setattr(logs, "PAGE_BYTES", 2_000)
    for size, expected in (0, upto(7)), (500, upto(4)):
        log = f"of {size}"
        async with Reader(here, log) as reader:
            await here.commit(upto(20), log, size)
            await reader.reached(20)
            page = await reader.tail.read(START)
            assert [entry.message.revision for entry in page] == expected
        async with here.db.connection() as conn:
            rows = await read(conn, log, START)
        assert [revision for revision, _ in rows] == expected


async def test_an_entry_larger_than_all_that_is_kept_is_read(
    here: Process, no_polls: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "KEPT_BYTES", 1_000)
    monkeypatch.setattr(logs, "PAGE_BYTES", 1_000)
    async with Reader(here) as reader:
        for n in upto(9):
            await here.commit([n], size=5_000 if n % 3 == 0 else 0)
            await reader.reached(n)
        await here.commit([10, 11, 12, 13], size=5_000)
        assert await reader.reached(13) == upto(13)
        assert not reader.tail._kept


async def test_what_is_committed_while_a_tail_begins_is_noticed(
    dsn: str, here: Process, no_polls: None
):
    lone = await Database.open(dsn, pool_size=1)
    beginning = Process(lone, NOBODY)
    wake = asyncio.Event()
    async with lone.connection() as conn:
        with beginning.logs.following("signals", wake.set) as tail:
            assert await read(conn, "signals", START) == []  # what a reader saw
            await here.commit([1])
            wake.clear()
            await lone._pool.release(conn)
            async with asyncio.timeout(10):
                await wake.wait()
                (entry,) = await tail.read(START)
    assert entry.message.revision == 1
    await lone.close()


async def test_a_tail_ends_with_its_last_reader(here: Process):
    async with Reader(here) as one:
        async with Reader(here) as other:
            assert one.tail is other.tail
        await here.commit([1])
        assert await one.reached(1) == [1]
        following = one.tail._task
    async with asyncio.timeout(10):
        with suppress(asyncio.CancelledError):
            await following
    async with Reader(here) as later:
        assert later.tail is not one.tail
        assert await later.reached(1) == [1]


# --- Where a log does not go on -------------------------------------------------------


async def lost(reader: Reader) -> str:
    """Return why a reader can't go on, and what is the oldest there is."""
    with pytest.raises(Compacted) as compacted:
        await reader.ended()
    cause = pb.GapCause.Name(compacted.value.cause).removeprefix("GAP_CAUSE_")
    assert compacted.value.metadata["cause"] == cause
    return f"{cause} {compacted.value.metadata.get('oldest', '')}".strip()


async def test_a_reader_of_what_is_gone_is_told_what_is_left(here: Process):
    await write(here.db, upto(50))
    await forget(here.db, before=40)
    async with Reader(here) as reader:
        assert await lost(reader) == "COMPACTED 40"


async def test_who_has_all_that_is_gone_goes_on(here: Process):
    await write(here.db, upto(50))
    async with here.db.connection() as conn:
        ((*_, through),) = [await read(conn, "signals", START)]
        position = logs.Position(50, logs.check_of(through[1]))
    await write(here.db, upto(60, 51))
    await forget(here.db, before=50)
    async with Reader(here, after=position) as reader:
        assert await reader.reached(10) == upto(60, 51)


async def test_a_tail_goes_on_where_the_table_was_trimmed_beyond_it(
    here: Process, no_polls: None
):
    """It was cut off for long: what came meanwhile came, and went."""
    async with Reader(here) as reader:
        await write(here.db, upto(50))
        await forget(here.db, before=40)
        reader.tail.push(50, [event(50).payload])
        assert await lost(reader) == "COMPACTED 40"
        async with here.db.connection() as conn:
            end = await head(conn, "signals")
        assert await reader.tail.read(end) == []
        await here.commit([51])
        (entry,) = reader.tail._kept
        assert await reader.tail.read(end) == [entry]


async def test_a_log_whose_entries_were_all_deleted_goes_on(here: Process):
    await write(here.db, upto(5))
    await forget(here.db, before=6)
    async with here.db.connection() as conn:
        end = await head(conn, "signals")
    async with Reader(here, after=end) as reader:
        await here.commit([6, 7])
        assert await reader.reached(2) == [6, 7]


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
async def test_a_reader_of_a_log_that_is_set_back_is_told(
    here: Process, monkeypatch: pytest.MonkeyPatch, told: bool
):
    """Even if the numbers that it has are given again, to others."""
    monkeypatch.setattr(logs, "POLL_S", 3600.0 if told else 0.02)
    for after, size in product([0, 3, 10, 15], [1, 15]):
        if told and not after:
            continue
        log = f"{after} by {size}"
        async with Reader(here, log) as reader:
            await here.commit(upto(20), log)
            await reader.reached(20)
            await set_back(here.db, 10, log)
            others = upto(1_000 + after, first=1_001)
            for start in range(0, after, size):
                first, events = await write(here.db, others[start:][:size], log)
                if told:
                    here.logs.committed(log, first, events)
            assert await lost(reader) == "LOG_RESTORED"
            assert reader.numbers == upto(20)


async def test_a_reader_behind_where_a_log_is_set_back_to_goes_on(
    here: Process, quick_polls: None
):
    await write(here.db, upto(10))
    async with here.db.connection() as conn:
        position = await head(conn, "signals")
    await write(here.db, upto(20, 11))
    async with Reader(here) as reader:
        await reader.reached(20)
        await set_back(here.db, 10)
        await write(here.db, upto(115, 101))
        assert await lost(reader) == "LOG_RESTORED"
        async with Reader(here, after=position) as behind:
            await behind.reached(15)
            assert behind.numbers == upto(115, 101)


# --- Retention ----------------------------------------------------------------------

NOW = datetime(2024, 1, 1, tzinfo=UTC)


async def fill(db: Database, log: str, ages: list[int]) -> None:
    """Write entries with these ages, in seconds."""
    first, _ = await write(db, ages, log)
    async with db.connection() as conn:
        await conn.executemany(
            "UPDATE event_log SET time = $3 WHERE log = $1 AND revision = $2",
            [
                (log, revision, NOW - timedelta(seconds=age))
                for revision, age in enumerate(ages, first)
            ],
        )


@given(
    ages=st.lists(st.integers(-3, 3), min_size=1, max_size=12), rows=st.integers(1, 5)
)
@examples(max_examples=60, deadline=None, suppress_health_check=SHARED)
async def test_trimming_leaves_a_suffix_whatever_the_times_are(
    db: Database, ages: list[int], rows: int
):
    """What is left begins at most one entry before the first that is young enough."""
    log = str(uuid.uuid4())
    await fill(db, log, ages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "TRIM_ROWS", rows)
        async with db.connection() as conn:
            trimmed = [await trim(conn, log, NOW) for _ in range(len(ages) + 1)]
    old = 0
    while old < len(ages) and ages[old] > 0:
        old += 1
    left = await revisions(db, log)
    assert left == upto(len(ages), first=max(old, 1))
    assert max(trimmed) <= rows
    assert trimmed[-1] == 0


async def test_every_log_is_trimmed_a_bounded_part_per_run(
    db: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "TRIM_ROWS", 3)
    monkeypatch.setattr(logs, "TRIMS", 2)
    await fill(db, "orders", [1] * 3)
    await fill(db, "signals", [1] * 10 + [0])
    assert await trim_logs(db, None) == "kept without end"
    assert await trim_logs(db, NOW) == "orders: 2 entries, signals: 6 entries"
    assert await trim_logs(db, NOW) == "signals: 3 entries"
    assert await trim_logs(db, NOW) == "nothing to remove"
    assert await revisions(db, "orders") == [3]
    assert await revisions(db, "signals") == [10, 11]


async def test_trimming_goes_on_beside_writers_and_readers(
    here: Process, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "TRIM_ROWS", 5)

    async def trimmer() -> None:
        while True:
            await trim_logs(here.db, datetime.now(UTC))

    async with Reader(here) as reader:
        trimming = asyncio.create_task(trimmer())
        for n in upto(150):
            await here.commit([n])
            await reader.reached(n)
        trimming.cancel()
        with suppress(asyncio.CancelledError):
            await trimming
        assert reader.revisions == upto(150)
        left = await revisions(here.db)
        assert left == upto(150, first=left[0])


async def test_a_policy_says_how_long_logs_are_kept(db: Database):
    since = await kept_since(db, "event_log")
    assert since and abs(datetime.now(UTC) - since - timedelta(days=30)).seconds < 60
    assert await remove_old(db) == "nothing to remove"


@pytest.mark.parametrize("rows", ["", "('event_log', '0')", "('event_log', '-1 day')"])
async def test_logs_are_kept_for_ever_without_a_policy_that_makes_sense(
    db: Database, rows: str
):
    async with db.connection() as conn:
        await conn.execute("DELETE FROM retention_policies")
        if rows:
            await conn.execute(f"INSERT INTO retention_policies VALUES {rows}")
    assert await kept_since(db, "event_log") is None


async def test_the_maintenance_trims_the_logs_by_the_policy(db: Database):
    (task,) = (task for task in main._tasks() if task.name == "event log")
    await fill(db, "signals", [0, 0, 0])
    assert await task.run(db) == "signals: 2 entries"
    async with db.connection() as conn:
        await conn.execute("DELETE FROM retention_policies")
    assert await task.run(db) == "kept without end"
