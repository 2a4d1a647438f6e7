"""Sends numbered batches until all are stored, whatever breaks in between."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import grpc

from quantplane.errors import describe, is_transient
from quantplane.follow import Backoff

logger = logging.getLogger(__name__)

IN_FLIGHT = 8
# In a row, to reach a server that goes away: about 10 s.
TRIES = 8

Request = TypeVar("Request", bound=Any)


async def publish_batches(
    method: Any, requests: Iterable[Request]
) -> AsyncIterator[Request]:
    """Send requests that are batches, and yield each once the database has it.

    `method` is one that stores numbered batches: `client.market_data.PublishBars` or
    `client.options.PublishOptionChain`. The batches are numbered here.

        chains = [pb.PublishOptionChainRequest(chain=chain)]
        async for stored in publish_batches(client.options.PublishOptionChain, chains):
            print(f"{len(stored.chain.contracts)} contracts are stored")

    Over a broken connection or a restarted server all are sent again from the first
    that may not be stored, which changes nothing of what is. Raises the error of a
    server that stays away or that refuses a batch; what was yielded is stored.
    """
    unsent = iter(requests)
    unstored: deque[Request] = deque()
    backoff, tries = Backoff(), 0
    while True:
        try:
            sending = _send(method, unsent, unstored)
            async with aclosing(sending):
                async for request in sending:
                    backoff, tries = Backoff(), 0
                    yield request
            return
        except grpc.aio.AioRpcError as error:
            tries += 1
            if tries == TRIES or not is_transient(error):
                raise
            delay = backoff.next()
            logger.warning("%s; sending again in %.1f s", describe(error), delay)
        await asyncio.sleep(delay)


async def _send(
    method: Any, unsent: Iterator[Request], unstored: deque[Request]
) -> AsyncGenerator[Request, None]:
    """Store `unstored`, then `unsent`, on one connection."""
    call = method()
    sent = through = 0
    try:
        while True:
            while sent < through + IN_FLIGHT:
                if sent - through == len(unstored):
                    if (request := next(unsent, None)) is None:
                        break
                    unstored.append(request)
                request = unstored[sent - through]
                sent += 1
                request.batch = sent
                # A call that has ended can't be written; `read` tells why.
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(request)
            if not unstored:
                await call.done_writing()
                return
            response = await call.read()
            if response is grpc.aio.EOF:
                raise _ended()
            while through < response.durable_through:
                through += 1
                yield unstored.popleft()
    finally:
        call.cancel()


def _ended() -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, nothing, nothing, "the server ended the stream"
    )
