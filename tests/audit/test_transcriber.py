"""What happens to orders and signals is in the audit log, each event once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane.tables.values import plain
from quantplane_server.audit import queries, transcriber
from quantplane_server.audit.events import MAKE
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.identity.queries import usernames
from quantplane_server.log import START, Event, Position, append
from quantplane_server.main import recording, serving
from tests.admin import execute, until, value
from tests.audit import entered, listed, revisions, rows, transcribing
from tests.conftest import Server, both_editions
from tests.identity.callers import people_of
from tests.logs import forget, set_back, write
from tests.orders import cancel, fill, open_order, refused, report, submit
from tests.postgres import database
from tests.signals import cancel as cancel_signal
from tests.signals import publish, signal

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = {"metadata": (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)}


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(transcriber, "POLL_S", 0.01)


def numbers(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


# --- What is entered ------------------------------------------------------------------


@both_editions
async def test_the_life_of_an_order_can_be_read(client: Client, dsn: str, hurry: None):
    order = await open_order(client, price=101.5)
    await fill(client, order, 4, 101.25, broker_exec_id="x-1", commission=0.5)
    await cancel(client, order)
    await report(client, order, "CANCELLED", code="C1", text="as asked")
    await entered(dsn, 5, "orders")
    found = await rows(dsn)
    assert {(row.type, row.id) for row in found} == {("order", order.order_id)}
    actions = "CREATED ACKNOWLEDGED TRADE CANCEL_REQUESTED CANCELLED".split()
    assert [row.action for row in found] == actions
    assert [row.new["version"] for row in found] == [1, 2, 3, 4, 5]
    statuses = "PENDING OPEN OPEN OPEN CANCELLED".split()
    assert [row.new["status"] for row in found] == statuses
    created, _, trade, asked, cancelled = (row.new for row in found)
    terms = {"symbol": "A", "side": "BUY", "order_type": "LIMIT", "quantity": 10,
             "price": 101.5, "time_in_force": "DAY", "strategy_id": "s"}  # fmt: skip
    assert terms.items() <= created.items()
    assert (trade["filled_quantity"], trade["avg_fill_price"]) == (4, 101.25)
    execution = {"quantity": 4, "price": 101.25, "commission": 0.5,
                 "broker_exec_id": "x-1"}  # fmt: skip
    assert execution.items() <= trade["execution"].items()
    assert asked["pending_request"] == "CANCEL"
    assert (cancelled["code"], cancelled["text"]) == ("C1", "as asked")


async def test_a_refusal_is_entered_with_its_reason(
    client: Client, db: Database, dsn: str, hurry: None
):
    await execute(
        db,
        """
        INSERT INTO strategies (strategy_id, name, type, created_by, risk_limits)
        VALUES ('s', 's', 't', 'u', '{"max_order_quantity": 5}')
        """,
    )
    await refused(submit(client, quantity=6))
    await entered(dsn, 1, "orders")
    (row,) = await rows(dsn)
    assert (row.action, row.new["status"]) == ("DENIED", "REJECTED")
    assert row.new["code"] == "RISK_MAX_ORDER_QUANTITY"
    assert row.new["text"]


async def test_an_event_names_the_user_and_the_key_that_caused_it(
    server: Server, dsn: str, hurry: None
):
    async with people_of(dsn) as people:
        user_id = await people.user("eve/4", "admin")  # names may have slashes
        ((_, shown),) = await people.key("admin", user_id=user_id)
        found = "SELECT key_id::text FROM api_keys WHERE user_id = $1"
        key_id = await people.conn.fetchval(found, user_id)
        async with Client(server.target, token=shown.split()[1]) as client:
            order = await open_order(client)
            await fill(client, order, 10)
            (published,) = await publish(client, signal())
            await cancel_signal(client, published.signal_id)
        await entered(dsn, 3, "orders")
        await entered(dsn, 2)
        known = "SELECT DISTINCT user_id::text, key_id::text FROM audit_logs"
        assert [tuple(row) for row in await people.conn.fetch(known)] == [
            (user_id, key_id)
        ]


async def test_of_what_nobody_asked_for_an_event_names_the_server(
    client: Client, dsn: str, hurry: None
):
    (published,) = await publish(client, signal())
    order = await open_order(client, signal_id=published.signal_id)
    await fill(client, order, 10)
    await entered(dsn, 2)
    executed = (await listed(client, actions=["EXECUTED"]))[0]
    assert (executed.username, executed.key_id) == ("", "")
    assert plain(executed.new_value)["actor"] == "server"


async def test_what_becomes_of_a_signal_is_entered(
    client: Client, dsn: str, hurry: None
):
    (published,) = await publish(client, signal(metadata={"large": "x" * 1_000}))
    await cancel_signal(client, published.signal_id)
    await entered(dsn, 2)
    made, cancelled = await rows(dsn)
    assert (made.action, cancelled.action) == ("PUBLISHED", "CANCELLED")
    assert made[1:3] == cancelled[1:3] == ("signal", published.signal_id)
    expected = {"revision": 1, "time": "2024-01-01T00:00:00Z", "strategy_id": "s",
                "symbol": "A", "signal_type": "LONG", "strength": 0.5,
                "confidence": 0.25, "status": "ACTIVE"}  # fmt: skip
    assert made.new.pop("actor") == cancelled.new.pop("actor")
    assert made.new == expected
    assert cancelled.new == expected | {"revision": 2, "status": "CANCELLED"}


async def test_an_entry_has_the_time_and_the_trace_of_its_event(
    client: Client, db: Database, dsn: str, hurry: None
):
    await publish(client, signal(), **TRACED)
    await entered(dsn, 1)
    payload = await value(db, "SELECT payload FROM event_log")
    told = pb.SignalEvent.FromString(payload)
    (entry,) = (await client.audit.ListAuditLogs(pb.ListAuditLogsRequest())).audit_logs
    assert entry.trace_id == told.trace_id == TRACE
    assert entry.time.ToMicroseconds() == told.time.ToMicroseconds()


def test_an_event_of_a_newer_server_is_entered_by_its_number():
    payload = pb.SignalEvent(type=99).SerializeToString()
    assert MAKE["signals"](payload, 7).entry.action == "99"


def test_there_is_an_entry_for_each_type_of_event():
    for kind in pb.OrderEventType.values():
        payload = pb.OrderEvent(type=kind).SerializeToString()
        name = pb.OrderEventType.Name(kind).removeprefix("ORDER_EVENT_TYPE_")
        assert MAKE["orders"](payload, 1).entry.action == name


# --- Each once ------------------------------------------------------------------------


async def test_what_is_in_the_log_already_is_entered_from_its_beginning(
    db: Database, dsn: str
):
    await write(db, range(2_500))
    async with transcribing(dsn):
        await entered(dsn, 2_500)
    assert await revisions(dsn) == numbers(1, 2_500)


async def test_several_processes_enter_each_event_once(
    db: Database, dsn: str, hurry: None
):
    async with transcribing(dsn, processes=4):
        for first in range(0, 4_000, 200):
            await write(db, range(first, first + 200))
        await entered(dsn, 4_000)
    assert await revisions(dsn) == numbers(1, 4_000)


async def test_a_position_moves_only_from_where_it_was(db: Database):
    one, two = Position(5, b"a" * 8), Position(7, b"b" * 8)
    async with db.connection() as conn:
        assert await queries.move(conn, "signals", START, one)
        assert not await queries.move(conn, "signals", START, two)
        assert not await queries.move(conn, "signals", Position(5, b"c" * 8), two)
        assert await queries.position(conn, "signals") == one
        assert await queries.move(conn, "signals", one, two)
        assert await queries.position(conn, "signals") == two
        assert await queries.position(conn, "orders") == START


async def test_who_comes_too_late_leaves_a_page_to_who_came_first(
    db: Database, dsn: str
):
    await write(db, range(10))
    one, other = (
        transcriber.Transcriber(db, db, usernames, "signals") for _ in range(2)
    )
    async with db.transaction() as conn:  # the row is moved by both from its beginning
        await conn.execute("LOCK TABLE audit_positions IN SHARE MODE")
        both = asyncio.gather(one._enter_page(), other._enter_page())
        query = """
            SELECT count(*) = 2 FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'
        """
        await until(lambda: value(db, query))
    await both
    assert await revisions(dsn) == numbers(1, 10)


async def test_a_page_is_entered_whole_or_not_at_all(
    db: Database, dsn: str, hurry: None, caplog: pytest.LogCaptureFixture
):
    await write(db, range(10))
    await execute(
        db,
        "CREATE SEQUENCE tries",
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM nextval('tries'); RAISE 'refused'; END $$
        """,
        """
        CREATE TRIGGER refuse BEFORE INSERT ON audit_logs FOR EACH ROW
           WHEN (new.new_value->>'revision' = '7') EXECUTE FUNCTION refuse()
        """,
    )
    async with transcribing(dsn):
        await until(lambda: value(db, "SELECT last_value >= 5 FROM tries"))
        assert await revisions(dsn) == []
        await execute(db, "DROP TRIGGER refuse ON audit_logs")
        await entered(dsn, 10)
    assert await revisions(dsn) == numbers(1, 10)
    # And the failure was told once.
    assert sum("audit log" in text for text in caplog.messages) == 1


