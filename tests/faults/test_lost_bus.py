"""The bus loses its state, or what a reader wants of it: no one is left in silence."""

import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable

import grpc
import pytest
import redis.asyncio as redis

from quantplane import Client, reason_of
from quantplane import v1 as pb
from tests.faults import (
    SYMBOLS,
    Desk,
    Feed,
    Reader,
    numbers_through,
    stream,
    subscribe,
    until,
)

Lose = Callable[[Desk], Awaitable[None]]


async def flush(desk: Desk) -> None:
    async with redis.Redis.from_url(desk.valkey.address) as client:
        await client.flushall()


async def remove_folder(desk: Desk) -> None:
    await desk.valkey.kill()
    shutil.rmtree(desk.valkey.data)
    await desk.valkey.start()


class ReaderWithGaps(Reader):
    """Also keeps the numbers it reads after the last gap."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.after_gap: dict[str, list[int]] = defaultdict(list)

    def take(self, response: pb.StreamQuotesResponse) -> None:
        super().take(response)
        if response.event.HasField("gap"):
            self.after_gap.clear()
        for read in response.quotes:
            self.after_gap[read.symbol].append(int(read.bid))

    @property
    def newest(self) -> int:
        return max((numbers[-1] for numbers in self.after_gap.values()), default=0)


lost = pytest.mark.parametrize("lose", [flush, remove_folder])


@lost
async def test_a_lossless_reader_gets_a_gap_where_the_bus_was_lost(
    desk: Desk, lose: Lose
):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        ReaderWithGaps(stream(client)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            with server.without_recorder():  # which may have all that was read
                await until(lambda: reader.count > 2_000, "some quotes")
                await lose(desk)
            await until(lambda: reader.gaps, "the gap")
            await desk.pause()
        await feed.all_accepted()
        await until(lambda: reader.newest == feed.sent, "the last quote")
        causes = {gap.cause for gap in reader.gaps}
        assert causes <= {pb.GAP_CAUSE_BUS_REBUILT, pb.GAP_CAUSE_COMPACTED}
        expected = numbers_through(feed.sent)
        for symbol, numbers in reader.after_gap.items():
            assert numbers == expected[symbol][-len(numbers) :]


@lost
async def test_a_latest_reader_gets_a_gap_and_a_snapshot_where_the_bus_was_lost(
    desk: Desk, lose: Lose
):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        ReaderWithGaps(subscribe(client, pb.DELIVERY_LATEST)) as reader,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            with server.without_recorder():
                await until(lambda: reader.count > 2_000, "some quotes")
                reader.subscribed.clear()
                await lose(desk)
            await until(lambda: reader.gaps, "the gap")
            await until(reader.subscribed.is_set, "the snapshot")
            await desk.pause()
        await feed.all_accepted()
        await until(lambda: reader.newest == feed.sent, "the last quote")
        newest = sorted(numbers[-1] for numbers in reader.after_gap.values())
        assert newest == [*range(feed.sent - len(SYMBOLS) + 1, feed.sent + 1)]
        assert reader.follower.reconnects == 0


@lost
async def test_recording_goes_on_where_the_bus_was_lost(desk: Desk, lose: Lose):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running():
            await until(lambda: publisher.durable_through > 20, "it is recorded")
            durable = feed.last_of_batch[publisher.durable_through]
            await lose(desk)
            sent = feed.sent
            await until(lambda: feed.accepted > sent, "what was sent after")
        await feed.all_durable()
        numbers = [int(row[6]) for row in await desk.recorded()]
        assert numbers[:durable] == [*range(1, durable + 1)]
        assert numbers[sent - feed.sent :] == [*range(sent + 1, feed.sent + 1)]


async def behind_the_window(client: Client) -> tuple[bytes, Feed]:
    """Return a token of the beginning, once the bus has dropped what follows it."""
    request = pb.SubscribeQuotesRequest(symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS)
    async with client.publish_quotes("feed") as publisher:
        feed = Feed(publisher)
        await feed.send(1_000)
        await feed.all_durable()
        async for response in client.market_data.SubscribeQuotes(request):
            if response.resume_token:
                break
        await feed.send(100_000)
        await feed.all_durable()
    return response.resume_token, feed


async def test_a_token_behind_the_replay_window_is_refused_as_compacted(desk: Desk):
    async with (
        desk.server(window_mb=1) as server,  # over all shards
        Client(server.target) as client,
    ):
        token, _ = await behind_the_window(client)
        request = pb.SubscribeQuotesRequest(
            symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS, resume_token=token
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for response in client.market_data.SubscribeQuotes(request):
                assert not response.quotes
        assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert reason_of(refused.value) == "COMPACTED"


async def test_a_follower_behind_the_replay_window_gets_a_gap_and_then_data(desk: Desk):
    async with (
        desk.server(window_mb=1) as server,
        Client(server.target) as client,
    ):
        token, feed = await behind_the_window(client)
        follower = stream(client, resume_token=token)
        async with ReaderWithGaps(follower) as reader:
            await until(lambda: reader.newest == feed.sent, "the snapshot")
            assert [gap.cause for gap in reader.gaps] == [pb.GAP_CAUSE_COMPACTED]
            async with client.publish_quotes("feed") as publisher:
                feed.publisher = publisher
                await feed.send(1_000)
            await until(lambda: reader.newest == feed.sent, "what follows it")
            expected = numbers_through(feed.sent)
            for symbol, numbers in reader.after_gap.items():
                assert numbers == expected[symbol][-len(numbers) :]
