"""The bus: keyed records in sharded Redis Streams, the write-ahead buffer of quotes.

A record is one serialised item, framed as a field of a repeated protobuf field, so
that records joined together are a message. An entry holds the records of many keys;
its positions are numbered without gaps. `bus.lua` has the atomic steps; this module
gives them names.

The bus answers before its disk has what it was told, so one that starts again may lack
the last entries. Each start begins an epoch, whose first entry names the one before it,
or what the database has, if that is more: who is there goes on, who had seen more knows
that it was lost, and who had seen less that it is not here.
"""

import asyncio
import zlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from hashlib import blake2b
from importlib.resources import files
from typing import Any, NamedTuple

import redis.asyncio as redis
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError,
    OutOfMemoryError,
    ResponseError,
    TimeoutError,
)

from quantplane_server.stamps import stamped
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.statements import Commands

SHARDS = 4  # each costs every round something; a Redis Cluster can use as many masters
UNAVAILABLE: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)

PAGE_ENTRIES = 64  # read per round trip by a reader that catches up
BLOCK_S = 5.0
TIMEOUT_S = 5.0
CONNECTIONS = 32  # per client
NEWS_S = 1.0
RECORDED = "quantplane:recorded"
CHANGED = "quantplane:changed"
LOGGED = "quantplane:logged"
NEWS_BYTES = 1 << 20
LIBRARY = "quantplane"
STAMP = b"\0"  # the key of an entry's stamp
BEFORE = b"\1"  # the key of the position before it


class Position(NamedTuple):
    """A place in a shard: after entry `number` of `epoch`. 0-0 is before the first."""

    epoch: int
    number: int

    @classmethod
    def parse(cls, text: bytes) -> "Position":
        epoch, _, number = text.partition(b"-")
        return cls(int(epoch), int(number))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


START = Position(0, 0)
Recorded = Callable[[], Awaitable[Mapping[int, Position]]]  # what the database has


class Entry(NamedTuple):
    position: Position
    appended: int  # bytes ever appended to the shard, this entry included
    parts: dict[bytes, bytes]  # key -> its records, joined
    stamp: bytes = b""  # of its round
    before: Position | None = None  # named by the first entry of an epoch

    @property
    def previous(self) -> Position:
        """The position that it follows: no entry lies between the two."""
        epoch, number = self.position
        return self.before or Position(epoch, number - 1)


