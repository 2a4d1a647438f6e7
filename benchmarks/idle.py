"""What a subscription that waits costs the server, in KiB of resident memory."""

import asyncio
from typing import Any

import grpc
import psutil

from benchmarks import bare, streams
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Sample
from quantplane import v1 as pb

SUBSCRIPTIONS = 2_000
SYMBOLS_EACH = 10
ALL_SYMBOLS = 500
WAVE = 50  # opened at once
SETTLE_S = 1.0


async def subscription(bench: Bench) -> Figure:
    """Compare with a bare handler that answers once and waits.

    Each round has servers of its own, for memory once used is not given back.
    """
    return await bench.in_turns(
        "KiB", lambda: _ours(bench), lambda: _bare(bench), rounds=2
    )


async def _ours(bench: Bench) -> Sample:
    async with bench.server() as (target, server):
        return await _held(bench, target, streams.STREAM, server.pid)


async def _bare(bench: Bench) -> Sample:
    async with bench.child(bare.serve) as server:
        target = (await server.hear())["target"]
        return await _held(bench, target, bare.WAIT, server.pid)


async def _held(bench: Bench, target: str, method: str, pid: int) -> Sample:
    process = psutil.Process(pid)
    before = process.memory_info().rss
    async with bench.child(hold, target=target, method=method) as child:
        await child.hear()
        await asyncio.sleep(SETTLE_S)
        grown = process.memory_info().rss - before
    return {"value": grown / SUBSCRIPTIONS / 1024}


async def hold(parent: Parent, target: str, method: str) -> None:
    """Open the subscriptions; say when each has its first response."""
    opened = streams.channels(target)

    async def subscribe(i: int) -> Any:
        call = opened[i % len(opened)].stream_stream(method)(metadata=streams.shown())
        await call.write(_request(i))
        await call.read()
        return call

    calls: list[Any] = []
    for start in range(0, SUBSCRIPTIONS, WAVE):
        calls += await asyncio.gather(*map(subscribe, range(start, start + WAVE)))
    reading = [asyncio.create_task(_drop(call)) for call in calls]
    parent.say(ready=True)
    await asyncio.wait(reading)


def _request(i: int) -> bytes:
    symbols = [f"SYM{(i + k) % ALL_SYMBOLS:03d}" for k in range(SYMBOLS_EACH)]
    request = pb.StreamQuotesRequest(symbols=symbols, delivery=pb.DELIVERY_LATEST)
    return request.SerializeToString()


async def _drop(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:  # heartbeats
        pass
