"""What becomes of a signal: one change from active, whoever wants it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.log import Logs
from quantplane_server.main import serving
from quantplane_server.signals import queries
from quantplane_server.signals.expiry import Expiry
from quantplane_server.tasks import end
from tests.admin import connected, until
from tests.conftest import both_editions
from tests.signals import (
    at,
    cancel,
    events,
    get,
    happened,
    insert,
    listed,
    page,
    publish,
    refused,
    signal,
    snapshot,
    stored,
    value,
    waiting,
    watch,
)

STATUSES = ("ACTIVE", "EXECUTED", "EXPIRED", "CANCELLED")
ILLEGAL = (grpc.StatusCode.FAILED_PRECONDITION, "ILLEGAL_TRANSITION")
UNKNOWN = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SIGNAL")
NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    """A client of a server without a recorder: nothing expires by itself."""
    async with serving(settings) as target, Client(target) as client:
        yield client


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


async def execute(db: Database, *signal_ids: str) -> list[pb.Signal]:
    async with db.transaction() as conn:
        return await queries.mark_executed(conn, signal_ids)


async def expire(db: Database, settings: Settings, client: Client) -> None:
    """Let what is due expire, and for certain: something else that is due has."""
    (other,) = await publish(client, due())
    bus = Bus(settings.backends()[1], cap_bytes=0)
    expiry = asyncio.create_task(Expiry(db, Logs(db, bus, {})).run())

    async def expired() -> bool:
        signal = await get(client, other.signal_id)
        return signal.status == pb.SIGNAL_STATUS_EXPIRED

    await until(expired)
    await end(expiry)
    await bus.close()


def due() -> pb.Signal:
    return signal(expiration=datetime.now(UTC) - timedelta(seconds=1))


async def become(
    status: str, client: Client, db: Database, settings: Settings
) -> pb.Signal:
    """Return a signal of a status, which is past its expiration."""
    (made,) = await publish(client, due())
    match status:
        case "CANCELLED":
            await cancel(client, made.signal_id)
        case "EXECUTED":
            await execute(db, made.signal_id)
        case "EXPIRED":
            await expire(db, settings, client)
    return await get(client, made.signal_id)


def status_of(signal: pb.Signal) -> str:
    return pb.SignalStatus.Name(signal.status).removeprefix("SIGNAL_STATUS_")


async def of(dsn: str, signal_id: str) -> list[str]:
    """Return the types of a signal's events."""
    return [type for type, key in await happened(dsn) if key == signal_id]


@both_editions
async def test_only_an_active_signal_is_cancelled(
    client: Client, db: Database, settings: Settings, dsn: str
):
    for status in STATUSES:
        before = await become(status, client, db, settings)
        assert status_of(before) == status
        events = await of(dsn, before.signal_id)
        if status in ("EXECUTED", "EXPIRED"):
            metadata = {"status": status, "event": "CANCELLED"}
            call = cancel(client, before.signal_id)
            assert await refused(call) == (*ILLEGAL, metadata)
            assert await get(client, before.signal_id) == before
        else:
            after = await cancel(client, before.signal_id)
            before.status = pb.SIGNAL_STATUS_CANCELLED
            assert after == await get(client, before.signal_id) == before
            events += ["CANCELLED"] if status == "ACTIVE" else []
        assert await of(dsn, before.signal_id) == events


@both_editions
async def test_only_an_active_signal_is_executed(
    client: Client, db: Database, settings: Settings
):
    signals = [await become(s, client, db, settings) for s in reversed(STATUSES)]
    executed = await execute(db, *(signal.signal_id for signal in signals))
    signals[-1].status = pb.SIGNAL_STATUS_EXECUTED
    assert executed == signals[-1:]
    assert [await get(client, signal.signal_id) for signal in signals] == signals


@both_editions
async def test_only_an_active_signal_expires(
    client: Client, db: Database, settings: Settings, dsn: str
):
    signals = [await become(s, client, db, settings) for s in reversed(STATUSES)]
    before = [await of(dsn, signal.signal_id) for signal in signals]
    await expire(db, settings, client)
    signals[-1].status = pb.SIGNAL_STATUS_EXPIRED
    assert [await get(client, signal.signal_id) for signal in signals] == signals
    before[-1].append("EXPIRED")
    assert [await of(dsn, signal.signal_id) for signal in signals] == before