async def test_it_goes_on_when_its_connections_are_cut(
    db: Database, dsn: str, hurry: None
):
    async with transcribing(dsn):
        await write(db, range(10))
        await entered(dsn, 10)
        cut = """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()
        """
        await execute(db, cut)
        await write(db, range(10, 20))
        await entered(dsn, 20)
    assert await revisions(dsn) == numbers(1, 20)


async def test_two_logs_do_not_wait_for_each_other(
    db: Database, dsn: str, hurry: None, caplog: pytest.LogCaptureFixture
):
    async with db.transaction() as conn:
        await append(conn, "orders", [Event("CREATED", "a", b"\xff")])  # no message
    await write(db, range(3))
    async with transcribing(dsn):
        await entered(dsn, 3)
    assert await revisions(dsn) == [1, 2, 3]


async def test_the_audit_log_may_be_in_a_database_of_its_own(
    settings: Settings, edition: str, dsn: str, hurry: None
):
    async with database(edition) as reference:
        settings = settings.model_copy(update={"reference_dsn": reference})
        async with recording(settings), serving(settings) as target:
            async with Client(target) as client:
                await publish(client, *(signal() for _ in range(5)))
                await entered(reference, 5)
                listed = await client.audit.ListAuditLogs(pb.ListAuditLogsRequest())
                assert len(listed.audit_logs) == 5
        assert await revisions(reference) == numbers(1, 5)
    assert await revisions(dsn) == []


