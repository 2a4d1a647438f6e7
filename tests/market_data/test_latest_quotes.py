"""LatestQuotes, which portfolios and risk limits look at again and again."""

from collections.abc import AsyncIterator
from datetime import UTC

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.market_data import latest, queries
from quantplane_server.market_data.latest import LatestQuotes
from tests.market_data import quote


@pytest.fixture
async def latest_quotes(
    settings: Settings, db: Database
) -> AsyncIterator[LatestQuotes]:
    bus = Bus(settings.redis_url or "", cap_bytes=1)
    yield LatestQuotes(bus, db)
    await bus.close()


async def publish(client: Client, *quotes: pb.Quote) -> None:
    async with client.publish_quotes() as publisher:
        await publisher.send(quotes)
        await publisher.durable()


async def store_bar(db: Database, symbol: str) -> None:
    bar = pb.Bar(symbol=symbol, time=quote(symbol, 1).time, close=7)
    async with db.transaction() as conn:
        await queries.store_bars(conn, [bar])


async def test_the_first_quote_of_a_symbol_is_seen_at_once(
    client: Client, latest_quotes: LatestQuotes
):
    assert await latest_quotes(["A"]) == {}
    await publish(client, quote("A", 1))
    assert await latest_quotes(["A"]) == {"A": quote("A", 1)}


async def test_the_database_is_not_asked_again_and_again_about_what_it_does_not_know(
    db: Database, latest_quotes: LatestQuotes, monkeypatch: pytest.MonkeyPatch
):
    assert await latest_quotes(["A"]) == {}
    await store_bar(db, "A")
    assert await latest_quotes(["A"]) == {}
    as_of = quote("A", 1).time.ToDatetime(tzinfo=UTC)
    assert set(await latest_quotes(["A"], as_of)) == {"A"}
    monkeypatch.setattr(latest, "ABSENT_S", 0)
    assert set(await latest_quotes(["A"])) == {"A"}


async def test_what_is_remembered_as_unknown_is_bounded(
    latest_quotes: LatestQuotes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(latest, "MAX_ABSENT", 2)
    for symbol in "ABC":
        await latest_quotes([symbol])
    assert len(latest_quotes._absent) == 1
