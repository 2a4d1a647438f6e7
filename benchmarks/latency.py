"""How long a quote is on its way from a feed to a reader, in milliseconds."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from statistics import median, quantiles
from time import monotonic, perf_counter_ns, time_ns

import grpc
import redis.asyncio as redis

from benchmarks import bare
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Sample
from benchmarks.tape import Tape
from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import OPTIONS

SYMBOLS = 50
BATCH = 20  # quotes
BATCHES_PER_S = 500
BATCHES = 2_000
WARM_UP = 250  # batches that are not counted
KEY = "benchmarks:latency"
_STAMP = struct.Struct("!q")


async def vs_floor(bench: Bench) -> Figure:
    """Compare publish → receive with the two hops that it can't do without.

    These are XADD → blocking XREAD on the same Valkey, and a call of a bare server.
    """
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "ms", lambda: _ours(bench, target), lambda: _floor(bench)
        )


async def _ours(bench: Bench, target: str) -> Sample:
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(bench.child(follow, target=target))
        await reader.hear()
        feed = await stack.enter_async_context(bench.child(publish, target=target))
        await feed.hear()
        feed.say(go=True)
        ms = (await reader.hear())["ms"]
        rate = (await feed.hear())["batches_per_s"] * BATCH
        return _sample(ms) | {"quotes_per_s": rate}


async def _floor(bench: Bench) -> Sample:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(bench.child(bare.serve))
        target = (await server.hear())["target"]
        url = bench.redis_url
        reader = await stack.enter_async_context(bench.child(xread, url=url))
        await reader.hear()
        writer = await stack.enter_async_context(
            bench.child(call_and_xadd, url=url, target=target)
        )
        bus_ms = (await reader.hear())["ms"]
        call_ms = (await writer.hear())["ms"]
        sums = [sum(hops) for hops in zip(bus_ms, call_ms, strict=True)]
        return _sample(sums) | {"bus_p50": median(bus_ms), "call_p50": median(call_ms)}


def _sample(ms: list[float]) -> Sample:
    return {"value": median(ms), "p99": quantiles(ms, n=100)[98]}


async def publish(parent: Parent, target: str) -> None:
    """Publish at a steady pace; a quote's time is when it is handed to the client."""
    batches = list(Tape(BATCHES * BATCH, SYMBOLS, BATCH).batches())
    async with Client(target) as client, client.publish_quotes() as feed:
        await feed.send([])  # connected
        parent.say(ready=True)
        await parent.hear()
        began = monotonic()
        async for i in _paced():
            now = time_ns()
            for quote in batches[i]:
                quote.time.FromNanoseconds(now)
            await feed.send(batches[i])
        parent.say(batches_per_s=BATCHES / (monotonic() - began))


async def follow(parent: Parent, target: str) -> None:
    """Read every quote; say how many ms each was on its way."""
    names = Tape(SYMBOLS, SYMBOLS, SYMBOLS).names
    request = pb.StreamQuotesRequest(symbols=names, delivery=pb.DELIVERY_LOSSLESS)
    ms: list[float] = []
    live = False
    async with Client(target) as client:
        async for response in client.follow(client.market_data.StreamQuotes, request):
            now = time_ns()
            if response.event.HasField("snapshot_complete"):
                live = True
                parent.say(ready=True)
            if live:
                ms += [(now - q.time.ToNanoseconds()) / 1e6 for q in response.quotes]
            if len(ms) == BATCHES * BATCH:
                break
    parent.say(ms=ms[WARM_UP * BATCH :])


async def call_and_xadd(parent: Parent, url: str, target: str) -> None:
    """Call the bare server, then XADD, at the same pace; say the ms of each call."""
    quotes = next(Tape(SYMBOLS * BATCH, SYMBOLS, BATCH).batches())
    batch = pb.PublishQuotesRequest(batch=1, quotes=quotes).SerializeToString()
    ms = []
    async with (
        redis.Redis.from_url(url, protocol=2) as client,
        grpc.aio.insecure_channel(target, OPTIONS) as channel,
    ):
        call = channel.unary_unary(bare.ECHO)
        async for _ in _paced():
            began = perf_counter_ns()
            await call(batch)
            ms.append((perf_counter_ns() - began) / 1e6)
            await client.xadd(KEY, {b"": _STAMP.pack(time_ns()) + batch})
    parent.say(ms=ms[WARM_UP:])


async def xread(parent: Parent, url: str) -> None:
    """Read every entry; say how many ms each was on its way."""
    ms: list[float] = []
    async with redis.Redis.from_url(url, protocol=2) as client:
        await client.delete(KEY)
        parent.say(ready=True)
        last = b"0-0"
        while len(ms) < BATCHES:
            for _, entries in await client.xread({KEY: last}, count=256, block=5_000):
                now = time_ns()
                last = entries[-1][0]
                for _, fields in entries:
                    (sent,) = _STAMP.unpack_from(fields[b""])
                    ms.append((now - sent) / 1e6)
    parent.say(ms=ms[WARM_UP:])


async def _paced() -> AsyncIterator[int]:
    """Yield the numbers of the batches, each when it is due."""
    began = monotonic()
    for i in range(BATCHES):
        await asyncio.sleep(max(0.0, began + i / BATCHES_PER_S - monotonic()))
        yield i
