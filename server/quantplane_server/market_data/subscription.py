"""The server's side of StreamQuotes and SubscribeQuotes: one reader's stream.

    snapshot, history or token  →  catch up from the bus  →  live from the fan-out
                                        ↑       overflow or change      ↓
                                        └───────────────────────────────┘

`delivered` is, by shard, the position that the reader has been served through; it is
what a resume token carries. Each of the three beginnings sets it; catching up moves it
on to where the fan-out is; there the reader attaches. So there is no seam to miss or
double anything at, and a reader that overflows simply goes back one step.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from datetime import timedelta
from hashlib import blake2b
from time import time
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.bus import START, Bus, Entry, Position, unbroken
from quantplane_server.checks import seconds, time_us
from quantplane_server.db import Database
from quantplane_server.errors import Compacted, InvalidResumeToken, QuantplaneError
from quantplane_server.fanout import (
    TAKE_BYTES,
    Fanout,
    Latest,
    Lossless,
    Piece,
    Reader,
    framed,
)
from quantplane_server.market_data import queries
from quantplane_server.market_data.checks import check_change
from quantplane_server.market_data.place import Key, Place
from quantplane_server.stamps import accepted_s, sent, traceparent_of
from quantplane_server.streams import HEARTBEAT_S, goodbye, heartbeat
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import QUOTES_CONFLATED, QUOTES_DELIVERED
from quantplane_server.tokens import Tokens

HISTORY_ROWS = 2_000
LAST_SYMBOL = "\U0010ffff"  # behind every symbol, in the order of history
Request = pb.SubscribeQuotesRequest | pb.StreamQuotesRequest
MAX_CHANGES = 64  # that wait to be applied
DELIVERIES = (pb.DELIVERY_LATEST, pb.DELIVERY_LOSSLESS)


class Subscription:
    """One reader's stream of quotes. `messages` runs it; the rest steers it."""

    def __init__(
        self, bus: Bus, fanout: Fanout, db: Database, tokens: Tokens, request: Request
    ) -> None:
        self._bus = bus
        self._fanout = fanout
        self._db = db
        self._tokens = tokens
        self._request = request
        self._symbols: list[str] = []
        self._wanted = list(dict.fromkeys(request.symbols))  # once changes are applied
        self._changes: deque[list[str]] = deque()
        self._lossless = request.delivery == pb.DELIVERY_LOSSLESS
        self._interval_s = seconds(request.min_interval)
        self._heartbeat_s = seconds(request.heartbeat_interval) or HEARTBEAT_S
        self._ahead: int = getattr(request, "max_unacknowledged", 0)  # 0: no bound
        self._wake = asyncio.Event()
        self._queue = Lossless() if self._lossless else Latest(self._interval_s > 0)
        self._reader = Reader(self._queue, self._wake.set)
        self._needed: set[int] = set()
        self._place = Place()
        self._purpose = b""
        self._settled = False  # what precedes the place has all been delivered
        self._served_at = Timestamp()
        self._sequence = self._acknowledged = 0
        self._conflated = 0
        self._trace = tracing.stream()
        self._draining = False
        self._error: QuantplaneError | None = None
        self._beat_due = False
        self._beat_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._next_send = self._waking_at = 0.0

    # --- Steering, from outside ---

    def receive(self, request: pb.StreamQuotesRequest) -> None:
        """Take a later request: a change of symbols, an acknowledgement or both."""
        if request.symbols or request.add_symbols or request.remove_symbols:
            self._wanted = _changed(self._wanted, request)
            check_change(self._wanted, len(self._changes) < MAX_CHANGES)
            self._changes.append(self._wanted)
        read = min(request.acknowledge, self._sequence)
        self._acknowledged = max(self._acknowledged, read)
        self._wake.set()

    def fail(self, error: QuantplaneError) -> None:
        """End the stream with an error."""
        self._error = error
        self.drain()

    def drain(self) -> None:
        """End the stream with a Goodbye."""
        self._draining = True
        self._wake.set()

    def report(self, told: pb.Subscription) -> None:
        """Fill in how the stream fares."""
        told.keys = len(self._symbols)
        told.delivery = DELIVERIES[self._lossless]
        told.min_interval.FromTimedelta(timedelta(seconds=self._interval_s))
        told.heartbeat_interval.FromTimedelta(timedelta(seconds=self._heartbeat_s))
        told.acknowledged = self._acknowledged
        told.max_unacknowledged = self._ahead
        told.pending_bytes = self._queue.pending_bytes
        told.conflated_count = self._conflated + self._queue.conflated
        told.state = self._state()
        waits = len(self._queue)
        if told.state == pb.SUBSCRIPTION_STATE_CATCHING_UP:
            waits = self._entries_behind()
        told.pending_entries = waits
        told.lag.FromTimedelta(timedelta(seconds=max(0.0, self._lag_s())))

    def _state(self) -> pb.SubscriptionState.ValueType:
        if self._place.history:
            return pb.SUBSCRIPTION_STATE_HISTORY
        if not self._settled:
            return pb.SUBSCRIPTION_STATE_STARTING
        if self._reader.attached and not self._queue.overflowed:
            return pb.SUBSCRIPTION_STATE_LIVE
        return pb.SUBSCRIPTION_STATE_CATCHING_UP

    def _entries_behind(self) -> int:
        heads = self._fanout.heads
        delivered = self._place.delivered.items()
        return sum(max(0, heads.get(s, at).number - at.number) for s, at in delivered)

    def _lag_s(self) -> float:
        """Return how old the first is of what the reader was not given."""
        if self._place.history:
            return time() - self._place.history[0] / 1e6
        return time() - accepted_s(self._queue.oldest) if self._queue.oldest else 0.0

    # --- The stream ---

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield serialised responses until drained. Raises Compacted."""
        loop = asyncio.get_running_loop()
        self._beat_timer = loop.call_later(self._heartbeat_s, self._beat)
        try:
            async for message in self._begin():
                yield message
            while not self._draining:
                try:
                    async for message in self._go_on():
                        yield message
                except Compacted as lost:
                    if self._lossless:
                        raise
                    async for message in self._start_over(lost.cause):
                        yield message
            if self._error:
                raise self._error
            yield self._rest(event=goodbye())
        finally:
            for timer in (self._beat_timer, self._send_timer):
                if timer:
                    timer.cancel()
            self._fanout.detach(self._reader)
            self._fanout.release(self._needed)

    async def _begin(self) -> AsyncIterator[bytes]:
        """Set out from the token, from history, or from a snapshot."""
        await self._set_symbols(self._wanted)
        positions, records = await self._bus.snapshot(self._reader.keys)
        if self._request.resume_token:
            self._resume(self._request.resume_token, positions)
        elif self._request.HasField("start_time"):
            await self._set_out_in_history(time_us(self._request.start_time))
        else:
            self._place.delivered = positions
            async for message in self._present(self._symbols, records):
                yield message
            return
        self._settled = True
        yield self._subscribed(self._symbols, records)
        if self._place.history:
            async for message in self._history():
                yield message
            yield self._event(snapshot_complete=pb.SnapshotComplete())

    async def _go_on(self) -> AsyncIterator[bytes]:
        """Catch up, stay live as long as that goes, apply changes."""
        async for message in self._catch_up():
            yield message
        async for message in self._live():
            yield message
        while self._changes and not self._draining:
            async for message in self._change(self._changes[0]):
                yield message
            self._changes.popleft()

    # --- Beginnings ---

    def _resume(self, token: bytes, heads: dict[int, Position]) -> None:
        payload = self._tokens.open(self._purpose, token)
        if payload is None:
            raise InvalidResumeToken
        self._place = Place.decode(payload)
        self._check_place(heads)

    async def _present(
        self, symbols: list[str], records: dict[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        """Deliver the snapshot of symbols that the place is already behind."""
        self._settled = False
        yield self._subscribed(symbols, records)
        for payload in _joined(records.values()):
            async for beat in self._credit():
                yield beat
            yield self._message(payload)
        self._settled = True
        yield self._event(snapshot_complete=pb.SnapshotComplete())

    async def _start_over(self, cause: pb.GapCause.ValueType) -> AsyncIterator[bytes]:
        """Say what is missing, then deliver a fresh snapshot."""
        self._fanout.detach(self._reader)
        self._queue.clear()
        self._reader.lost = None
        self._settled = False
        gap = pb.Gap(start_time=self._served_at, end_time=_now(), cause=cause)
        yield self._event(gap=gap)
        positions, records = await self._bus.snapshot(self._reader.keys)
        self._place = Place(positions)
        async for message in self._present(self._symbols, records):
            yield message

    async def _set_out_in_history(self, since_us: int) -> None:
        async with self._db.connection() as conn:
            known = await queries.bus_positions(conn, self._needed)
        delivered = {shard: known.get(shard, START) for shard in self._needed}
        self._place = Place(delivered, (since_us - 1, LAST_SYMBOL))

    async def _history(self) -> AsyncIterator[bytes]:
        """Deliver the rows after the place in history, until there are no more.

        Each page is a snapshot of the database, rows and positions. A quote that was
        recorded between two pages is in the later one if it belongs behind what was
        delivered before; if not, it is delivered from the bus.
        """
        while (last := self._place.history) and not self._draining:
            async for beat in self._credit():
                yield beat
            async with self._db.transaction("repeatable_read", readonly=True) as conn:
                known = await queries.bus_positions(conn, self._needed)
                page = await queries.quotes_after(
                    conn, self._symbols, *last, HISTORY_ROWS
                )
            quotes: list[pb.Quote] = []
            for shard, position in known.items():
                quotes += await self._late(shard, position, last)
            quotes += page
            self._place.delivered.update(known)
            self._place.history = _key(page[-1]) if len(page) == HISTORY_ROWS else None
            if quotes:
                records = [framed(quote.SerializeToString()) for quote in quotes]
                yield self._message(b"".join(records))

    async def _late(self, shard: int, until: Position, last: Key) -> list[pb.Quote]:
        """Return the quotes up to a position that history has already passed."""
        late: list[pb.Quote] = []
        async for entry in self._entries(shard, self._place.delivered[shard], until):
            piece = Piece.cut(entry, self._reader.keys)
            quotes = pb.StreamQuotesResponse.FromString(piece.joined).quotes
            late += [quote for quote in quotes if _key(quote) <= last]
        return late

    # --- Going on ---

    async def _catch_up(self) -> AsyncIterator[bytes]:
        """Read from the bus up to where the fan-out is, then attach to it."""
        self._queue.clear()
        reader = self._reader
        reader.reached = dict(self._place.delivered)
        while behind := self._behind():
            for shard in behind:
                for entry in await self._read(shard, reader.reached[shard]):
                    reader.push(shard, Piece.cut(entry, reader.keys))
                    if self._lossless and self._queue.bytes >= TAKE_BYTES:
                        async for message in self._taken():
                            yield message
                if not self._queue:  # nothing in all this was for us
                    self._place.delivered.update(reader.reached)
            if self._draining:
                return
        self._fanout.attach(reader)

    async def _live(self) -> AsyncIterator[bytes]:
        """Yield what the fan-out pushes; return when something else is to be done."""
        while not (self._draining or self._changes):
            if self._reader.lost is not None:
                raise Compacted(self._reader.lost)
            if self._queue.overflowed:
                self._fanout.detach(self._reader)
                return
            if not self._has_credit():
                await self._woken()
            elif self._beat_due:
                if not self._queue:  # what the fan-out has read held nothing for us
                    self._place.delivered.update(self._passed())
                yield self._heartbeat()
            elif self._queue and self._may_send():
                yield self._take()
            else:
                await self._woken()

    async def _change(self, symbols: list[str]) -> AsyncIterator[bytes]:
        """Go on with other symbols, after a snapshot of those that are new.

        In the shards of the snapshot, the present symbols are first brought to its
        position, so that afterwards one position stands for old and new.
        """
        self._fanout.detach(self._reader)
        while self._queue and not self._queue.overflowed:
            async for message in self._taken():
                yield message
        present = set(self._symbols)
        added = [symbol for symbol in symbols if symbol not in present]
        positions, records = await self._bus.snapshot(s.encode() for s in added)
        self._check_place(positions)
        for shard in positions.keys() & self._place.delivered.keys():
            async for message in self._bring_to(shard, positions[shard]):
                yield message
        self._place.delivered.update(positions)
        await self._set_symbols(symbols)
        async for message in self._present(added, records):
            yield message

    async def _bring_to(self, shard: int, until: Position) -> AsyncIterator[bytes]:
        """Deliver what the present symbols have in a shard up to a position."""
        async for entry in self._entries(shard, self._place.delivered[shard], until):
            async for beat in self._credit():
                yield beat
            self._place.delivered[shard] = entry.position
            piece = Piece.cut(entry, self._reader.keys)
            if piece.parts:
                yield self._message(piece.joined, stamp=piece.stamp)

    async def _set_symbols(self, symbols: list[str]) -> None:
        self._symbols = symbols
        self._reader.keys = frozenset(symbol.encode() for symbol in symbols)
        shards = self._reader.shards
        await self._fanout.need(shards)
        self._fanout.release(self._needed)
        self._needed = shards
        for shard in self._place.delivered.keys() - shards:
            del self._place.delivered[shard]
        start = self._request.start_time
        terms = [str(self._lossless), str(time_us(start)), *sorted(symbols)]
        self._purpose = blake2b("\n".join(terms).encode(), digest_size=16).digest()

    # --- Reading the bus ---

    async def _entries(
        self, shard: int, after: Position, until: Position
    ) -> AsyncIterator[Entry]:
        """Yield the entries in (after, until]. Raises Compacted."""
        while after < until:
            for entry in await self._read(shard, after):
                if entry.position > until:
                    return
                after = entry.position
                yield entry

    async def _read(self, shard: int, after: Position) -> list[Entry]:
        """Read on from a position that is behind the head. Raises Compacted."""
        found = await self._bus.read(shard, after)
        entries = [*unbroken(after, found)]
        if entries:
            return entries
        if found and after < found[0].previous:
            raise Compacted(pb.GAP_CAUSE_COMPACTED, oldest=found[0].position)
        # It has seen what the bus has lost.
        oldest = found[0].position if found else "none"
        raise Compacted(pb.GAP_CAUSE_BUS_REBUILT, oldest=oldest)

    def _check_place(self, heads: Mapping[int, Position]) -> None:
        """Find out whether it has seen more than there is. Raises Compacted."""
        for shard, there in self._place.delivered.items():
            if there > heads.get(shard, there):
                raise Compacted(pb.GAP_CAUSE_BUS_REBUILT, oldest=heads[shard])

    def _behind(self) -> list[int]:
        """Return the shards in which the fan-out is further than the reader."""
        heads = self._fanout.heads
        return [s for s, at in self._reader.reached.items() if at < heads[s]]

    def _passed(self) -> dict[int, Position]:
        """Return where an attached reader is that has nothing pending."""
        heads = self._fanout.heads
        return {s: max(at, heads[s]) for s, at in self._reader.reached.items()}

    # --- Waiting ---

    async def _credit(self) -> AsyncIterator[bytes]:
        """Wait until a response may be sent; yield the heartbeat if one is due.

        Draining gives credit for the response at hand: its place is already moved.
        """
        while not (self._has_credit() or self._draining):
            await self._woken()
        if self._beat_due:
            yield self._heartbeat()

    def _has_credit(self) -> bool:
        unacknowledged = self._sequence - self._acknowledged
        return not self._ahead or unacknowledged < self._ahead

    def _may_send(self) -> bool:
        """Tell whether min_interval has passed; if not, wake up when it has."""
        if not self._interval_s:
            return True
        loop = asyncio.get_running_loop()
        if loop.time() >= self._next_send:
            self._next_send = loop.time() + self._interval_s
            return True
        if self._waking_at != self._next_send:
            self._waking_at = self._next_send
            self._send_timer = loop.call_at(self._waking_at, self._wake.set)
        return False

    def _beat(self) -> None:
        self._beat_due = True
        self._wake.set()
        loop = asyncio.get_running_loop()
        self._beat_timer = loop.call_later(self._heartbeat_s, self._beat)

    async def _woken(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    # --- Messages ---

    async def _taken(self) -> AsyncIterator[bytes]:
        async for beat in self._credit():
            yield beat
        yield self._take()

    def _take(self) -> bytes:
        taken = self._queue.take()
        self._conflated += taken.conflated
        self._place.delivered.update(taken.positions)
        payload = b"".join(taken.parts)
        return self._message(payload, taken.conflated, taken.stamp, taken.traced)

    def _message(
        self,
        payload: bytes,
        conflated: int = 0,
        stamp: bytes = b"",
        traced: bytes = b"",
    ) -> bytes:
        """Return a response with these records."""
        QUOTES_DELIVERED.add(len(payload))
        if conflated:
            QUOTES_CONFLATED.add(conflated)
        if self._trace:
            self._trace.carries(traceparent_of(traced) if traced else "", conflated)
        rest = self._rest(conflated_count=conflated)
        stamps = sent(stamp, traced, self._served_at) if stamp else b""
        return payload + stamps + rest

    def _event(self, **event: Any) -> bytes:
        return self._rest(event=pb.StreamEvent(**event))

    def _rest(self, **fields: Any) -> bytes:
        """Return the response without records, which may stand before it."""
        self._sequence += 1
        self._served_at.GetCurrentTime()
        if self._settled:
            fields["resume_token"] = self._tokens.seal(
                self._purpose, self._place.encode()
            )
        response = pb.StreamQuotesResponse(sequence=self._sequence, **fields)
        return response.SerializeToString()

    def _subscribed(self, symbols: list[str], records: dict[bytes, bytes]) -> bytes:
        states = (pb.KEY_STATE_NO_DATA, pb.KEY_STATE_ACTIVE)
        keys = [
            pb.KeyStatus(key=s, state=states[s.encode() in records]) for s in symbols
        ]
        return self._event(subscribed=pb.Subscribed(keys=keys))

    def _heartbeat(self) -> bytes:
        self._beat_due = False
        return self._rest(event=heartbeat())


def _changed(symbols: list[str], request: pb.StreamQuotesRequest) -> list[str]:
    """Return the symbols as a request leaves them: replaced, added to, removed from."""
    removed = set(request.remove_symbols)
    wanted = dict.fromkeys([*(request.symbols or symbols), *request.add_symbols])
    return [symbol for symbol in wanted if symbol not in removed]


def _key(quote: pb.Quote) -> Key:
    return time_us(quote.time), quote.symbol


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now


def _joined(records: Iterable[bytes]) -> Iterator[bytes]:
    """Join records to payloads of about TAKE_BYTES."""
    parts: list[bytes] = []
    size = 0
    for record in records:
        parts.append(record)
        size += len(record)
        if size >= TAKE_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)
