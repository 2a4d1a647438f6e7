"""One reader of the bus per process, and the queues of its many subscribers.

The fan-out follows the shards that its subscribers need. For each entry it works out
once what each distinct set of keys gets of it, and pushes that to the queues of all
subscribers with this set: a push never waits, so no subscriber holds up another.
The two queues differ in what they do with a reader that is too slow:

- Lossless drops what is pending and says `overflowed`; its reader then catches up from
  the bus, at its own pace, and attaches again. It holds no memory meanwhile.
- Latest keeps, per key, only the last record, and counts the ones it left out.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from typing import NamedTuple

from quantplane.v1 import GAP_CAUSE_BUS_REBUILT, GAP_CAUSE_COMPACTED, GapCause
from quantplane_server.bus import UNAVAILABLE, Bus, Entry, Position, shard_of
from quantplane_server.stamps import UNTRACED_BYTES
from quantplane_server.tasks import Outage
from quantplane_server.telemetry import tracing

logger = logging.getLogger(__name__)

LOSSLESS_PENDING_BYTES = 4 << 20  # mostly shared: queues of one view refer to the same
LATEST_PENDING_BYTES = 256 << 10
TAKE_BYTES = 256 << 10  # a response of about this size
RETRY_S = 0.2


class Piece(NamedTuple):
    """What a set of keys gets of an entry, and nothing else of it."""

    position: Position
    parts: dict[bytes, bytes]  # key -> its records, joined
    joined: bytes  # all of them
    stamp: bytes

    @classmethod
    def cut(cls, entry: Entry, keys: frozenset[bytes]) -> "Piece":
        parts = entry.parts
        found = keys.intersection(parts)
        if len(found) < len(parts):
            parts = {key: parts[key] for key in found}
        return cls(entry.position, parts, b"".join(parts.values()), entry.stamp)


class Taken(NamedTuple):
    """What a queue hands to its reader."""

    parts: list[bytes]  # records, joined
    positions: dict[int, Position]  # by shard: these parts reach to here
    conflated: int  # records left out
    stamp: bytes  # of the newest entry
    traced: bytes  # of the newest entry with a traceparent, if there is one


class Lossless:
    """Every record, in order, or `overflowed`."""

    def __init__(self) -> None:
        self.overflowed = False
        self._pending: deque[tuple[int, Position, bytes, bytes]] = deque()
        self._dropped = b""  # the stamp of the first entry of these
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._pending)

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def oldest(self) -> bytes:
        """The stamp of the first entry that is pending, or was dropped; or b""."""
        return self._pending[0][-1] if self._pending else self._dropped

    @property
    def conflated(self) -> int:
        """How many records are left out of what is pending."""
        return 0

    @property
    def pending_bytes(self) -> int:
        return self.bytes

    def push(self, shard: int, piece: Piece) -> None:
        if self.overflowed:
            return
        self.bytes += len(piece.joined)
        if self.bytes > LOSSLESS_PENDING_BYTES:
            oldest = self.oldest
            self.clear()
            self.overflowed = True
            self._dropped = oldest
        else:
            self._pending.append((shard, piece.position, piece.joined, piece.stamp))

    def take(self) -> Taken:
        parts: list[bytes] = []
        positions = {}
        stamp = traced = b""
        size = 0
        while self._pending and size < TAKE_BYTES:
            shard, position, part, stamp = self._pending.popleft()
            parts.append(part)
            positions[shard] = position
            if len(stamp) > UNTRACED_BYTES:
                traced = stamp
            size += len(part)
        self.bytes -= size
        return Taken(parts, positions, 0, stamp, traced)

    def clear(self) -> None:
        self._pending.clear()
        self.bytes = 0
        self.overflowed = False
        self._dropped = b""


class Latest:
    """Every record while the reader keeps up, else the last one of each key."""

    overflowed = False

    def __init__(self, conflate_always: bool) -> None:
        self._always = conflate_always
        self.oldest: bytes
        self.clear()

    def __bool__(self) -> bool:
        return bool(self._pending or self._latest)

    def __len__(self) -> int:
        return len(self._latest) or len(self._pending)

    @property
    def pending_bytes(self) -> int:
        return self.bytes or sum(map(len, self._latest.values()))

    @property
    def conflated(self) -> int:
        """How many records are left out of what is pending."""
        return self._conflated

    def push(self, shard: int, piece: Piece) -> None:
        self._positions[shard] = piece.position
        self.oldest = self.oldest or piece.stamp
        self._stamp = piece.stamp
        if len(piece.stamp) > UNTRACED_BYTES:
            self._traced = piece.stamp
        self._pending.append(piece)
        self.bytes += len(piece.joined)
        if self._always or self._latest or self.bytes > LATEST_PENDING_BYTES:
            self._conflate()

    def take(self) -> Taken:
        parts = list(self._latest.values()) or [p.joined for p in self._pending]
        taken = Taken(
            parts, self._positions, self._conflated, self._stamp, self._traced
        )
        self.clear()
        return taken

    def clear(self) -> None:
        self._pending: list[Piece] = []
        self._latest: dict[bytes, bytes] = {}
        self._positions: dict[int, Position] = {}
        self.bytes = 0  # pending
        self._conflated = 0
        self._stamp = self._traced = b""
        self.oldest = b""  # the stamp of the first entry that is pending

    def _conflate(self) -> None:
        for piece in self._pending:
            for key, joined in piece.parts.items():
                records = split(joined)
                self._conflated += len(records) - 1 + (key in self._latest)
                self._latest[key] = records[-1]
        self._pending.clear()
        self.bytes = 0


class Reader:
    """A subscriber as the fan-out sees it: its keys, its queue, a bell."""

    def __init__(self, queue: Lossless | Latest, ring: Callable[[], None]) -> None:
        self.keys: frozenset[bytes] = frozenset()
        self.queue = queue
        self.ring = ring  # called after a push, and when something else happened
        self.reached: dict[int, Position] = {}  # by shard: pushed or read to here
        self.lost: GapCause.ValueType | None = None  # set: it can't go on from there
        self.attached = False  # it is pushed what comes

    @property
    def shards(self) -> set[int]:
        return {shard_of(key) for key in self.keys}

    def push(self, shard: int, piece: Piece) -> None:
        if piece.position > self.reached[shard]:  # else it has read ahead of the tail
            self.reached[shard] = piece.position
            if piece.parts:
                self.queue.push(shard, piece)
                self.ring()

    def lose(self, cause: GapCause.ValueType) -> None:
        """Say that it can't go on from where it is."""
        self.lost = cause
        self.ring()