async def test_a_signal_that_is_cancelled_tells_so_with_the_trace_of_the_call(
    client: Client,
):
    (published,) = await publish(client, signal())
    responses = watch(client)
    await snapshot(responses)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    await client.signal.CancelSignal(
        pb.CancelSignalRequest(signal_id=published.signal_id),
        metadata=[("traceparent", f"00-{trace}-00f067aa0ba902b7-01")],
    )
    (event,) = await events(responses, 1)
    assert (event.type, event.trace_id) == (pb.SIGNAL_EVENT_TYPE_CANCELLED, trace)
    assert event.signal == await get(client, published.signal_id)
    assert event.signal.trace_id == ""


@both_editions
@pytest.mark.parametrize("repeat", range(2))
async def test_of_a_cancel_and_an_execution_at_once_one_wins(
    client: Client, db: Database, dsn: str, repeat: int
):
    (made,) = await publish(client, signal())
    actions: list[Callable[[], Awaitable[object]]] = [
        lambda: cancel(client, made.signal_id),
        lambda: execute(db, made.signal_id),
    ]
    async with connected(dsn) as watcher, db.transaction() as holder:
        await queries.find(holder, [made.signal_id], lock=True)
        calls = []
        for action in actions if repeat else reversed(actions):
            calls.append(asyncio.ensure_future(action()))
            await waiting(watcher, len(calls))
    first, second = await asyncio.gather(*calls, return_exceptions=True)
    after = await get(client, made.signal_id)
    if repeat:
        assert first == after
        assert second == []
        assert after.status == pb.SIGNAL_STATUS_CANCELLED
    else:
        assert first == [after]
        assert isinstance(second, grpc.aio.AioRpcError)
        assert after.status == pb.SIGNAL_STATUS_EXECUTED


async def test_what_was_never_published_is_unknown(client: Client, db: Database):
    expected = (*UNKNOWN, {"signal_id": NOBODY})
    assert await refused(get(client, NOBODY)) == expected
    assert await refused(cancel(client, NOBODY)) == expected
    assert await execute(db, NOBODY) == []
    async with db.connection() as conn:
        assert await queries.find(conn, []) == {}


async def test_an_id_that_is_none_is_refused(client: Client):
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", {})
    for id in ("", "x", NOBODY.replace("-", ""), NOBODY.replace("0", "A")):
        assert await refused(get(client, id)) == invalid
        assert await refused(cancel(client, id)) == invalid


# --- What others have stored --------------------------------------------------------


@both_editions
async def test_a_signal_of_plain_sql_is_like_any_other(client: Client, dsn: str):
    id = await insert(
        dsn, target_price="7", expiration="'2030-01-01'", metadata="'{\"a\": [1.5]}'"
    )
    expected = stored(signal(signal_id=id), target_price=7, metadata={"a": [1.5]})
    expected.expiration.FromJsonString("2030-01-01T00:00:00Z")
    assert await get(client, id) == expected
    assert await listed(client) == [expected]
    assert list((await snapshot(watch(client))).signals) == [expected]
    again = publish(client, signal(signal_id=id))
    code, reason, _ = await refused(again)
    assert (code, reason) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "IDEMPOTENCY_KEY_REUSED",
    )
    expected.status = pb.SIGNAL_STATUS_CANCELLED
    assert await cancel(client, id) == expected
    assert await listed(client) == [expected]
    assert await happened(dsn) == [("CANCELLED", id)]


@pytest.mark.parametrize(
    "metadata",
    ["[1]", "1", "null", '{"a":' * 17 + "1" + "}" * 17, "[" * 5000 + "]" * 5000],
)
async def test_metadata_that_the_wire_cannot_hold_is_left_out(
    client: Client, dsn: str, metadata: str
):
    id = await insert(dsn, metadata=f"'{metadata}'")
    assert await get(client, id) == stored(signal(signal_id=id))


async def test_numbers_that_no_double_can_hold_are_infinite(client: Client, dsn: str):
    id = await insert(dsn, metadata='\'{"a": 1e999, "b": -1e999}\'')
    metadata = (await get(client, id)).metadata
    assert dict(metadata.items()) == {"a": float("inf"), "b": float("-inf")}


async def test_a_signal_without_a_status_is_no_active_one(client: Client, dsn: str):
    id = await insert(dsn, status="NULL")
    assert status_of(await get(client, id)) == "UNSPECIFIED"
    assert (await page(client, statuses=[pb.SIGNAL_STATUS_ACTIVE])).signals == []
    metadata = {"status": "UNSPECIFIED", "event": "CANCELLED"}
    assert await refused(cancel(client, id)) == (*ILLEGAL, metadata)
    assert await value(dsn, "SELECT status FROM signals") is None
    assert (await get(client, id)).time.ToDatetime(UTC) == at(0)
