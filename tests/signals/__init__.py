"""Short ways to say what strategies publish, and what they are told."""

import uuid
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane.errors import metadata_of
from tests.admin import until as eventually
from tests.market_data import kind, until

START = datetime(2024, 1, 1, tzinfo=UTC)
NEVER = datetime(9999, 1, 1, tzinfo=UTC)


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def signal(hour: float = 0, **fields: Any) -> pb.Signal:
    """Return a signal as it is sent, with an id of its own."""
    fields = {
        "signal_id": str(uuid.uuid4()), "strategy_id": "s", "symbol": "A",
        "signal_type": pb.SIGNAL_TYPE_LONG, "strength": 0.5, "confidence": 0.25,
        "time": at(hour),
    } | fields  # fmt: skip
    return pb.Signal(**fields)


def full(hour: float = 0, **fields: Any) -> pb.Signal:
    """Return a signal with all that may be omitted."""
    fields = {
        "target_price": 101.5, "stop_loss": -0.25, "expiration": NEVER,
        "metadata": {"model": "m", "n": 3},
    } | fields  # fmt: skip
    return signal(hour, **fields)


def stored(sent: pb.Signal, **fields: Any) -> pb.Signal:
    """Return what a signal is once it is published."""
    expected = pb.Signal(status=pb.SIGNAL_STATUS_ACTIVE)
    expected.MergeFrom(sent)
    expected.MergeFrom(pb.Signal(**fields))
    return expected


async def publish(
    client: Client, *signals: pb.Signal, **options: Any
) -> list[pb.Signal]:
    request = pb.PublishSignalsRequest(signals=signals)
    return list((await client.signal.PublishSignals(request, **options)).signals)


async def get(client: Client, signal_id: str) -> pb.Signal:
    request = pb.GetSignalRequest(signal_id=signal_id)
    return (await client.signal.GetSignal(request)).signal


async def cancel(client: Client, signal_id: str) -> pb.Signal:
    request = pb.CancelSignalRequest(signal_id=signal_id)
    return (await client.signal.CancelSignal(request)).signal


async def page(client: Client, **fields: Any) -> pb.ListSignalsResponse:
    return await client.signal.ListSignals(pb.ListSignalsRequest(**fields))


async def listed(client: Client, **fields: Any) -> list[pb.Signal]:
    """Return the signals of all pages."""
    response = await page(client, **fields)
    signals = list(response.signals)
    while response.next_page_token:
        fields["page_token"] = response.next_page_token
        response = await page(client, **fields)
        assert response.signals
        signals += response.signals
    return signals


def watch(client: Client, **fields: Any) -> AsyncIterator[pb.WatchSignalsResponse]:
    return aiter(client.signal.WatchSignals(pb.WatchSignalsRequest(**fields)))


async def snapshot(responses: AsyncIterator[Any]) -> pb.WatchSignalsResponse:
    """Return all that comes before SnapshotComplete, and its token."""
    merged = pb.WatchSignalsResponse()
    async for response in responses:
        merged.MergeFrom(response)
        if kind(response) == "snapshot_complete":
            return merged
    raise AssertionError("the stream ended before SnapshotComplete")


async def events(responses: AsyncIterator[Any], count: int) -> list[pb.SignalEvent]:
    """Return the next events, at least `count`."""
    received: list[pb.SignalEvent] = []
    while len(received) < count:
        received += (await until(responses, "data")).events
    return received


def type_of(event: pb.SignalEvent) -> str:
    return pb.SignalEventType.Name(event.type).removeprefix("SIGNAL_EVENT_TYPE_")


def ids(signals: Iterable[pb.Signal]) -> list[str]:
    return [signal.signal_id for signal in signals]


async def insert(dsn: str, **columns: str) -> str:
    """Store a signal by plain SQL; return its id. Columns are SQL expressions."""
    columns = {
        "time": "'2024-01-01'", "strategy_id": "'s'", "symbol": "'A'",
        "signal_type": "'LONG'", "strength": "0.5", "confidence": "0.25",
    } | columns  # fmt: skip
    return str(
        await value(
            dsn,
            f"INSERT INTO signals ({', '.join(columns)})"
            f" VALUES ({', '.join(columns.values())}) RETURNING signal_id",
        )
    )


async def value(dsn: str, query: str, *args: Any) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query, *args)
    finally:
        await connection.close()


async def waiting(watcher: asyncpg.Connection, count: int) -> None:
    """Return once so many sessions wait for a lock."""
    query = """
        SELECT count(*) = $1 FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    await eventually(lambda: watcher.fetchval(query, count))


async def happened(dsn: str) -> list[tuple[str, str]]:
    """Return the type and the signal of each event of the log."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT type, key FROM event_log WHERE log = 'signals' ORDER BY revision"
        )
    finally:
        await connection.close()
    return [(row["type"], row["key"]) for row in rows]


async def refused(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return how a call is refused: code, reason, metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code(), reason_of(error), metadata_of(error)


async def violations(call: Any) -> list[tuple[str, str]]:
    """Return what a call is refused for: fields, and the rules that they break."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return violations_of(raised.value)
