"""A feed as a process: `python -m tests.faults.feed TARGET FEED` until it is killed.

It keeps no batches, and needs none: what a batch holds follows from its number.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from quantplane import Client, reason_of
from quantplane import v1 as pb
from tests.faults import quote

QUOTES = 20  # a batch
PAUSE_S = 0.004
AGAIN = 5  # batches that were accepted and are sent once more


async def publish(client: Client, feed: str, through: int) -> AsyncIterator[int]:
    """Publish the batches that come next; yield `accepted_through` when it moves."""
    call: Any = client.market_data.PublishQuotes()
    await call.write(pb.PublishQuotesRequest(feed=feed))
    first = await call.read()
    writing = asyncio.create_task(_write(call, first.accepted_through, through))
    try:
        while accepted := await call.read():
            yield accepted.accepted_through
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def _write(call: Any, accepted: int, through: int) -> None:
    try:
        for batch in range(max(1, accepted + 1 - AGAIN), through + 1):
            numbers = range((batch - 1) * QUOTES + 1, batch * QUOTES + 1)
            quotes = [quote(number) for number in numbers]
            await call.write(pb.PublishQuotesRequest(batch=batch, quotes=quotes))
            await asyncio.sleep(PAUSE_S)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call has ended: its reader learns why


async def main(target: str, feed: str) -> None:
    async with Client(target) as client:
        try:
            async for accepted in publish(client, feed, sys.maxsize):
                print(accepted, flush=True)
        except grpc.aio.AioRpcError as error:
            print(reason_of(error), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
