"""Valkey starts again without the last of what it answered: no one is in silence."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
import redis.asyncio as redis

from quantplane import Client, metadata_of, reason_of
from quantplane import v1 as pb
from quantplane.follow import Follower
from tests.faults import (
    PATIENCE_S,
    SYMBOLS,
    Desk,
    Feed,
    Reader,
    numbers_through,
    stream,
    subscribe,
    until,
)
from tests.faults.test_lost_bus import ReaderWithGaps

Follow = Callable[..., Follower[Any]]
MINE, OTHERS = SYMBOLS[:12], SYMBOLS[12:]


@asynccontextmanager
async def losing(desk: Desk) -> AsyncIterator[None]:
    """Run the block, then kill Valkey and start it with what its disk had before."""
    async with redis.Redis.from_url(
        desk.valkey.address, single_connection_client=True
    ) as client:
        await client.set("before", "the block")
        await client.execute_command("WAITAOF", 1, 0, int(PATIENCE_S * 1000))
    data = desk.valkey.data
    with TemporaryDirectory(dir=data.parent) as kept:
        shutil.copytree(data, kept, dirs_exist_ok=True)
        yield
        await desk.valkey.kill()
        shutil.rmtree(data)
        shutil.copytree(kept, data)
    await desk.valkey.start()


@pytest.mark.parametrize("delivery", [pb.DELIVERY_LOSSLESS, pb.DELIVERY_LATEST])
@pytest.mark.parametrize("follow", [stream, subscribe])
async def test_a_reader_that_had_seen_what_is_lost_gets_a_gap(
    desk: Desk, follow: Follow, delivery: "pb.Delivery.ValueType"
):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        ReaderWithGaps(follow(client, delivery)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        await feed.send(1_000)
        await feed.all_accepted()
        with server.without_recorder():
            async with losing(desk):
                await feed.send(1_000)
                await until(lambda: reader.newest == feed.sent, "what will be lost")
        await feed.send(5_000)
        await until(lambda: reader.gaps, "the gap")
        await until(lambda: reader.newest == feed.sent, "the last quote")
        causes = {gap.cause for gap in reader.gaps}
        assert causes == {pb.GAP_CAUSE_BUS_REBUILT}
        expected = numbers_through(feed.sent)
        for symbol, numbers in reader.after_gap.items():
            few = len(numbers) if delivery == pb.DELIVERY_LOSSLESS else 1
            assert numbers[-few:] == expected[symbol][-few:]


async def test_a_reader_that_had_seen_nothing_of_what_is_lost_gets_no_gap(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client, symbols=MINE)) as reader,
        client.publish_quotes("mine") as publisher,
        client.publish_quotes("others") as others,
    ):
        feed = Feed(publisher, MINE)
        await feed.send(1_000)
        await feed.all_accepted()
        await until(lambda: reader.count == feed.sent, "what there is")
        with server.without_recorder():
            async with losing(desk):
                other = Feed(others, OTHERS)
                await other.send(1_000)
                await other.all_accepted()
        await feed.send(1_000)
        await feed.all_accepted()
        await reader.has_all(feed)


@pytest.mark.parametrize(
    ("seen", "recorded", "cause"),
    [
        pytest.param(False, False, None, id="the feed sends again what it lacks"),
        pytest.param(True, False, "BUS_REBUILT", id="what it had is sent again"),
        pytest.param(False, True, "COMPACTED", id="the database has what it lacks"),
        pytest.param(True, True, None, id="it has all that the database has"),
    ],
)
async def test_a_token_resumes_where_nothing_is_missed_or_doubled_else_it_is_refused(
    desk: Desk, seen: bool, recorded: bool, cause: str | None
):
    """Positions have grown past that of the token when its reader comes back."""
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        await feed.send(1_000)
        await feed.all_accepted()
        token, through = await read_through(client, feed)
        with nullcontext() if recorded else server.without_recorder():
            async with losing(desk):
                await feed.send(100, batch=10)
                await (feed.all_durable() if recorded else feed.all_accepted())
                if seen:
                    token, through = await read_through(client, feed)
        await feed.send(5_000, batch=10)
        await feed.all_accepted()
        request = pb.SubscribeQuotesRequest(
            symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS, resume_token=token
        )
        call = client.market_data.SubscribeQuotes(request)
        if cause:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for response in call:
                    assert not response.quotes
            assert reason_of(refused.value) == "COMPACTED"
            assert metadata_of(refused.value)["cause"] == cause
            return
        numbers: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            async for response in call:
                numbers += [int(quote.bid) for quote in response.quotes]
                if len(numbers) >= feed.sent - through:
                    break
        assert sorted(numbers) == [*range(through + 1, feed.sent + 1)]


async def read_through(client: Client, feed: Feed) -> tuple[bytes, int]:
    """Return the token of a reader that has all that was sent, and how much that is."""
    request = pb.SubscribeQuotesRequest(symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS)
    async for response in client.market_data.SubscribeQuotes(request):
        if response.resume_token:
            return response.resume_token, feed.sent
    raise AssertionError("the stream ended first")


async def test_a_feed_sends_again_what_is_lost_and_all_is_recorded_once(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        await feed.send(1_000)
        await feed.all_durable()
        with server.without_recorder():
            async with losing(desk):
                await feed.send(20_000)
                await feed.all_accepted()
        await feed.send(1_000)
        await feed.all_durable()
        await desk.has_recorded(feed)
        assert publisher.lost == 0


async def test_what_the_recorder_had_read_of_what_is_lost_is_recorded_once(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: publisher.durable_through > 20, "it is recorded")
            async with losing(desk):
                await desk.pause()
            await desk.pause()
        await feed.all_durable()
        await desk.has_recorded(feed)
        assert publisher.lost == 0


async def test_what_is_lost_and_not_sent_again_is_never_durable_and_is_told(
    desk: Desk,
):
    """The feed keeps nothing that is accepted, and another one goes on meanwhile."""
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
        client.publish_quotes("other") as other,
    ):
        publisher.MAX_KEPT_BATCHES = 0  # type: ignore[misc]
        feed = Feed(publisher, MINE)
        await feed.send(1_000, batch=100)
        await feed.all_durable()
        with server.without_recorder():
            async with losing(desk):
                await feed.send(1_000, batch=100)
                await feed.all_accepted()
        going_on = Feed(other, OTHERS)
        await going_on.send(10_000, batch=100)
        await going_on.all_durable()
        await until(lambda: publisher.accepted_through == 10, "what is left is told")
        await feed.all_durable()  # or lost
        assert publisher.durable_through == 10
        assert publisher.lost == 10
        assert [row[6] for row in await desk.recorded() if row[0] in MINE] == [
            *range(1, 1_001)
        ]


async def test_another_server_that_starts_makes_no_feed_come_again(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: publisher.durable_through > 0, "it is recorded")
            before = await epochs(desk)
            async with desk.server():
                await desk.pause()
        await feed.all_durable()
        assert await epochs(desk) == before
        assert publisher.reconnects == 0


async def epochs(desk: Desk) -> list[bytes]:
    async with redis.Redis.from_url(desk.valkey.address) as client:
        metas = sorted(await client.keys("*:meta"))
        return [await client.hget(meta, "begun") for meta in metas]
