"""What one slow reader costs the others, in quotes a second that these receive."""

import asyncio
from contextlib import AsyncExitStack

from benchmarks.child import Parent
from benchmarks.fanout import from_server
from benchmarks.harness import Bench, Figure, Sample
from benchmarks.tape import Tape
from quantplane import Client
from quantplane import v1 as pb

QUOTES = 200_000
READERS = 9
SLOW_PER_S = 20  # messages
MAX_UNACKNOWLEDGED = 16


async def cost(bench: Bench) -> Figure:
    """Compare nine lossless readers beside a slow one with nine alone."""
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "quotes/s",
            lambda: _beside_slow_one(bench, target),
            lambda: from_server(bench, target, Tape(QUOTES), READERS),
            rounds=7,
        )


async def _beside_slow_one(bench: Bench, target: str) -> Sample:
    async with AsyncExitStack() as stack:
        child = bench.child(dawdle, target=target, symbols=Tape(QUOTES).names)
        slow = await stack.enter_async_context(child)
        await slow.hear()
        sample = await from_server(bench, target, Tape(QUOTES), READERS)
        slow.say(stop=True)
        return sample | await slow.hear()


async def dawdle(parent: Parent, target: str, symbols: list[str]) -> None:
    """Read LATEST slowly until told to stop; say what was read and left out."""
    request = pb.StreamQuotesRequest(
        symbols=symbols,
        delivery=pb.DELIVERY_LATEST,
        max_unacknowledged=MAX_UNACKNOWLEDGED,
    )
    read = {"slow_read_quotes": 0, "slow_conflated_quotes": 0}

    async def follow() -> None:
        async with Client(target) as client:
            async for response in client.follow(
                client.market_data.StreamQuotes, request
            ):
                if response.event.HasField("snapshot_complete"):
                    parent.say(ready=True)
                read["slow_read_quotes"] += len(response.quotes)
                read["slow_conflated_quotes"] += response.conflated_count
                await asyncio.sleep(1 / SLOW_PER_S)

    following = asyncio.create_task(follow())
    await parent.hear()
    parent.say(**read)
    following.cancel()