class View:
    """A distinct set of keys and those who read it."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self.keys = keys
        self.readers: set[Reader] = set()


class Fanout:
    """Follows the bus for all readers of this process."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.heads: dict[int, Position] = {}  # of the shards that are followed
        self._views: dict[frozenset[bytes], View] = {}
        self._by_key: dict[bytes, set[View]] = {}
        self._wanted: Counter[int] = Counter()  # shard -> readers that need it
        self._starting = asyncio.Lock()
        self._tail: asyncio.Task[None] | None = None
        self._outage = Outage(logger, "following quotes", UNAVAILABLE)

    async def need(self, shards: set[int]) -> None:
        """Follow these shards until they are released as often as they were needed."""
        self._wanted.update(shards)
        async with self._starting:
            if new := shards - self.heads.keys():
                self.heads.update(await self._bus.heads(new))
                self._restart()

    def release(self, shards: set[int]) -> None:
        self._wanted.subtract(shards)
        if not self._wanted.total():
            self._stop()

    def attach(self, reader: Reader) -> None:
        """Push to `reader` from now on what comes after where it has reached."""
        view = self._views.get(reader.keys)
        if view is None:
            view = self._views[reader.keys] = View(reader.keys)
            for key in view.keys:
                self._by_key.setdefault(key, set()).add(view)
        view.readers.add(reader)
        reader.attached = True

    def detach(self, reader: Reader) -> None:
        reader.attached = False
        view = self._views.get(reader.keys)
        if view is None or reader not in view.readers:
            return
        view.readers.remove(reader)
        if not view.readers:
            del self._views[view.keys]
            for key in view.keys:
                self._by_key[key].remove(view)
                if not self._by_key[key]:
                    del self._by_key[key]

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._tail:
            self._tail.cancel()
            self._tail = None
        self.heads = {}

    def _restart(self) -> None:
        if self._tail:
            self._tail.cancel()
        self.heads = {s: head for s, head in self.heads.items() if self._wanted[s]}
        self._tail = asyncio.create_task(self._run())

    async def _run(self) -> None:
        tracing.apart()
        # Only the newest tail delivers: one that was cancelled at the wrong moment of
        # connecting goes on, and finds out here.
        me = asyncio.current_task()
        heads = self.heads
        while self._tail is me:
            with self._outage:
                found = await self._bus.heads(heads)
                if self._tail is not me:
                    return
                self._check_heads(found)
                self._outage.over()
                async with aclosing(self._bus.follow(heads)) as pages:
                    async for shard, entries in pages:
                        if self._tail is not me:
                            return
                        for entry in entries:
                            self._deliver(shard, entry)
            await asyncio.sleep(RETRY_S)

    def _check_heads(self, found: Mapping[int, Position]) -> None:
        """Find shards that went back behind what was already delivered."""
        for shard, head in found.items():
            if head < self.heads[shard]:
                self._go_back(shard, head)

    def _deliver(self, shard: int, entry: Entry) -> None:
        if entry.previous > self.heads[shard]:
            for reader in self._readers(shard):
                if reader.reached[shard] < entry.previous:
                    reader.lose(GAP_CAUSE_COMPACTED)
        if entry.before is not None:
            self._go_back(shard, entry.before)
        self.heads[shard] = entry.position
        views = {view for key in entry.parts for view in self._by_key.get(key, ())}
        for view in views:
            piece = Piece.cut(entry, view.keys)
            for reader in view.readers:
                reader.push(shard, piece)

    def _go_back(self, shard: int, head: Position) -> None:
        """Take note that a shard has lost what it had after `head`, if anything."""
        if head < self.heads[shard]:
            logger.warning(
                "shard %d of the bus went back from %s to %s: it has lost its end",
                *(shard, self.heads[shard], head),
            )
            self.heads[shard] = head
        for reader in self._readers(shard):
            if reader.reached[shard] > head:
                reader.lose(GAP_CAUSE_BUS_REBUILT)

    def _readers(self, shard: int) -> Iterator[Reader]:
        for view in self._views.values():
            yield from (reader for reader in view.readers if shard in reader.reached)


def split(records: bytes) -> list[bytes]:
    """Take joined records apart."""
    found = []
    start = 0
    while start < len(records):
        length = shift = 0
        at = start + 1  # after the tag
        while True:
            byte = records[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append(records[start : at + length])
        start = at + length
    return found


def framed(message: bytes) -> bytes:
    """Return a serialised item as a record: an element of repeated field 1."""
    return b"\x0a" + varint(len(message)) + message


def varint(value: int) -> bytes:
    if value < 0x80:
        return _SMALL[value]
    return bytes((value & 0x7F | 0x80,)) + varint(value >> 7)


_SMALL = [bytes((value,)) for value in range(0x80)]
