"""Publishes quotes so that none is lost and none doubled, whatever breaks."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from quantplane import v1 as pb
from quantplane.credentials import KnownChannel, is_renewed, shown_by
from quantplane.errors import describe, is_transient, metadata_of
from quantplane.follow import Backoff
from quantplane.reaching import say_when_cut_off
from quantplane.tracing import PublisherTrace

logger = logging.getLogger(__name__)

QUOTES_PER_BATCH = 2_000  # the contract's limit


class _Batches:
    """Serialised batches with their numbers, the oldest first."""

    def __init__(self) -> None:
        self._batches: deque[tuple[int, bytes]] = deque()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(self._batches)

    def append(self, number: int, batch: bytes) -> None:
        self._batches.append((number, batch))
        self.bytes += len(batch)

    def appendleft(self, number: int, batch: bytes) -> None:
        self._batches.appendleft((number, batch))
        self.bytes += len(batch)

    def pop(self) -> tuple[int, bytes]:
        number, batch = self._batches.pop()
        self.bytes -= len(batch)
        return number, batch

    def popleft(self) -> tuple[int, bytes]:
        number, batch = self._batches.popleft()
        self.bytes -= len(batch)
        return number, batch

    def begins_by(self, number: int) -> bool:
        return bool(self._batches) and self._batches[0][0] <= number

    def ends_after(self, number: int) -> bool:
        return bool(self._batches) and self._batches[-1][0] > number


class QuotePublisher:
    """Sends numbered batches and keeps each until it is in the database.

    Over broken connections and restarted servers it sends again what was not
    accepted, in order and under the same numbers; also what was, where the bus has
    lost it before it was in the database. An error that no reconnect cures is raised
    by the next call and by a clean exit; its note names the batches that were not
    accepted.
    """

    MAX_BATCHES = 256  # not accepted yet; beyond them `send` waits
    MAX_BYTES = 16 * 1024 * 1024
    MAX_KEPT_BATCHES = 65_536  # accepted, not durable yet; beyond them it drops the
    MAX_KEPT_BYTES = 64 * 1024 * 1024  # oldest, which it then can't send again
    TRACE_S = 10.0  # between two batches that have a span, where there is tracing

    def __init__(
        self, channel: grpc.aio.Channel, known: KnownChannel, feed: str | None = None
    ) -> None:
        self.feed = feed or uuid.uuid4().hex
        self.reconnects = 0
        self.lost = 0
        """How many batches the bus had accepted and lost, and are dropped here."""
        # Batches are serialised once, in `send`: a resend costs nothing, and the
        # bound in bytes is exact.
        name = f"{pb.Quote.DESCRIPTOR.file.package}.MarketDataService/PublishQuotes"
        self._trace = PublisherTrace(name, self.TRACE_S)
        self._channel = channel
        self._method: Any = known.stream_stream(
            f"/{name}",
            response_deserializer=pb.PublishQuotesResponse.FromString,
        )
        self._was_let_in = True
        self._accepted_through = self._durable_through = 0
        self._hold: pb.HoldReason.ValueType = pb.HOLD_REASON_UNSPECIFIED
        self._sent_through = 0  # by this publisher
        self._next_batch = 0  # 0: not known before the server's first response
        self._unaccepted = _Batches()
        self._kept = _Batches()  # accepted, not durable yet
        self._dropped_through = 0
        self._lost = range(0)  # the last ones
        self._unwritten: deque[bytes] | None = None  # None: not connected
        self._more = asyncio.Event()  # to write
        self._progress = asyncio.Event()
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until all is accepted; not if the block ends with an exception."""
        try:
            if error is None:
                await self.flush()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End at once; what is not accepted yet may be lost.

        What is accepted and not durable is no longer sent again from here on.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._trace.close()

    @property
    def accepted_through(self) -> int:
        """Every batch up to this number is on the bus. Falls if that loses some."""
        return self._accepted_through

    @property
    def durable_through(self) -> int:
        """Every batch up to this number is committed in the database."""
        return self._durable_through

    @property
    def hold(self) -> pb.HoldReason.ValueType:
        """Why the server reads no further batches for now; unspecified: it does."""
        return self._hold

    @property
    def unaccepted(self) -> list[int]:
        """The numbers of the batches that were sent but not yet accepted."""
        return [number for number, _ in self._unaccepted]

    async def send(self, quotes: Sequence[pb.Quote]) -> int:
        """Take over `quotes` and return their batch number; wait only for room.

        More than 2,000 become several batches; the number is the last one's.
        """
        await self._until(lambda: self._next_batch > 0)
        number = self._next_batch - 1
        for start in range(0, len(quotes), QUOTES_PER_BATCH):
            await self._until(self._has_room)
            number = self._add(quotes[start : start + QUOTES_PER_BATCH])
        return number

    async def flush(self) -> None:
        """Wait until everything sent is accepted."""
        last = self._sent_through
        await self._until(lambda: not self._unaccepted.begins_by(last))

    async def durable(self) -> None:
        """Wait until everything sent is committed in the database, or lost."""
        last = self._sent_through
        await self._until(lambda: self._is_settled(last))

    async def _until(self, reached: Callable[[], bool]) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._task is None or self._task.done():
                raise RuntimeError("not open: a publisher works inside `async with`")
            if reached():
                return
            await self._progress.wait()

    def _is_settled(self, last: int) -> bool:
        durable = self._durable_through
        return durable >= last or (last in self._lost and durable >= self._lost[0] - 1)

    def _has_room(self) -> bool:
        return (
            len(self._unaccepted) < self.MAX_BATCHES
            and self._unaccepted.bytes < self.MAX_BYTES
        )

    def _add(self, quotes: Sequence[pb.Quote]) -> int:
        number = self._next_batch
        request = pb.PublishQuotesRequest(batch=number, quotes=quotes)
        request.publish_time.FromNanoseconds(time.time_ns())
        request.traceparent = self._trace.begin(number, len(quotes))
        batch = request.SerializeToString()
        self._sent_through = number
        self._next_batch += 1
        self._unaccepted.append(number, batch)
        if self._unwritten is not None:
            self._unwritten.append(batch)
            self._more.set()
        return number

    # The connections, one after another.

    async def _run(self) -> None:
        backoff = Backoff()
        try:
            while True:
                why = await self._connection(backoff)
                delay = backoff.next()
                logger.warning(
                    "feed %s: %s; reconnecting in %.1f s", self.feed, why, delay
                )
                await asyncio.sleep(delay)
                self.reconnects += 1
        except Exception as error:
            self._fail(error)
        finally:
            self._tell()

    async def _connection(self, backoff: Backoff) -> str:
        """Publish until the connection ends, and return why it did."""
        shown = shown_by(self._method)
        call = self._method(wait_for_ready=True)
        writer = asyncio.create_task(self._write(call))
        saying = asyncio.create_task(
            say_when_cut_off(self._channel, logger, f"feed {self.feed}")
        )
        try:
            while response := await call.read():
                saying.cancel()
                self._was_let_in = True
                if response.accepted_through > self._accepted_through:
                    backoff.reset()
                self._take(response)
        except grpc.aio.AioRpcError as error:
            if not is_transient(error):
                was_let_in, self._was_let_in = self._was_let_in, False
                if not (was_let_in and await is_renewed(self._method, shown, error)):
                    raise
            return describe(error)
        finally:
            self._unwritten = None
            call.cancel()
            for task in (saying, writer):
                task.cancel()
            await asyncio.wait([saying, writer])
        return "the server ended the stream"

    async def _write(self, call: Any) -> None:
        # A call that has ended can't be written; its reader learns why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            feed = pb.PublishQuotesRequest(feed=self.feed)
            await call.write(feed.SerializeToString())
            while True:
                while self._unwritten:
                    await call.write(self._unwritten.popleft())
                self._more.clear()
                await self._more.wait()

    def _take(self, response: pb.PublishQuotesResponse) -> None:
        self._durable_through = max(self._durable_through, response.durable_through)
        accepted = max(response.accepted_through, self._durable_through)
        if self._unwritten is None:  # the first response: what is missing is known
            self._take_back(accepted)
        self._accept(accepted)
        self._drop()
        self._hold = response.hold
        if self._unwritten is None:
            known = max(response.next_batch, response.accepted_through + 1)
            self._next_batch = max(self._next_batch, known)
            self._unwritten = deque(batch for _, batch in self._unaccepted)
            self._more.set()
        self._tell()

    def _accept(self, through: int) -> None:
        self._accepted_through = max(self._accepted_through, through)
        while self._unaccepted.begins_by(through):
            self._kept.append(*self._unaccepted.popleft())
        self._trace.accepted(through)

    def _take_back(self, through: int) -> None:
        """Hold as accepted no more than the server knows of.

        That is less where the bus has lost some, or had not noted the last ones: it
        takes those for what they are when they come again.
        """
        self._accepted_through = min(self._accepted_through, through)
        while self._kept.ends_after(through):
            self._unaccepted.appendleft(*self._kept.pop())
        more = range(max(through + 1, self._lost.stop), self._dropped_through + 1)
        if more:
            self._lost = range(through + 1, more.stop)
            self.lost += len(more)
            logger.warning(
                "feed %s: the bus has lost batches %d to %d, which it had accepted; "
                "they were dropped here, as too many were not durable",
                *(self.feed, more[0], more[-1]),
            )

    def _drop(self) -> None:
        """Keep what may have to be sent again, and no more than the bounds."""
        while self._kept.begins_by(self._durable_through):
            self._kept.popleft()
        while (
            len(self._kept) > self.MAX_KEPT_BATCHES
            or self._kept.bytes > self.MAX_KEPT_BYTES
        ):
            self._dropped_through, _ = self._kept.popleft()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            refused = metadata_of(error).get("batch", "")
            if refused.isdecimal():
                self._accept(int(refused) - 1)
        if lost := self.unaccepted:
            error.add_note(
                f"batches {lost[0]} to {lost[-1]} of feed {self.feed} "
                "are not known to be accepted"
            )
        self._failure = error

    def _tell(self) -> None:
        """Wake everyone who waits for progress."""
        self._progress.set()
        self._progress.clear()
