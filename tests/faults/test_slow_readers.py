"""A reader that is slow, stopped or never reads hurts only itself."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from google.protobuf.duration_pb2 import Duration

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import shard_of
from tests.faults import (
    MIB,
    PATIENCE_S,
    REPOSITORY,
    SYMBOLS,
    Desk,
    Feed,
    Reader,
    Server,
    stream,
    subscribe,
    until,
)

QUOTES = 200_000
MIN_INTERVAL = Duration(nanos=5_000_000)
LONG_SYMBOLS = tuple(symbol.ljust(64, "-") for symbol in SYMBOLS)  # quotes of 105 bytes


class SlowReader(Reader):
    """Takes 20 responses a second, and compares each with what a free reader has."""

    def __init__(
        self, client: Client, free: Reader, ahead: int, **fields: object
    ) -> None:
        follower = stream(
            client,
            pb.DELIVERY_LATEST,
            LONG_SYMBOLS,
            max_unacknowledged=ahead,
            **fields,
        )
        super().__init__(follower, pause_s=1 / 20)
        self.free = free
        self.ahead = ahead
        self.newest_of_free: dict[int, dict[str, int]] = {}  # by response
        self.stale: list[str] = []

    def take(self, response: Any) -> None:
        """Check how old the newest quotes are.

        The server makes response n once n - ahead has been acknowledged, so not before
        it was read here. What a free reader had by then, the server had taken from the
        bus, for both at once: response n, with those before, is at least as new.
        """
        super().take(response)
        newest = {symbol: numbers[-1] for symbol, numbers in self.free.numbers.items()}
        self.newest_of_free[response.sequence] = newest
        acknowledged = [
            n for n in self.newest_of_free if n <= response.sequence - self.ahead
        ]
        if not (response.quotes and acknowledged):
            return
        for symbol, number in self.newest_of_free[max(acknowledged)].items():
            have = max(self.numbers[symbol], default=0)
            if have < number:
                self.stale.append(f"{response.sequence}: {symbol} {have} < {number}")


async def test_slow_latest_readers_among_nine_free_ones_read_fresh_quotes(desk: Desk):
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(desk.server())
        clients = [
            await stack.enter_async_context(Client(server.target)) for _ in range(10)
        ]
        free = [
            await stack.enter_async_context(
                Reader(stream(client, pb.DELIVERY_LATEST, LONG_SYMBOLS))
            )
            for client in clients[:9]
        ]
        pressed = await stack.enter_async_context(
            SlowReader(clients[9], free[0], ahead=16)
        )
        # Its responses are small, so that many more of them than it has credit for
        # would fit into the buffers on the way.
        spaced = await stack.enter_async_context(
            SlowReader(clients[9], free[0], ahead=4, min_interval=MIN_INTERVAL)
        )
        publisher = await stack.enter_async_context(clients[0].publish_quotes("feed"))
        feed = Feed(publisher, LONG_SYMBOLS)
        await feed.send(2_000)
        async with server.growth_below(24 * MIB), feed.running(rate=15_000):
            await asyncio.sleep(4)
        await feed.all_accepted()
        for reader in (*free, pressed, spaced):
            await until(
                lambda reader=reader: reader.count + reader.conflated >= feed.sent,
                "every quote is delivered or counted",
            )
            assert reader.count + reader.conflated == feed.sent
            newest = {s: numbers[-1] for s, numbers in reader.numbers.items()}
            assert sorted(newest.values()) == [*range(feed.sent - 23, feed.sent + 1)]
            assert all(ns == sorted(set(ns)) for ns in reader.numbers.values())
        for slow in (pressed, spaced):
            assert slow.conflated > 0, "the feed was too slow for this test"
            assert max(slow.newest_of_free) > 3 * slow.ahead
            assert slow.stale == []


@asynccontextmanager
async def reader_process(server: Server) -> AsyncIterator[subprocess.Popen[str]]:
    module = ["-m", "tests.faults.reader", server.target, str(QUOTES), *LONG_SYMBOLS]
    with subprocess.Popen(
        [sys.executable, *module], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert await line_of(process) == "subscribed\n"
            yield process
        finally:
            process.kill()


async def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(process.stdout.readline)


async def test_a_stopped_lossless_reader_comes_back_to_every_quote(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client, symbols=LONG_SYMBOLS)) as reader,
        reader_process(server) as stopped,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher, LONG_SYMBOLS)
        await feed.send(QUOTES // 10)
        await reader.has_all(feed)
        stopped.send_signal(signal.SIGSTOP)
        async with server.growth_below(24 * MIB):
            await feed.send(QUOTES - feed.sent)
            await reader.has_all(feed)
            stopped.send_signal(signal.SIGCONT)
            assert await line_of(stopped) == "complete\n"


async def test_streams_that_are_never_read_take_bounded_memory(desk: Desk):
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(desk.server())
        client = await stack.enter_async_context(Client(server.target))
        reader = await stack.enter_async_context(
            Reader(subscribe(client, symbols=LONG_SYMBOLS))
        )
        publisher = await stack.enter_async_context(client.publish_quotes("feed"))
        feed = Feed(publisher, LONG_SYMBOLS)
        await feed.send(20_000)
        await reader.has_all(feed)
        unread = [
            await unread_stream(client, delivery, LONG_SYMBOLS[n + 1 :])
            for n in range(8)  # each of other symbols, so that they share no bytes
            for delivery in (pb.DELIVERY_LATEST, pb.DELIVERY_LOSSLESS)
        ]
        async with server.growth_below(64 * MIB):  # 8 MiB a pair; and 20 unbounded
            await feed.send(QUOTES)
            await reader.has_all(feed)
        for call in unread:
            assert not call.done()
            call.cancel()


async def test_an_unread_stream_of_a_rare_symbol_does_not_hold_the_others(desk: Desk):
    same_shard = (s.ljust(64, "-") for s in map(str, range(10_000)))
    rare, *busy = [s for s in same_shard if shard_of(s.encode()) == 0][:1_000]
    symbols = (*busy, rare)
    async with (
        desk.server() as server,
        Client(server.target) as client,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher, symbols)
        await feed.send(20_000)
        await feed.all_durable()
        unread = client.market_data.StreamQuotes()
        # Credit for what comes before the live quotes, and for none of these.
        await unread.write(pb.StreamQuotesRequest(symbols=[rare], max_unacknowledged=3))
        assert (await unread.read()).event.HasField("subscribed")
        async with server.growth_below(48 * MIB):
            await feed.send(500_000)
            await feed.all_accepted()
        assert not unread.done()
        unread.cancel()


async def unread_stream(
    client: Client, delivery: "pb.Delivery.ValueType", symbols: tuple[str, ...]
) -> Any:
    """Open a stream, and read it only until the server serves it."""
    request = pb.SubscribeQuotesRequest(symbols=symbols, delivery=delivery)
    call: Any = client.market_data.SubscribeQuotes(request)
    subscribed = await call.read()
    assert subscribed.event.HasField("subscribed")
    return call