# --- Gaps -----------------------------------------------------------------------------


def gap(cause: str, through: int, start: int) -> dict[str, Any]:
    return {"cause": cause, "entered_through": through, "goes_on_from": start}


async def test_what_was_trimmed_before_it_was_entered_is_told(
    db: Database, dsn: str, hurry: None, caplog: pytest.LogCaptureFixture
):
    await write(db, range(10))
    async with transcribing(dsn):
        await entered(dsn, 10)
    await write(db, range(10, 30))
    await forget(db, 21)
    async with transcribing(dsn):
        await entered(dsn, 30)
    told = await rows(dsn, "log")
    assert told == [("gap", "log", "signals", gap("COMPACTED", 10, 21))]
    assert await revisions(dsn) == numbers(1, 10) + numbers(21, 30)
    assert sum("gap" in text for text in caplog.messages) == 1


async def test_a_log_that_was_trimmed_before_the_first_start_has_a_gap(
    db: Database, dsn: str
):
    await write(db, range(10))
    await forget(db, 5)
    async with transcribing(dsn):
        await entered(dsn, 10)
    assert [row.new for row in await rows(dsn, "log")] == [gap("COMPACTED", 0, 5)]
    assert await revisions(dsn) == numbers(5, 10)


@pytest.mark.parametrize("more", [0, 5, 50])
async def test_a_log_that_was_restored_is_told_and_entered_without_doubles(
    db: Database, dsn: str, hurry: None, more: int
):
    await write(db, range(30))
    async with transcribing(dsn):
        await entered(dsn, 30)
    await set_back(db, 20)
    if more:
        await write(db, range(100, 100 + more))
    async with transcribing(dsn):
        await until(lambda: rows(dsn, "log"))
        await write(db, [1_000])
        await until(lambda: _has(dsn, "1000"))
    told = [row.new for row in await rows(dsn, "log")]
    assert told == [gap("LOG_RESTORED", 30, 1)]
    expected = numbers(0, 29) + numbers(100, 99 + more) + [1_000]
    assert [int(row.id) for row in await rows(dsn, "signal")] == expected


async def _has(dsn: str, id: str) -> bool:
    return any(row.id == id for row in await rows(dsn, "signal"))


async def test_a_restored_log_that_was_trimmed_has_one_gap(
    db: Database, dsn: str, hurry: None
):
    await write(db, range(30))
    async with transcribing(dsn):
        await entered(dsn, 30)
        await forget(db, 10)
        await set_back(db, 20)
        await until(lambda: rows(dsn, "log"))
        await write(db, [1_000])
        await until(lambda: _has(dsn, "1000"))
    told = [row.new for row in await rows(dsn, "log")]
    assert told == [gap("LOG_RESTORED", 30, 10)]
    assert await revisions(dsn) == [*numbers(1, 30), 21]


async def test_a_hole_in_a_log_is_told_once(db: Database, dsn: str, hurry: None):
    await write(db, range(4))
    async with transcribing(dsn):
        await entered(dsn, 4)
    await write(db, range(4, 10))
    await execute(db, "DELETE FROM event_log WHERE revision IN (5, 6)")
    async with transcribing(dsn):
        await entered(dsn, 10)
    assert [row.new for row in await rows(dsn, "log")] == [gap("COMPACTED", 4, 7)]
    assert await revisions(dsn) == numbers(1, 4) + numbers(7, 10)


async def test_a_log_that_is_empty_after_a_restore_is_entered_from_its_beginning(
    db: Database, dsn: str, hurry: None
):
    await write(db, range(10))
    async with transcribing(dsn):
        await entered(dsn, 10)
        await execute(db, "TRUNCATE event_log, log_head")
        await until(lambda: rows(dsn, "log"))
        await write(db, [77])
        await until(lambda: _has(dsn, "77"))
    assert [row.new for row in await rows(dsn, "log")] == [gap("LOG_RESTORED", 10, 1)]


async def test_a_long_log_is_entered_page_by_page(
    db: Database, dsn: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transcriber, "POLL_S", 3_600)
    await write(db, range(60), size=20_000)  # a dozen of which fill a page
    await write(db, range(60, 3_000))
    async with transcribing(dsn):
        await entered(dsn, 3_000)
    assert await revisions(dsn) == numbers(1, 3_000)
