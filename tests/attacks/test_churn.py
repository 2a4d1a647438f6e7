"""Who comes and goes all the time leaves nothing behind."""

import asyncio

import pytest
import redis.asyncio as redis

from quantplane import v1 as pb
from quantplane_server import bus
from quantplane_server.fanout import Fanout
from tests.identity.callers import Channel, Metadata, named

SUBSCRIPTIONS = 60
PATIENCE_S = 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "BLOCK_S", 0.2)


async def test_subscriptions_that_ended_hold_no_connections_to_the_bus(
    calls: Channel, admin: Metadata, redis_url: str
):
    """Though nothing is published, which would wake what still waits for it."""
    async with redis.Redis.from_url(redis_url) as client:

        async def followers() -> int:
            return sum(each["cmd"] == "xread" for each in await client.client_list())

        while not (before := await followers()):  # of what is recorded
            await asyncio.sleep(0.01)
        for number in range(SUBSCRIPTIONS):
            request = pb.SubscribeQuotesRequest(symbols=[f"S{number}"])
            await calls.response(named("SubscribeQuotes"), admin, request)
        async with asyncio.timeout(PATIENCE_S):
            while await followers() > before:
                await asyncio.sleep(0.05)


async def test_a_tail_that_was_replaced_and_goes_on_fails_at_nothing(
    redis_url: str, caplog: pytest.LogCaptureFixture
):
    """Connecting may lose a cancellation; here there is none."""
    own = bus.Bus(redis_url, cap_bytes=1)
    await own.open()
    fanout = Fanout(own)
    await fanout.need({0})
    await asyncio.sleep(0)  # it asks for the heads
    tail, fanout._tail, fanout.heads = fanout._tail, None, {}
    assert tail
    await tail
    await own.close()
    assert caplog.text == ""
