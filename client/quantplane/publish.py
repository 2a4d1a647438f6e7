"""Publishes quotes so that none is lost and none doubled, whatever breaks."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from quantplane import v1 as pb
from quantplane.credentials import is_renewed, shown_by
from quantplane.errors import describe, is_transient, metadata_of
from quantplane.follow import Backoff
from quantplane.tracing import PublisherTrace

logger = logging.getLogger(__name__)

QUOTES_PER_BATCH = 2_000  # the contract's limit


class QuotePublisher:
    """Sends numbered batches and keeps each until the server has accepted it.

    Over broken connections and restarted servers it sends again what was not
    accepted, in order and under the same numbers. An error that no reconnect
    cures is raised by the next call and by a clean exit; its note names the
    batches that were not accepted.
    """

    MAX_BATCHES = 256  # not accepted yet; beyond them `send` waits
    MAX_BYTES = 16 * 1024 * 1024
    TRACE_S = 10.0  # between two batches that have a span, where there is tracing

    def __init__(self, channel: grpc.aio.Channel, feed: str | None = None) -> None:
        self.feed = feed or uuid.uuid4().hex
        self.reconnects = 0
        # Batches are serialised once, in `send`: a resend costs nothing, and the
        # bound in bytes is exact.
        name = f"{pb.Quote.DESCRIPTOR.file.package}.MarketDataService/PublishQuotes"
        self._trace = PublisherTrace(name, self.TRACE_S)
        self._method: Any = channel.stream_stream(
            f"/{name}",
            response_deserializer=pb.PublishQuotesResponse.FromString,
        )
        self._was_let_in = True
        self._accepted_through = self._durable_through = 0
        self._hold: pb.HoldReason.ValueType = pb.HOLD_REASON_UNSPECIFIED
        self._sent_through = 0  # by this publisher
        self._next_batch = 0  # 0: not known before the server's first response
        self._unaccepted: deque[tuple[int, bytes]] = deque()
        self._unaccepted_bytes = 0
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
        """End at once; what is not accepted yet may be lost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._trace.close()

    @property
    def accepted_through(self) -> int:
        """Every batch up to this number is on the bus."""
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
        await self._until(lambda: self._accepted_through >= last)

    async def durable(self) -> None:
        """Wait until everything sent is committed in the database."""
        last = self._sent_through
        await self._until(lambda: self._durable_through >= last)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._task is None or self._task.done():
                raise RuntimeError("not open: a publisher works inside `async with`")
            if reached():
                return
            await self._progress.wait()

    def _has_room(self) -> bool:
        return (
            len(self._unaccepted) < self.MAX_BATCHES
            and self._unaccepted_bytes < self.MAX_BYTES
        )

    def _add(self, quotes: Sequence[pb.Quote]) -> int:
        number = self._next_batch
        request = pb.PublishQuotesRequest(batch=number, quotes=quotes)
        request.publish_time.FromNanoseconds(time.time_ns())
        request.traceparent = self._trace.begin(number, len(quotes))
        batch = request.SerializeToString()
        self._sent_through = number
        self._next_batch += 1
        self._unaccepted.append((number, batch))
        self._unaccepted_bytes += len(batch)
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
        try:
            while response := await call.read():
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
            writer.cancel()
            await asyncio.wait([writer])
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
        self._accept(response.accepted_through)
        self._durable_through = max(self._durable_through, response.durable_through)
        self._hold = response.hold
        if self._unwritten is None:  # the first response: what is missing is known
            known = max(response.next_batch, response.accepted_through + 1)
            self._next_batch = max(self._next_batch, known)
            self._unwritten = deque(batch for _, batch in self._unaccepted)
            self._more.set()
        self._tell()

    def _accept(self, through: int) -> None:
        self._accepted_through = max(self._accepted_through, through)
        while self._unaccepted and self._unaccepted[0][0] <= through:
            self._unaccepted_bytes -= len(self._unaccepted.popleft()[1])
        self._trace.accepted(through)

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
