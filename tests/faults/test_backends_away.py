"""What goes on while a backend is away."""

import asyncio

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import Desk, Feed, Reader, stream, until

AWAY_S = 10


async def test_publishing_and_streaming_go_on_while_postgresql_is_away(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: publisher.durable_through > 0, "it is recorded")
            await desk.postgres.kill()
            await until(lambda: feed.accepted > 0, "it is accepted")
            durable = publisher.durable_through
            for second in range(AWAY_S):
                accepted, read = feed.accepted, reader.count
                await asyncio.sleep(1)
                assert feed.accepted > accepted, f"publishing stops in second {second}"
                assert reader.count > read, f"streaming stops in second {second}"
                if second == 0:  # what was committed before may be told after
                    durable = publisher.durable_through
                assert publisher.durable_through == durable
            assert publisher.hold == pb.HOLD_REASON_UNSPECIFIED
            await desk.postgres.start()
            await until(lambda: publisher.durable_through > durable, "it is recorded")
        await feed.all_durable()
        await reader.has_all(feed)
        await desk.has_recorded(feed)


async def test_a_feed_is_held_back_while_the_bus_is_full_and_loses_nothing(desk: Desk):
    async with (
        desk.server(cap_mb=1) as server,  # over all shards
        Client(server.target) as client,
        Reader(stream(client)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        await feed.send(1_000)
        await feed.all_durable()
        await desk.postgres.kill()
        sending = asyncio.create_task(feed.send(100_000, batch=100))
        await until(lambda: publisher.hold == pb.HOLD_REASON_BUS_FULL, "it is held")
        accepted = publisher.accepted_through
        await asyncio.sleep(1)
        assert publisher.accepted_through == accepted
        assert publisher.hold == pb.HOLD_REASON_BUS_FULL
        assert reader.count >= feed.accepted
        assert not sending.done()
        await desk.postgres.start()
        await sending
        await feed.all_durable()
        assert publisher.hold == pb.HOLD_REASON_UNSPECIFIED
        await reader.has_all(feed)
        await desk.has_recorded(feed)


async def test_a_feed_is_told_that_the_bus_is_away(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: feed.accepted > 0, "it is accepted")
            await desk.valkey.kill()
            await until(
                lambda: publisher.hold == pb.HOLD_REASON_BUS_UNAVAILABLE, "it is held"
            )
            await desk.valkey.start()
            await until(
                lambda: publisher.hold == pb.HOLD_REASON_UNSPECIFIED, "it goes on"
            )
        await feed.all_durable()
        await reader.has_all(feed)
