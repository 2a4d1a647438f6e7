"""The streams of a process: how many there may be, how they fare, and how they end."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from itertools import count
from time import monotonic
from typing import Generic, NamedTuple, Protocol, TypeVar

from quantplane import v1 as pb
from quantplane_server.errors import Draining, TooManyStreams
from quantplane_server.principal import Principal, principal
from quantplane_server.tasks import end

Request = TypeVar("Request")

HEARTBEAT_S = 5.0  # where a request does not choose one
RETRY_AFTER_MS = 500
STALLED_S = 5.0  # in which a reader takes nothing of what there is


class Peer(Protocol):
    def peer(self) -> str: ...


class Outlet:
    """The way out to the caller of a call, and what went through it."""

    __slots__ = ("_begun_at", "_context", "_method", "_sent_at", "bytes", "responses")

    def __init__(self, method: str, context: Peer) -> None:
        self.responses = self.bytes = 0
        self._method = method
        self._context = context
        self._sent_at = monotonic()
        self._begun_at = 0.0  # of a write that is under way; 0: there is none

    def begin(self, size: int) -> None:
        """Note that a response of a stream is handed to the transport."""
        self.bytes += size
        self._begun_at = monotonic()

    def sent(self) -> None:
        """Note that the transport has taken it, though maybe not the reader."""
        self.responses += 1
        self._sent_at = monotonic()
        self._begun_at = 0.0

    @property
    def method(self) -> str:
        return self._method.removeprefix("/")

    @property
    def peer(self) -> str:
        return self._context.peer()

    @property
    def quiet_s(self) -> float:
        """How long ago the last response went out."""
        return monotonic() - self._sent_at

    @property
    def blocked_s(self) -> float:
        """How long the transport has been full."""
        return monotonic() - self._begun_at if self._begun_at else 0.0


OUTLET: ContextVar[Outlet] = ContextVar("outlet")  # of the call that runs


class Stream(Protocol):
    def drain(self) -> None:
        """End with a Goodbye."""

    def report(self, told: pb.Subscription) -> None:
        """Fill in what only the stream knows of itself."""


class Held(NamedTuple):
    """A stream that is being served."""

    id: int
    stream: Stream
    outlet: Outlet
    principal: Principal | None
    started_at: datetime

    def report(self) -> pb.Subscription:
        told = pb.Subscription(
            id=self.id,
            method=self.outlet.method,
            peer=self.outlet.peer,
            state=pb.SUBSCRIPTION_STATE_LIVE,
            responses=self.outlet.responses,
            response_bytes=self.outlet.bytes,
        )
        if self.principal:
            told.username = self.principal.username
            told.key_id = self.principal.key_id
        told.start_time.FromDatetime(self.started_at)
        told.since_response.FromTimedelta(timedelta(seconds=self.outlet.quiet_s))
        self.stream.report(told)
        if self._is_stalled(told):
            told.state = pb.SUBSCRIPTION_STATE_STALLED
        return told

    def _is_stalled(self, told: pb.Subscription) -> bool:
        if self.outlet.blocked_s > STALLED_S:
            return True
        if told.state != pb.SUBSCRIPTION_STATE_LIVE:
            return False
        patience = timedelta(seconds=STALLED_S) + told.min_interval.ToTimedelta()
        waited = told.lag.ToTimedelta(), told.since_response.ToTimedelta()
        return min(waited) > patience


class Batches(Generic[Request]):
    """What a publisher sends, until it ends, or the process stops between two."""

    def __init__(self, requests: AsyncIterator[Request]) -> None:
        self._requests = requests
        self._drained = asyncio.Event()

    def drain(self) -> None:
        self._drained.set()

    def report(self, told: pb.Subscription) -> None:
        pass

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
        self.limit = limit
        self.draining = False
        self._held: dict[int, Held] = {}
        self._ids = count(1)
        self._ended = [0, 0]  # responses, and their bytes

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def held(self, stream: Stream) -> Iterator[None]:
        """Serve a stream. Raises TooManyStreams, or Draining after `drain`."""
        if self.draining:
            raise Draining
        if len(self._held) >= self.limit:
            raise TooManyStreams(self.limit)
        id, outlet = next(self._ids), OUTLET.get()
        held = Held(id, stream, outlet, principal(), datetime.now(UTC))
        self._held[id] = held
        try:
            yield
        finally:
            del self._held[id]
            self._ended[0] += outlet.responses
            self._ended[1] += outlet.bytes

    def drain(self) -> None:
        """Take no new stream, and end those there are with a Goodbye."""
        self.draining = True
        for held in self._held.values():
            held.stream.drain()

    def reports(self, behind: int = 0) -> Iterator[pb.Subscription]:
        """Yield how the streams fare that began behind the one of an id, in order."""
        for id in [id for id in self._held if id > behind]:
            if held := self._held.get(id):
                yield held.report()

    def sent(self) -> tuple[int, int]:
        """Return how many responses streams were ever sent, and their bytes."""
        outlets = [held.outlet for held in self._held.values()]
        return (
            self._ended[0] + sum(outlet.responses for outlet in outlets),
            self._ended[1] + sum(outlet.bytes for outlet in outlets),
        )


def heartbeat() -> pb.StreamEvent:
    event = pb.StreamEvent()
    event.heartbeat.server_time.GetCurrentTime()
    return event


def goodbye() -> pb.StreamEvent:
    event = pb.StreamEvent()
    event.goodbye.reason = pb.GOODBYE_REASON_DRAINING
    event.goodbye.retry_after.FromMilliseconds(RETRY_AFTER_MS)
    return event
