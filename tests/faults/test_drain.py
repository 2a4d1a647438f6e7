"""A server that is told to stop says goodbye, and nothing is lost over it."""

import asyncio

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import SYMBOLS, Desk, Feed, Reader, Server, stream, subscribe


async def events_to_the_end(server: Server) -> list[pb.StreamEvent]:
    """Read a stream that the server ends; return its control events."""
    request = pb.SubscribeQuotesRequest(symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS)
    events = []
    async with Client(server.target) as client:
        async for response in client.market_data.SubscribeQuotes(request, timeout=60):
            if response.HasField("event"):
                events.append(response.event)
    return events


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
                events = asyncio.create_task(events_to_the_end(server))
                await desk.pause()
                assert await server.stop() == 0
                goodbye = (await events)[-1].goodbye
                assert goodbye.reason == pb.GOODBYE_REASON_DRAINING
                await server.start()
            await desk.pause()
        await feed.all_durable()
        await by_stream.has_all(feed)
        await by_subscription.has_all(feed)
        await desk.has_recorded(feed)
