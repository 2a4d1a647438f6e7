"""A server that is told to stop says goodbye, and nothing is lost over it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import SYMBOLS, Desk, Feed, Reader, stream, subscribe

ALL = pb.SubscribeQuotesRequest(symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS)


async def last_event(responses: AsyncIterator[Any]) -> pb.StreamEvent:
    """Read a stream until the server ends it; return its last control event."""
    events = [r.event async for r in responses if r.HasField("event")]
    return events[-1]


async def test_a_server_told_to_stop_says_goodbye_and_loses_nothing(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as by_stream,
        Reader(subscribe(client)) as by_subscription,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            for _ in range(2):
                await desk.pause()
                call = client.market_data.SubscribeQuotes(ALL, wait_for_ready=True)
                responses = aiter(call)
                await anext(responses)
                last = asyncio.create_task(last_event(responses))
                await desk.pause()
                assert await server.stop() == 0
                goodbye = (await last).goodbye
                assert goodbye.reason == pb.GOODBYE_REASON_DRAINING
                await server.start()
            await desk.pause()
        await feed.all_durable()
        await by_stream.has_all(feed)
        await by_subscription.has_all(feed)
        await desk.has_recorded(feed)