def unbroken(after: Position, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries that follow a position, and each other, without a hole."""
    for entry in entries:
        if entry.previous != after:
            return
        after = entry.position
        yield entry


class FeedLease(NamedTuple):
    """What the bus knew of a feed when it opened."""

    name: str
    sessions: list[bytes]  # per shard
    lasts: list[int]  # per shard: the last batch it holds
    accepted_through: int  # every batch to here is on all its shards
    places: list[Position]  # per shard: the number of its last entry, in this epoch

    @property
    def held(self) -> dict[int, Position]:
        """The places of the shards that hold any of its batches."""
        return {s: place for s, place in enumerate(self.places) if self.lasts[s]}


class Round(NamedTuple):
    """The batches that are appended in one step: one entry per shard."""

    last: int  # the last batch in it
    firsts: dict[int, int]  # shard -> the first batch in it
    parts: dict[int, dict[bytes, list[bytes]]]  # shard -> key -> records
    publish_time: Timestamp | None = None  # of the last batch
    traceparent: str = ""  # of the last that was sampled

    @property
    def quote_count(self) -> int:
        return sum(sum(map(len, parts.values())) for parts in self.parts.values())


class Mark(NamedTuple):
    """How far a shard is recorded, and what need not be kept any longer."""

    shard: int
    position: Position
    appended: int  # bytes ever appended up to there
    trim_before: Position | None = None


class Backlog(NamedTuple):
    """What of a shard the database has not yet."""

    appended: int  # bytes, ever
    recorded: int  # bytes of these
    stamp: bytes  # of the first entry that is not recorded; b"" without any


class Full(Exception):
    """The bus has no room, or as much as it may that the database does not have."""


class Replaced(Exception):
    """A newer session of the feed has begun."""


class Forgotten(Exception):
    """The bus may have lost what the session appended: open the feed again."""


def shard_of(key: bytes) -> int:
    return zlib.crc32(key) % SHARDS


def by_shard(keys: Iterable[bytes]) -> dict[int, list[bytes]]:
    groups: dict[int, list[bytes]] = {}
    for key in keys:
        groups.setdefault(shard_of(key), []).append(key)
    return groups


class Bus:
    """A connection to the bus. Raises UNAVAILABLE's errors while it is away."""

    def __init__(self, url: str, cap_bytes: int) -> None:
        self._url = url
        self._cap_bytes = cap_bytes  # per shard, unrecorded
        self.cap_bytes = cap_bytes * SHARDS
        self._redis = _client(url, TIMEOUT_S)
        source = _source()
        # Each version's functions have names of their own: servers of several may run.
        version = blake2b(source.encode(), digest_size=4).hexdigest()
        self.library = f"{LIBRARY}_{version}"
        self._source = source.replace(LIBRARY, self.library)

    async def open(self) -> None:
        """Load the library, unless it is there."""
        try:
            await self._redis.function_load(self._source)
        except ResponseError as error:
            if "already exists" not in str(error):
                raise

    async def close(self) -> None:
        await self._redis.aclose()

    async def ping(self) -> None:
        await self._redis.ping()

    async def version(self) -> str:
        """Return what this is: "Valkey 9.1.0", or "Redis 7.4.1"."""
        info = await self.info()
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {info['redis_version']}"

    async def info(self) -> dict[str, Any]:
        """Return what INFO says."""
        info: dict[str, Any] = await self._redis.info()
        return info

    async def config(self, *names: str) -> dict[str, str]:
        """Return settings. Raises ResponseError where they are kept secret."""
        settings: Any = await self._redis.config_get(*names)
        return dict(settings)

    async def is_local(self) -> bool:
        """Tell whether this machine runs it, as far as addresses tell."""
        client: Any = await self._redis.client_info()
        here, there = client["addr"], client["laddr"]
        return bool(here.rpartition(":")[0] == there.rpartition(":")[0])

    async def open_feed(self, name: str, recorded: Recorded) -> FeedLease:
        """Begin a session of the feed and end all others.

        The first one of an epoch asks what the database has.
        """
        replies = await self._open_feed(name, [()] * SHARDS)
        if not all(replies):
            known = await recorded()
            positions = [str(known.get(shard, START)) for shard in range(SHARDS)]
            replies = await self._open_feed(name, [(each,) for each in positions])
        sessions, lasts, throughs, places = zip(*replies, strict=True)
        starts = [Position.parse(place) for place in places]
        return FeedLease(name, list(sessions), list(lasts), max(throughs), starts)

    async def _open_feed(self, name: str, args: Sequence[tuple[str, ...]]) -> list[Any]:
        return await self._calls(
            ("open_feed", _keys(shard, "meta", f"feed:{name}"), each)
            for shard, each in enumerate(args)
        )

    async def append(
        self, lease: FeedLease, batches: Round, through: int
    ) -> dict[int, Position]:
        """Append a round and return the positions, by shard, that contain it.

        `through` is the last batch known to be on all its shards. To append a round
        again is safe. Raises Full, Replaced or Forgotten; some shards may have it.
        """
        keys: list[str] = []
        args: list[Any] = [batches.last, through, self._cap_bytes]
        stamp = stamped(batches.publish_time, batches.traceparent)
        for shard, parts in batches.parts.items():
            keys += _keys(shard, "meta", "stream", "latest", f"feed:{lease.name}")
            args += [lease.sessions[shard], batches.firsts[shard], len(parts) + 1]
            args += [STAMP, b"", stamp]
            for key, records in parts.items():
                args += [key, b"".join(records[:-1]), records[-1]]
        if not keys:
            return {}
        try:
            (replies,) = await self._calls([("append", keys, args)])
        except OutOfMemoryError:
            raise Full from None
        positions = {}
        full = False
        for shard, (status, position) in zip(batches.parts, replies, strict=True):
            if status == b"REPLACED":
                raise Replaced
            if status == b"FORGOTTEN":
                raise Forgotten
            if status == b"FULL":
                full = True
            else:
                positions[shard] = Position.parse(position)
        if full:
            raise Full
        return positions

    async def note_accepted(self, lease: FeedLease, shard: int, through: int) -> None:
        """Keep that every batch to `through` is on all its shards."""
        keys = _keys(shard, "meta", f"feed:{lease.name}")
        args = (lease.sessions[shard], through)
        await self._calls([("note_accepted", keys, args)])

    async def heads(self, shards: Iterable[int]) -> dict[int, Position]:
        """Return the positions of the last entries."""
        shards = list(shards)
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in shards:
                pipe.hmget(_key(shard, "meta"), "epoch", "number")
            states = await pipe.execute()
        return {
            shard: Position(int(epoch), int(number)) if int(number or 0) else START
            for shard, (epoch, number) in zip(shards, states, strict=True)
        }

    async def snapshot(
        self, keys: Iterable[bytes]
    ) -> tuple[dict[int, Position], dict[bytes, bytes]]:
        """Return the latest record of each key that has one, and as of where."""
        groups = by_shard(keys)
        replies = await self._calls(
            ("snapshot", _keys(shard, "meta", "latest"), group)
            for shard, group in groups.items()
        )
        positions = {}
        records: dict[bytes, bytes] = {}
        for (shard, group), (position, found) in zip(
            groups.items(), replies, strict=True
        ):
            positions[shard] = Position.parse(position)
            pairs = zip(group, found, strict=True)
            records.update((key, record) for key, record in pairs if record)
        return positions, records

    async def read(self, shard: int, after: Position) -> list[Entry]:
        """Return the next entries, at most PAGE_ENTRIES."""
        raw: Any = await self._redis.xrange(
            _key(shard, "stream"), min=f"({after}", count=PAGE_ENTRIES
        )
        return [_entry(*item) for item in raw]

    async def follow(
        self, positions: Mapping[int, Position]
    ) -> AsyncGenerator[tuple[int, list[Entry]], None]:
        """Yield the entries after `positions`, by shard, as they come.

        The caller moves the positions on before it asks for more.
        """
        shards = {_key(shard, "stream").encode(): shard for shard in positions}
        client = _client(self._url, BLOCK_S + TIMEOUT_S)
        task = asyncio.current_task()
        try:
            # Connecting may lose a cancellation, and a quiet bus never wakes us.
            while not (task and task.cancelling()):
                places: Any = {
                    key: str(positions[shard]) for key, shard in shards.items()
                }
                reply: Any = await client.xread(
                    places, count=256, block=int(BLOCK_S * 1_000)
                )
                for key, raw in reply:
                    yield shards[key], [_entry(*item) for item in raw]
        finally:
            await client.aclose()

    async def mark_recorded(self, marks: Sequence[Mark]) -> None:
        """Tell every server what the database has; drop what no one needs."""
        keys: list[str] = []
        args: list[Any] = [RECORDED]
        for mark in marks:
            keys += _keys(mark.shard, "meta", "stream")
            args += [mark.shard, str(mark.position), mark.appended]
            args += [str(mark.trim_before or "")]
        await self._calls([("mark_recorded", keys, args)])

    async def backlog(self) -> list[Backlog]:
        """Return what of each shard is not recorded yet."""
        replies = await self._calls(
            ("backlog", _keys(shard, "meta", "stream"), ()) for shard in range(SHARDS)
        )
        return [
            Backlog(int(appended), int(recorded), stamp)
            for appended, recorded, stamp in replies
        ]

    async def follow_recorded(self) -> AsyncIterator[dict[int, Position]]:
        """Yield what is recorded, by shard: all that is known, then each change.

        The number is that of the last entry recorded, the epoch the present one. When
        no news came for a while it asks again: news may be lost, facts are not.
        """
        async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
            await news.subscribe(RECORDED)
            while True:
                known = await self._calls(
                    ("recorded", _keys(shard, "meta"), ()) for shard in range(SHARDS)
                )
                yield {s: Position.parse(at) for s, at in enumerate(known)}
                while message := await news.get_message(timeout=NEWS_S):
                    words = message["data"].split()
                    pairs = zip(words[::2], words[1::2], strict=True)
                    yield {int(s): Position.parse(at) for s, at in pairs}

    async def announce_changes(self, topics: Iterable[str]) -> None:
        """Tell every process that state in the database has changed."""
        await self._redis.publish(CHANGED, "\n".join(topics))

    async def follow_changes(self) -> AsyncIterator[set[str] | None]:
        """Yield the topics that change; at first None, for all that may have."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
            await news.subscribe(CHANGED)
            await news.get_message(timeout=TIMEOUT_S)  # says that it is in force
            yield None
            while True:
                if message := await news.get_message(timeout=BLOCK_S):
                    yield set(message["data"].decode().split("\n"))

    async def announce_entries(
        self, log: str, first: int, payloads: Sequence[bytes]
    ) -> None:
        """Tell every process what was appended to a log, or only that it grew."""
        if sum(map(len, payloads)) > NEWS_BYTES:
            payloads = ()
        parts = [log.encode(), first.to_bytes(8, "big"), *payloads]
        await self._redis.publish(LOGGED, _packed(parts))

    async def follow_entries(
        self,
    ) -> AsyncGenerator[tuple[str, int, Sequence[bytes]] | None, None]:
        """Yield what is announced: the log, the first revision, the payloads.

        At first None: what was announced before it is not told.
        """
        async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
            await news.subscribe(LOGGED)
            await news.get_message(timeout=TIMEOUT_S)  # says that it is in force
            yield None
            while True:
                if message := await news.get_message(timeout=BLOCK_S):
                    log, first, *payloads = _unpacked(message["data"])
                    yield log.decode(), int.from_bytes(first, "big"), payloads

    async def _calls(
        self, calls: Iterable[tuple[str, list[str], Iterable[Any]]]
    ) -> list[Any]:
        """Call functions in one round trip, loading them where they are missing."""
        calls = list(calls)
        async with self._redis.pipeline(transaction=False) as pipe:
            for name, keys, args in calls:
                pipe.fcall(f"{self.library}_{name}", len(keys), *keys, *args)
            replies = await pipe.execute(raise_on_error=False)
        for error in replies:
            if isinstance(error, ResponseError) and "not found" in str(error):
                await self.open()
                return await self._calls(calls)
            if isinstance(error, Exception):
                raise error
        return replies


def _source() -> str:
    return files("quantplane_server").joinpath("bus.lua").read_text()


def _client(url: str, timeout_s: float) -> redis.Redis:
    # RESP2 parses faster; whoever calls knows better when to try again.
    # Who finds all connections in use waits for one.
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=timeout_s,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout_s,
    )
    return (Commands if tracing.tracer else redis.Redis).from_pool(pool)


def _key(shard: int, name: str) -> str:
    return f"quantplane:{{q{shard}}}:{name}"


def _keys(shard: int, *names: str) -> list[str]:
    return [_key(shard, name) for name in names]


def _entry(position: bytes, parts: dict[bytes, bytes]) -> Entry:
    appended, stamp = int(parts.pop(b"")), parts.pop(STAMP, b"")
    before = parts.pop(BEFORE, None)
    named = Position.parse(before) if before else None
    return Entry(Position.parse(position), appended, parts, stamp, named)


def _packed(parts: Iterable[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _unpacked(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : end]
        start = end
