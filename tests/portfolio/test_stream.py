"""WatchPortfolio, over the wire."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane_server.bus import Bus
from tests.conftest import both_editions
from tests.market_data import kind, quote, until
from tests.portfolio import Desk, fill

LONG_S = 60.0


def watch(
    client: Client, interval_s: float = LONG_S, **fields: Any
) -> AsyncIterator[pb.WatchPortfolioResponse]:
    request = pb.WatchPortfolioRequest(**fields)
    request.interval.FromMilliseconds(int(interval_s * 1_000))
    return aiter(client.portfolio.WatchPortfolio(request))


async def snapshot(responses: AsyncIterator[Any]) -> pb.WatchPortfolioResponse:
    """Return all that comes before SnapshotComplete, and its token."""
    merged = pb.WatchPortfolioResponse()
    async for response in responses:
        merged.MergeFrom(response)
        if kind(response) == "snapshot_complete":
            return merged
    raise AssertionError("the stream ended before SnapshotComplete")


async def announce(redis_url: str) -> None:
    """Say that executions were booked."""
    bus = Bus(redis_url, cap_bytes=1)
    await bus.announce_changes(["portfolio"])
    await bus.close()


@both_editions
async def test_a_watcher_gets_the_portfolio_then_what_fills_change(
    client: Client, desk: Desk, redis_url: str
):
    await desk.book(fill("A", 1, 100), fill("B", 1, 10))
    responses = watch(client)
    first = await snapshot(responses)
    assert [position.symbol for position in first.positions] == ["A", "B"]
    assert first.summary.n_positions == 2
    await desk.book(fill("B", 1, 20))
    await announce(redis_url)
    async with asyncio.timeout(LONG_S / 2):  # before the quotes are looked at
        response = await until(responses, "data")
    (changed,) = response.positions
    assert (changed.symbol, changed.quantity, changed.average_cost) == ("B", 2, 15)
    assert response.summary.cash == 1e6 - 130


async def test_a_watcher_gets_what_quotes_change_at_the_interval(
    client: Client, desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("quantplane_server.watch.REFRESH_S", 3600.0)
    await desk.book(fill("A", 1, 100), fill("B", 1, 10))
    responses = watch(client, interval_s=0.1)
    await snapshot(responses)
    async with client.publish_quotes() as publisher:
        for bid in (50, 60):
            await publisher.send([quote("A", bid, bid=bid, ask=bid)])
            response = await until(responses, "data")
            assert [(p.symbol, p.mark) for p in response.positions] == [("A", bid)]
            assert response.summary.positions_value == bid + 10


async def test_a_strategy_is_watched_by_itself(
    client: Client, desk: Desk, redis_url: str
):
    responses = watch(client, strategy_id="a")
    assert not (await snapshot(responses)).positions
    await desk.book(fill("A", 1, 1, strategy_id="b"), fill("B", 1, 1, strategy_id="a"))
    await announce(redis_url)
    response = await until(responses, "data")
    assert [position.symbol for position in response.positions] == ["B"]
    assert response.summary.cash == -1


async def test_who_comes_back_gets_a_snapshot_only_if_something_changed(
    client: Client, desk: Desk
):
    await desk.book(fill("A", 1, 100))
    token = (await snapshot(watch(client))).resume_token
    again = await snapshot(watch(client, resume_token=token))
    assert not again.HasField("summary")
    assert again.resume_token == token
    await desk.book(fill("A", 1, 100))
    again = await snapshot(watch(client, resume_token=token))
    assert (again.summary.n_positions, again.positions[0].quantity) == (1, 2)


async def test_a_token_of_another_strategy_is_refused(client: Client):
    token = (await snapshot(watch(client, strategy_id="a"))).resume_token
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await snapshot(watch(client, strategy_id="b", resume_token=token))
    assert reason_of(raised.value) == "INVALID_RESUME_TOKEN"
