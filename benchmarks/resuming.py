"""How long a reader that was away needs to have what it missed, in seconds."""

from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

import redis.asyncio as redis

from benchmarks import streams
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Sample
from benchmarks.tape import Tape
from quantplane import Client
from quantplane import v1 as pb

QUOTES = 10_000
ROUNDS = 5
STREAMS = "quantplane:*:stream"  # keys of the bus, one per shard


async def resume(bench: Bench) -> Figure:
    """Compare resuming, from a new connection on, with XRANGE of the same entries."""
    ours, baseline = [], []
    async with bench.server() as (target, _):
        for turn in range(ROUNDS):
            bench.note(f"round {turn + 1} of {ROUNDS}")
            sample, base = await _away(bench, target)
            ours.append(sample)
            baseline.append(base)
    return Figure.of("s", ours, baseline)


async def _away(bench: Bench, target: str) -> tuple[Sample, Sample]:
    tape = Tape(QUOTES)
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(
            bench.child(
                come_back, target=target, redis_url=bench.redis_url, names=tape.names
            )
        )
        await reader.hear()
        feed = await stack.enter_async_context(
            bench.child(
                streams.publish, target=target, tape=tape.json(), one_by_one=True
            )
        )
        await feed.hear()
        feed.say(go=True)
        await feed.hear()  # accepted
        await feed.hear()  # durable
        reader.say(go=True)
        seconds = await reader.hear()
        return {"value": seconds["resume"]}, {"value": seconds["xrange"]}


async def come_back(
    parent: Parent, target: str, redis_url: str, names: list[str]
) -> None:
    """Go away; when told to, come back, and say how many seconds that took."""
    request = pb.StreamQuotesRequest(symbols=names, delivery=pb.DELIVERY_LOSSLESS)
    request.resume_token = await _token(target, request)
    ends = await _ends(redis_url)
    parent.say(ready=True)
    await parent.hear()
    parent.say(
        resume=await _resumed_s(target, request),
        xrange=await _xrange_s(redis_url, ends),
    )


async def _token(target: str, request: pb.StreamQuotesRequest) -> bytes:
    async with Client(target) as client:
        async for response in client.follow(client.market_data.StreamQuotes, request):
            if response.event.HasField("snapshot_complete"):
                break
        return response.resume_token


async def _resumed_s(target: str, request: pb.StreamQuotesRequest) -> float:
    received = 0
    began = perf_counter()
    async with Client(target) as client:
        async for response in client.follow(client.market_data.StreamQuotes, request):
            received += len(response.quotes)
            if received >= QUOTES:
                seconds = perf_counter() - began
                break
    assert received == QUOTES, f"{received:,} quotes came"
    return seconds


async def _ends(redis_url: str) -> dict[bytes, bytes]:
    """Return each stream's last entry."""
    async with redis.Redis.from_url(redis_url, protocol=2) as client:
        keys = await client.keys(STREAMS)
        entries = [await client.xrevrange(key, count=1) for key in keys]
        return {key: e[0][0] for key, e in zip(keys, entries, strict=True) if e}


async def _xrange_s(redis_url: str, ends: dict[bytes, bytes]) -> float:
    found: list[Any] = []
    began = perf_counter()
    async with redis.Redis.from_url(redis_url, protocol=2) as client:
        for key in await client.keys(STREAMS):
            found += await client.xrange(key, min=b"(" + ends.get(key, b"0-0"))
        seconds = perf_counter() - began
    assert found
    return seconds
