"""The streams of a process: how many there may be, and how they end when it stops."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from quantplane import v1 as pb
from quantplane_server.errors import Draining, TooManyStreams
from quantplane_server.tasks import end

Request = TypeVar("Request")

HEARTBEAT_S = 5.0  # where a request does not choose one
RETRY_AFTER_MS = 500


class Stream(Protocol):
    def drain(self) -> None:
        """End with a Goodbye."""


class Batches(Generic[Request]):
    """What a publisher sends, until it ends, or the process stops between two."""

    def __init__(self, requests: AsyncIterator[Request]) -> None:
        self._requests = requests
        self._drained = asyncio.Event()

    def drain(self) -> None:
        self._drained.set()

    async def __aiter__(self) -> AsyncIterator[Request]:
        """Yield the requests. Raises Draining."""
        drained = asyncio.create_task(self._drained.wait())
        coming = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(self._requests, None))
                either = [coming, drained]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if drained.done():
                    raise Draining
                if (request := coming.result()) is None:
                    return
                yield request
        finally:
            await end(drained, *([coming] if coming else []))


class Streams:
    """All streams that are being served, whatever their service."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: set[Stream] = set()
        self._draining = False

    @contextmanager
    def held(self, stream: Stream) -> Iterator[None]:
        """Serve a stream. Raises TooManyStreams, or Draining after `drain`."""
        if self._draining:
            raise Draining
        if len(self._held) >= self._limit:
            raise TooManyStreams(self._limit)
        self._held.add(stream)
        try:
            yield
        finally:
            self._held.remove(stream)

    def drain(self) -> None:
        """Take no new stream, and end those there are with a Goodbye."""
        self._draining = True
        for stream in self._held:
            stream.drain()


def heartbeat() -> pb.StreamEvent:
    event = pb.StreamEvent()
    event.heartbeat.server_time.GetCurrentTime()
    return event


def goodbye() -> pb.StreamEvent:
    event = pb.StreamEvent()
    event.goodbye.reason = pb.GOODBYE_REASON_DRAINING
    event.goodbye.retry_after.FromMilliseconds(RETRY_AFTER_MS)
    return event
