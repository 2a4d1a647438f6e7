"""How fast many readers of everything are served, in quotes a second in all."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial

from benchmarks import bare, streams
from benchmarks.harness import Bench, Figure, Process, Sample
from benchmarks.tape import Tape

READERS = 20
QUOTES = 200_000
SINGLE_QUOTES = 2_000  # a server that writes one quote a message needs long for more
SETTLE_S = 0.3  # between the last stream's opening and the first quote


async def vs_raw(bench: Bench) -> Figure:
    """Compare with writing batches of 100 that were serialised beforehand."""
    return await _compare(bench, bare.BATCHES, QUOTES)


async def vs_naive(bench: Bench) -> Figure:
    """Compare with building and writing one quote per message."""
    return await _compare(bench, bare.SINGLES, SINGLE_QUOTES)


async def _compare(bench: Bench, method: str, baseline_quotes: int) -> Figure:
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "quotes/s",
            lambda: from_server(bench, target, Tape(QUOTES), READERS),
            lambda: from_bare(bench, method, Tape(baseline_quotes)),
        )


async def from_server(bench: Bench, target: str, tape: Tape, readers: int) -> Sample:
    """Publish a tape; measure until all lossless readers have all of it."""
    async with AsyncExitStack() as stack:
        start = partial(_start, stack, bench, target=target, tape=tape)
        request = streams.lossless(tape.names)
        reader = await start(
            streams.read, method=streams.SUBSCRIBE, request=request, readers=readers
        )
        publisher = await start(streams.publish)
        await asyncio.sleep(SETTLE_S)
        publisher.say(go=True)
        published = await publisher.hear()
        sample = await _received(reader, tape, readers, published["began"])
        await publisher.hear()  # durable: the recorder is at rest for the next round
        published_s = published["accepted"] - published["began"]
        return sample | {"published_per_s": tape.quotes / published_s}


async def from_bare(bench: Bench, method: str, tape: Tape) -> Sample:
    """Have the bare server write a tape; measure until all readers have all of it."""
    async with AsyncExitStack() as stack:
        child = bench.child(bare.serve, tape=tape.json())
        server = await stack.enter_async_context(child)
        target = (await server.hear())["target"]
        reader = await _start(
            stack, bench, streams.read, target=target, tape=tape,
            method=method, request="", readers=READERS,
        )  # fmt: skip
        await asyncio.sleep(SETTLE_S)
        server.say(go=True)
        began = (await server.hear())["began"]
        return await _received(reader, tape, READERS, began)


async def _start(
    stack: AsyncExitStack,
    bench: Bench,
    function: object,
    tape: Tape,
    **arguments: object,
) -> Process:
    """Start a child, and return it when it is ready."""
    child = bench.child(function, tape=tape.json(), **arguments)
    process = await stack.enter_async_context(child)
    await process.hear()
    return process


async def _received(reader: Process, tape: Tape, readers: int, began: float) -> Sample:
    done = await reader.hear()
    delivered = tape.quotes * readers
    return {
        "value": delivered / (done["done"] - began),
        "quotes_per_message": delivered / done["messages"],
        "reader_cpu_s_per_million": done["cpu_s"] / delivered * 1e6,
    }
