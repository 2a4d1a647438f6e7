"""The server's side of PublishQuotes: batches to rounds, rounds to the bus.

While one round is being appended the next one collects, so a round is one batch when
load is low and many when it is high, without a timer. What is collected is bounded:
at the bound, and while the bus is full or away, no further request is read, and HTTP/2
holds the feed back.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server import bus as buses
from quantplane_server.bus import SHARDS, Bus, FeedLease, Position, Round, shard_of
from quantplane_server.db import Database
from quantplane_server.errors import (
    BackendUnavailable,
    Draining,
    FeedReplaced,
    OutOfOrder,
    QuantplaneError,
)
from quantplane_server.fanout import framed
from quantplane_server.market_data import queries
from quantplane_server.market_data.checks import (
    check_feed,
    check_publish_time,
    check_quotes,
)
from quantplane_server.market_data.durability import Durability
from quantplane_server.stamps import sampled
from quantplane_server.tasks import end
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import FEED_HOLDS, FEEDS_HELD, QUOTES_ACCEPTED

ROUND_QUOTES = 3_500  # bounds an entry: Valkey's functions take some 8,000 values
RETRY_S = 0.1

Requests = AsyncIterator[pb.PublishQuotesRequest]


class Feed:
    """One connection of a feed."""

    def __init__(self, bus: Bus, db: Database, durability: Durability) -> None:
        self._bus = bus
        self._db = db
        self._durability = durability
        self._name = ""
        self._lease: FeedLease
        self._accepted = 0
        self._durable = 0
        self._hold = pb.HOLD_REASON_UNSPECIFIED
        self._undurable: deque[tuple[int, dict[int, Position]]] = deque()
        self._publish_time: Timestamp | None
        self._traceparent: str
        self._clear_round()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False  # no further request will come
        self._error: Exception | None = None
        self._changed = asyncio.Event()  # there is something to tell the feed
        self._filled = asyncio.Event()  # there is something to append, or the end
        self._room = asyncio.Event()

    async def run(self, requests: Requests) -> AsyncIterator[pb.PublishQuotesResponse]:
        """Yield the progress whenever it has changed, until all is accepted."""
        opening = await anext(aiter(requests), pb.PublishQuotesRequest())
        check_feed(opening)
        self._name = opening.feed
        self._lease = await self._bus.open_feed(opening.feed, self._recorded)
        self._accepted = self._lease.accepted_through
        self._undurable.append((self._accepted, self._lease.held))
        self._note_durable()
        yield self._progress(next_batch=max(self._lease.lasts) + 1)
        self._reading = asyncio.create_task(self._read(requests))
        appending = asyncio.create_task(self._append())
        self._durability.changed.add(self._changed)
        try:
            async for response in self._report(appending):
                yield response
        finally:
            self._durability.changed.discard(self._changed)
            self._tell_hold(pb.HOLD_REASON_UNSPECIFIED)
            await end(self._reading, appending)

    def drain(self) -> None:
        """Read no more, accept what was read, and end the stream."""
        self._error = Draining()
        if self._reading:
            self._reading.cancel()

    def report(self, told: pb.Subscription) -> None:
        """Fill in whose feed it is, and whether it is held back."""
        told.feed = self._name
        told.hold = self._hold
        if self._hold:
            told.state = pb.SUBSCRIPTION_STATE_HELD

    async def _recorded(self) -> dict[int, Position]:
        async with self._db.connection() as conn:
            return await queries.bus_positions(conn, range(SHARDS))

    async def _report(
        self, append: asyncio.Task[None]
    ) -> AsyncIterator[pb.PublishQuotesResponse]:
        append.add_done_callback(lambda _: self._changed.set())
        told = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            done = append.done()  # before what is told, so that all of it is
            self._note_durable()
            if self._durability.outlives(self._lease.places):
                raise BackendUnavailable  # the feed shall ask what the bus still has
            progress = self._progress()
            if progress != told:
                yield progress
                told = progress
            if done:
                append.result()
                if self._error:
                    raise self._error
                return

    async def _read(self, requests: Requests) -> None:
        """Check requests and collect them; stop at the first that is refused."""
        try:
            previous = None
            async for request in requests:
                while (
                    self._quotes and self._quotes + len(request.quotes) > ROUND_QUOTES
                ):
                    self._room.clear()
                    await self._room.wait()
                if previous is not None and request.batch != previous + 1:
                    raise OutOfOrder(
                        f"batch {request.batch} follows batch {previous}; "
                        "number batches one by one",
                        expected=previous + 1,
                    )
                if request.batch == 0 or request.feed:
                    raise OutOfOrder(
                        "after the first message, every message carries a batch "
                        "number from 1 on and no feed name",
                        expected=(previous or self._accepted) + 1,
                    )
                check_quotes(request.quotes, request.batch)
                check_publish_time(request)
                self._collect(request)
                previous = request.batch
        except QuantplaneError as error:
            self._error = error
        finally:
            self._ended = True
            self._filled.set()

    def _collect(self, request: pb.PublishQuotesRequest) -> None:
        batch = request.batch
        lasts, firsts, parts = self._lease.lasts, self._firsts, self._parts
        for quote in request.quotes:
            key = quote.symbol.encode()
            shard = shard_of(key)
            if batch <= lasts[shard]:  # sent again after a cut: this shard has it
                continue
            firsts.setdefault(shard, batch)
            records = parts.setdefault(shard, {}).setdefault(key, [])
            records.append(framed(quote.SerializeToString()))
        self._last = batch
        self._publish_time = (
            request.publish_time if request.HasField("publish_time") else None
        )
        self._traceparent = sampled(request.traceparent) or self._traceparent
        self._quotes += len(request.quotes)
        self._filled.set()

    def _take_round(self) -> Round:
        taken = Round(
            self._last,
            self._firsts,
            self._parts,
            self._publish_time,
            self._traceparent,
        )
        self._clear_round()
        return taken

    def _clear_round(self) -> None:
        self._last = 0
        self._quotes = 0
        self._firsts: dict[int, int] = {}
        self._parts: dict[int, dict[bytes, list[bytes]]] = {}
        self._publish_time = None
        self._traceparent = ""

    async def _append(self) -> None:
        while self._last or not self._ended:
            await self._filled.wait()
            self._filled.clear()
            if self._last:
                batches = self._take_round()
                self._room.set()
                origin = tracing.origin_of(batches.traceparent)
                with tracing.together("append quotes", [origin]):
                    positions = await self._append_round(batches)
                QUOTES_ACCEPTED.add(batches.quote_count)
                self._accepted = max(self._accepted, batches.last)
                self._undurable.append((batches.last, positions))
                self._changed.set()
                if not self._last:  # else the next round says it
                    await self._note_accepted(next(iter(positions), 0))

    async def _append_round(self, batches: Round) -> dict[int, Position]:
        """Append until the bus has it, however long that takes."""
        while True:
            try:
                positions = await self._bus.append(self._lease, batches, self._accepted)
                self._tell_hold(pb.HOLD_REASON_UNSPECIFIED)
                return positions
            except buses.Replaced:
                raise FeedReplaced(self._lease.name) from None
            except buses.Forgotten:
                raise BackendUnavailable from None
            except buses.Full:
                self._tell_hold(pb.HOLD_REASON_BUS_FULL)
            except buses.UNAVAILABLE:
                self._tell_hold(pb.HOLD_REASON_BUS_UNAVAILABLE)
            await asyncio.sleep(RETRY_S)

    async def _note_accepted(self, shard: int) -> None:
        with suppress(*buses.UNAVAILABLE):
            await self._bus.note_accepted(self._lease, shard, self._accepted)

    def _tell_hold(self, hold: "pb.HoldReason.ValueType") -> None:
        if hold == self._hold:
            return
        if self._hold:
            FEEDS_HELD.add(-1, _name(self._hold))
        if hold:
            FEEDS_HELD.add(1, _name(hold))
            FEED_HOLDS.add(1, _name(hold))
        self._hold = hold
        self._changed.set()

    def _note_durable(self) -> None:
        while self._undurable and self._durability.covers(self._undurable[0][1]):
            self._durable = max(self._durable, self._undurable.popleft()[0])

    def _progress(self, next_batch: int = 0) -> pb.PublishQuotesResponse:
        return pb.PublishQuotesResponse(
            accepted_through=self._accepted,
            durable_through=self._durable,
            next_batch=next_batch,
            hold=self._hold,
        )


def _name(hold: "pb.HoldReason.ValueType") -> str:
    return pb.HoldReason.Name(hold).removeprefix("HOLD_REASON_")
