"""The durable log: what happened, numbered without gaps in the order of commits.

`append` is the last statement of the transaction whose change it tells. It holds the
lock of the log's head until the commit, so a revision is only given once the one before
it is committed: whoever has seen one has seen, or can read, all before it. (A sequence
would give numbers in another order than that of the commits.)

The database is the truth. What is committed is also handed on over the bus, which makes
followers hurry; a follower that sees a hole, or nothing for a second, reads the table.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from google.protobuf.message import Message

from quantplane.v1 import GAP_CAUSE_COMPACTED, GAP_CAUSE_LOG_RESTORED
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.bus import Bus
from quantplane_server.db import Connection, Database
from quantplane_server.errors import Compacted
from quantplane_server.fanout import varint

logger = logging.getLogger(__name__)

CHECK_BYTES = 8
PAGE = 1_000  # entries read in one statement
KEPT = 4_096  # entries that a process remembers of a log
KEPT_BYTES = 16 << 20
POLL_S = 1.0
RETRY_S = 0.5
OUTBOX = 1_000  # appends that wait to be told; more are left to the followers' polls
TRIM_ROWS = 10_000  # deleted in a statement
REVISION = b"\x08"  # the tag of field 1, which every event has for its revision


class Event(NamedTuple):
    """What is appended: a message of the log's type, without its revision."""

    type: str
    key: str  # of what it happened to
    payload: bytes
    actor: str = ""
    trace_id: str = ""


class Position(NamedTuple):
    """Through which entry of a log something reaches."""

    revision: int
    check: bytes  # of that entry's payload: another history has another one


class Entry:
    """An event as it stands in the log; one object for all readers of a process."""

    __slots__ = ("message", "position", "wire")

    def __init__(self, kind: type[Any], revision: int, payload: bytes) -> None:
        self.position = Position(revision, check_of(payload))
        self.wire = payload + REVISION + varint(revision)
        self.message: Any = kind.FromString(self.wire)


START = Position(0, bytes(CHECK_BYTES))


def check_of(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=CHECK_BYTES).digest()


# --- The tables ---------------------------------------------------------------------


async def append(conn: Connection, log: str, events: Sequence[Event]) -> int:
    """Append events as the last statement of a transaction; return the first revision.

    Who appends to several logs does so in the order of their names.
    """
    columns = zip(*events, strict=True)
    first: int = await conn.fetchval(
        """
        WITH head AS (
            INSERT INTO log_head AS h (log, revision) VALUES ($1, $2)
            ON CONFLICT (log) DO UPDATE SET revision = h.revision + excluded.revision
            RETURNING revision - $2 AS revision
        ), entries AS (
            INSERT INTO event_log
                   (log, revision, time, type, key, payload, actor, trace_id)
            SELECT $1, head.revision + number, clock_timestamp(),
                   type, key, payload, nullif(actor, ''), nullif(trace_id, '')
              FROM head, unnest($3::text[], $4::text[], $5::bytea[], $6::text[],
                                $7::text[])
                   WITH ORDINALITY
                   AS event (type, key, payload, actor, trace_id, number)
        )
        SELECT revision + 1 FROM head
        """,
        log,
        len(events),
        *map(list, columns),
    )
    return first


async def head(conn: Connection, log: str) -> Position:
    """Return where a log ends."""
    row = await conn.fetchrow(
        """
        SELECT revision, payload
          FROM log_head LEFT JOIN event_log USING (log, revision)
         WHERE log = $1
        """,
        log,
    )
    if row is None or not row["revision"]:
        return START
    return Position(row["revision"], check_of(row["payload"]))


async def read(
    conn: Connection, log: str, after: int, limit: int
) -> list[tuple[int, bytes]]:
    """Return (revision, payload) of the first entries behind a revision."""
    rows = await conn.fetch(
        """
        SELECT revision, payload FROM event_log
         WHERE log = $1 AND revision > $2 ORDER BY revision LIMIT $3
        """,
        log,
        after,
        limit,
    )
    return [(row["revision"], row["payload"]) for row in rows]


async def trim(conn: Connection, log: str, since: datetime) -> int:
    """Delete the oldest entries from before a time, but never the last one.

    At most TRIM_ROWS; return how many. What is left has no holes.
    """
    tag = await conn.execute(
        """
        WITH oldest AS (
            SELECT revision, time FROM event_log
             WHERE log = $1 ORDER BY revision LIMIT $3
        ), kept AS (
            SELECT min(revision) AS revision FROM oldest WHERE time >= $2
            UNION ALL SELECT max(revision) + 1 FROM oldest
            UNION ALL SELECT revision FROM log_head WHERE log = $1
        )
        DELETE FROM event_log
         WHERE log = $1 AND revision < (SELECT min(revision) FROM kept)
        """,
        log,
        since,
        TRIM_ROWS,
    )
    return int(tag.rpartition(" ")[2])


# --- Following ----------------------------------------------------------------------


