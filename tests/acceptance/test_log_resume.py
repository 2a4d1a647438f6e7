"""A follower of signals goes away, and comes back: to the rest, or to a gap."""

import uuid
from collections.abc import AsyncIterator

import asyncpg

from quantplane import Client
from quantplane import v1 as pb
from quantplane.follow import Follower
from tests.conftest import Server
from tests.market_data import kind, until

BATCH = 1_000
AWAY = 10 * BATCH  # events
SYMBOL, OTHER = "WANTED", "OTHER"


async def publish(client: Client, count: int, symbol: str = SYMBOL) -> list[str]:
    """Publish signals; return their ids."""
    ids = [str(uuid.uuid4()) for _ in range(count)]
    for start in range(0, count, BATCH):
        signals = [signal(id, symbol) for id in ids[start : start + BATCH]]
        await client.signal.PublishSignals(pb.PublishSignalsRequest(signals=signals))
    return ids


def signal(id: str, symbol: str) -> pb.Signal:
    made = pb.Signal(signal_id=id, strategy_id="s", symbol=symbol)
    made.time.GetCurrentTime()
    made.signal_type = pb.SIGNAL_TYPE_LONG
    made.strength = made.confidence = 1
    return made


def follow(client: Client, token: bytes = b"") -> Follower[pb.WatchSignalsResponse]:
    request = pb.WatchSignalsRequest(resume_token=token)
    request.filter.symbols.append(SYMBOL)
    return client.follow(client.signal.WatchSignals, request)


async def events(
    follower: AsyncIterator[pb.WatchSignalsResponse], count: int
) -> tuple[list[pb.SignalEvent], bytes]:
    """Return the next events, and the token that goes on behind them."""
    found: list[pb.SignalEvent] = []
    while len(found) < count:
        response = await until(follower, "data")
        found += response.events
    return found, response.resume_token


async def left(client: Client) -> tuple[list[str], bytes]:
    """Follow for a while; return what was published meanwhile, and the token."""
    async with follow(client) as follower:
        await until(follower, "snapshot_complete")
        ids = await publish(client, 5)
        found, token = await events(follower, 5)
        assert [event.signal.signal_id for event in found] == ids
        return ids, token


async def test_after_ten_thousand_events_a_follower_gets_exactly_the_rest(
    client: Client,
):
    _, token = await left(client)
    ids = await publish(client, AWAY)
    await publish(client, BATCH, OTHER)
    async with follow(client, token) as follower:
        found, _ = await events(follower, AWAY)
        assert [event.signal.signal_id for event in found] == ids
        first = found[0].revision
        assert [event.revision for event in found] == list(range(first, first + AWAY))
        (last,) = await publish(client, 1)
        ((event,), _) = await events(follower, 1)
        assert event.signal.signal_id == last
        assert event.revision == first + AWAY + BATCH
        assert follower.gaps == follower.reconnects == 0


async def test_behind_what_is_kept_a_follower_gets_a_gap_and_what_is_active(
    client: Client, server: Server
):
    before, token = await left(client)
    during = await publish(client, 20)
    connection = await asyncpg.connect(server.settings.postgres_dsn)
    await connection.execute("DELETE FROM event_log WHERE revision < 20")
    await connection.close()
    async with follow(client, token) as follower:
        gap = await anext(follower)
        assert gap.event.gap.cause == pb.GAP_CAUSE_COMPACTED
        assert kind(await anext(follower)) == "subscribed"
        snapshot = await anext(follower)
        assert {s.signal_id for s in snapshot.signals} == {*before, *during}
        assert kind(await anext(follower)) == "snapshot_complete"
        (last,) = await publish(client, 1)
        ((event,), _) = await events(follower, 1)
        assert event.signal.signal_id == last
        assert follower.gaps == 1