class Tail:
    """The end of a log, followed by one task for all readers of a process."""

    def __init__(self, db: Database, log: str, kind: type[Any]) -> None:
        self.bells: list[Callable[[], None]] = []  # of its readers
        self._db = db
        self._log = log
        self._kind = kind
        self._head = -1  # the last revision seen here; -1: none yet
        self._kept: deque[Entry] = deque()
        self._kept_bytes = 0
        self._stale = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    def close(self) -> None:
        self._task.cancel()

    def push(self, first: int, payloads: Sequence[bytes]) -> None:
        """Take what was committed, if nothing is missing before it."""
        if self._head < 0 or first > self._head + 1 or not payloads:
            self._stale.set()  # read what is missing
            return
        for revision, payload in enumerate(payloads, first):
            if revision > self._head:
                self._keep(Entry(self._kind, revision, payload))
        self._ring()

    async def read(self, after: Position) -> list[Entry]:
        """Return the next entries; none at the end of the log. Raises Compacted."""
        if after.revision >= self._head >= 0:
            return []
        if self._kept and after.revision >= self._kept[0].position.revision - 1:
            oldest = self._kept[0].position.revision
            skipped = after.revision + 1 - oldest
            return list(islice(self._kept, skipped, skipped + PAGE))
        async with self._db.connection() as conn:
            rows = await read(conn, self._log, after.revision, PAGE)
        if rows and rows[0][0] != after.revision + 1:
            raise Compacted(GAP_CAUSE_COMPACTED, oldest=rows[0][0])
        return [Entry(self._kind, *row) for row in rows]

    async def verify(self, position: Position) -> None:
        """Raise Compacted unless the log goes on, unbroken, from this position."""
        async with self._db.connection() as conn:
            before = await read(conn, self._log, position.revision - 1, 1)
            end = await head(conn, self._log)
        if position.revision > end.revision:
            raise Compacted(GAP_CAUSE_LOG_RESTORED, oldest=end.revision)
        if not before or position == START:
            return
        ((revision, payload),) = before
        if revision > position.revision + 1:
            raise Compacted(GAP_CAUSE_COMPACTED, oldest=revision)
        if revision == position.revision and check_of(payload) != position.check:
            raise Compacted(GAP_CAUSE_LOG_RESTORED, oldest=revision)

    async def _follow(self) -> None:
        while True:
            self._stale.clear()
            try:
                await self._catch_up()
            except databases.UNAVAILABLE as error:
                logger.warning("the log can't be read, trying again: %r", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("following the log failed, trying again")
                await asyncio.sleep(RETRY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._stale.wait()

    async def _catch_up(self) -> None:
        async with self._db.connection() as conn:
            if self._head < 0:
                self._head = (await head(conn, self._log)).revision
            while rows := await read(conn, self._log, self._head, PAGE):
                self.push(rows[0][0], [payload for _, payload in rows])
                if len(rows) < PAGE:
                    break

    def _keep(self, entry: Entry) -> None:
        self._head = entry.position.revision
        self._kept.append(entry)
        self._kept_bytes += len(entry.wire)
        while len(self._kept) > KEPT or self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft().wire)

    def _ring(self) -> None:
        for ring in self.bells:
            ring()


class Logs:
    """The logs that this process appends to and has readers of."""

    def __init__(
        self, db: Database, bus: Bus, kinds: Mapping[str, type[Message]]
    ) -> None:
        self._db = db
        self._bus = bus
        self._kinds = kinds  # what each log consists of
        self._tails: dict[str, Tail] = {}
        self._outbox: deque[tuple[str, int, Sequence[bytes]]] = deque(maxlen=OUTBOX)
        self._posted = asyncio.Event()

    async def run(self) -> None:
        """Tell other processes what is committed here, and hear them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell())
            group.create_task(self._hear())

    def committed(self, log: str, first: int, events: Sequence[Event]) -> None:
        """Hand on what was just committed. Never waits: it is only a hurry."""
        payloads = [event.payload for event in events]
        if tail := self._tails.get(log):
            tail.push(first, payloads)
        self._outbox.append((log, first, payloads))
        self._posted.set()

    @contextmanager
    def following(self, log: str, ring: Callable[[], None]) -> Iterator[Tail]:
        """Share the tail of a log; `ring` is called when it has grown."""
        tail = self._tails.get(log)
        if tail is None:
            tail = self._tails[log] = Tail(self._db, log, self._kinds[log])
        tail.bells.append(ring)
        try:
            yield tail
        finally:
            tail.bells.remove(ring)
            if not tail.bells:
                del self._tails[log]
                tail.close()

    async def _tell(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._outbox:
                try:
                    await self._bus.announce_entries(*self._outbox.popleft())
                except buses.UNAVAILABLE:
                    self._outbox.clear()  # the followers poll
                    await asyncio.sleep(RETRY_S)

    async def _hear(self) -> None:
        while True:
            try:
                async for log, first, payloads in self._bus.follow_entries():
                    if tail := self._tails.get(log):
                        tail.push(first, payloads)
            except buses.UNAVAILABLE as error:
                logger.warning("the bus is away, trying again: %s", error)
            except Exception:
                logger.exception("following the logs failed, trying again")
            await asyncio.sleep(RETRY_S)
