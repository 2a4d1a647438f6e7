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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from datetime import datetime
from hashlib import blake2b
from itertools import islice
from time import time
from typing import Any, NamedTuple

from google.protobuf.message import Message

from quantplane.v1 import GAP_CAUSE_COMPACTED, GAP_CAUSE_LOG_RESTORED
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.bus import Bus
from quantplane_server.db import Connection, Database
from quantplane_server.errors import Compacted
from quantplane_server.fanout import varint
from quantplane_server.origin import Origin
from quantplane_server.tasks import Outage
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import LOG_EVENTS

logger = logging.getLogger(__name__)

CHECK_BYTES = 8
PAGE = 1_000  # entries that a reader is given at a time
PAGE_BYTES = 256 << 10  # of them; the last one may be over it
KEPT = 4_096  # entries that a process remembers of a log
KEPT_BYTES = 16 << 20
POLL_S = 1.0
RETRY_S = 0.5
OUTBOX_BYTES = 16 << 20  # that wait to be told; more is left to the followers' polls
TRIM_ROWS = 10_000  # deleted in a statement
TRIMS = 20  # statements per log and run
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


NOTHING = bytes(CHECK_BYTES)  # the check where there is no entry
START = Position(0, NOTHING)


class Entry:
    """An event as it stands in the log; one object for all readers of a process."""

    __slots__ = ("message", "position", "wire")

    def __init__(self, kind: type[Any], revision: int, payload: bytes) -> None:
        self.position = Position(revision, check_of(payload))
        self.wire = payload + REVISION + varint(revision)
        self.message: Any = kind.FromString(self.wire)


def check_of(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=CHECK_BYTES).digest()


# --- The tables ---------------------------------------------------------------------


async def append(
    conn: Connection,
    log: str,
    events: Sequence[Event],
    before: str = "before AS (SELECT)",
    arguments: Sequence[Any] = (),
) -> int:
    """Append events as the last statement of a transaction; return the first revision.

    There is at least one event. Who appends to several logs does so in the order of
    their names. What else can be done by the same statement, before the log is locked,
    saves a round trip: `before` is a list of common table expressions, of which the
    last has this name and one row; its parameters begin with $8.
    """
    columns = zip(*events, strict=True)
    first: int = await conn.fetchval(
        f"""
        WITH {before}, head AS (
            INSERT INTO log_head AS h (log, revision)
            SELECT $1::text, $2::bigint FROM before
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
        *arguments,
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
    if row is None:
        return START
    revision, payload = row
    return Position(revision, NOTHING if payload is None else check_of(payload))


async def heads(conn: Connection) -> dict[str, int]:
    """Return the revision that each log is at."""
    rows = await conn.fetch("SELECT log, revision FROM log_head ORDER BY log")
    return dict(map(tuple, rows))


async def read(conn: Connection, log: str, after: Position) -> list[tuple[int, bytes]]:
    """Return (revision, payload) of the next entries, at most a page.

    Raises Compacted unless the log goes on, unbroken, from this position. To tell, the
    entry that is there is read again.
    """
    rows = await conn.fetch(
        """
        SELECT revision, payload
          FROM (SELECT revision, payload,
                       sum(octet_length(payload)) FILTER (WHERE revision > $2)
                       OVER (ORDER BY revision
                             ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes
                  FROM event_log WHERE log = $1 AND revision >= $2
                 ORDER BY revision LIMIT $3) AS entry
         WHERE coalesce(bytes, 0) < $4 ORDER BY revision
        """,
        log,
        after.revision,
        PAGE + 1,
        PAGE_BYTES,
    )
    entries = [(row["revision"], row["payload"]) for row in rows]
    there = NOTHING
    if entries and entries[0][0] == after.revision:
        there = check_of(entries.pop(0)[1])
    if there != after.check and (there != NOTHING or not entries):
        raise Compacted(GAP_CAUSE_LOG_RESTORED)
    if there != after.check or (entries and entries[0][0] != after.revision + 1):
        raise Compacted(GAP_CAUSE_COMPACTED, oldest=entries[0][0])
    return entries[:PAGE]


async def behind(conn: Connection, log: str, revision: int) -> tuple[int, float]:
    """Return how many entries a log has after a revision.

    With it, for how many seconds the oldest of them has been there.
    """
    row = await conn.fetchrow(
        """
        SELECT head.revision - $2 AS entries,
               coalesce(extract(epoch FROM clock_timestamp() - next.time), 0)::float8
               AS lag_s
          FROM log_head AS head
               LEFT JOIN LATERAL (SELECT time FROM event_log
                                   WHERE log = head.log AND revision > $2
                                   ORDER BY revision LIMIT 1) AS next ON true
         WHERE head.log = $1
        """,
        log,
        revision,
    )
    return (max(0, row["entries"]), max(0.0, row["lag_s"])) if row else (0, 0.0)


async def trim(conn: Connection, log: str, since: datetime) -> int:
    """Delete the oldest entries from before a time, at most TRIM_ROWS; return how many.

    The last of them stays, so that who has all of them can go on. What is left has no
    holes.
    """
    tag = await conn.execute(
        """
        WITH oldest AS (
            SELECT revision, time FROM event_log
             WHERE log = $1 ORDER BY revision LIMIT $3 + 1
        )
        DELETE FROM event_log
         WHERE log = $1
           AND revision < (SELECT coalesce(min(revision) FILTER (WHERE time >= $2) - 1,
                                           max(revision))
                             FROM oldest)
        """,
        log,
        since,
        TRIM_ROWS,
    )
    return int(tag.rpartition(" ")[2])


async def trim_logs(db: Database, since: datetime | None) -> str:
    """Trim every log, a bounded part per run; return what was removed, for people.

    Without `since` all is kept.
    """
    if since is None:
        return "kept without end"
    async with db.connection() as conn:
        logs = await conn.fetch("SELECT log FROM log_head ORDER BY log")
        trimmed = {log: await _trim(conn, log, since) for (log,) in logs}
    told = [
        f"{log}: {entries:,} entries" for log, entries in trimmed.items() if entries
    ]
    return ", ".join(told) or "nothing to remove"


async def _trim(conn: Connection, log: str, since: datetime) -> int:
    entries = 0
    for _ in range(TRIMS):
        trimmed = await trim(conn, log, since)
        entries += trimmed
        if trimmed < TRIM_ROWS:
            break
    return entries


# --- Following ----------------------------------------------------------------------


class Behind(NamedTuple):
    """How far a reader is from the end of a log."""

    near: bool  # what it lacks is remembered, so it need not read the table
    entries: int = 0  # it lacks
    lag_s: float = 0.0  # the age of the first of them, at least


class Tail:
    """The end of a log, followed by one task for all readers of a process."""

    def __init__(self, db: Database, log: str, kind: type[Any]) -> None:
        self.bells: list[Callable[[], None]] = []  # of its readers
        self._db = db
        self._log = log
        self._kind = kind
        self._start: Position | None = None  # of what is kept; None: to be found
        self._kept: deque[Entry] = deque()
        self._kept_bytes = 0
        self._stale = asyncio.Event()
        known = databases.UNAVAILABLE
        self._outage = Outage(logger, f"reading the log of {log}", known)
        self._task = asyncio.create_task(self._follow())

    def refresh(self) -> None:
        """Read what may have been missed."""
        self._stale.set()

    def close(self) -> None:
        self._task.cancel()

    def push(self, first: int, payloads: Sequence[bytes]) -> None:
        """Take what was committed if it is the next, else read what is missing."""
        end = self._end
        if end and payloads and first == end.revision + 1:
            self._keep(enumerate(payloads, first))
        elif not payloads or not self._has(first + len(payloads) - 1, payloads[-1]):
            self._stale.set()

    def behind(self, position: Position) -> Behind:
        """Return how far a reader is behind that has all up to a position."""
        if not self._end:
            return Behind(near=True)
        entries = max(0, self._end.revision - position.revision)
        if not entries:
            return Behind(near=True)
        kept = self._kept_through(position)
        # Who is further behind than what is kept lags by more than its oldest.
        oldest = self._kept[kept or 0].message.time if self._kept else None
        lag_s = time() - oldest.ToNanoseconds() / 1e9 if oldest else 0.0
        return Behind(kept is not None, entries, max(0.0, lag_s))

    async def read(self, after: Position) -> list[Entry]:
        """Return the next entries, at most a page; none at the end of the log.

        Raises Compacted unless the log goes on, unbroken, from this position.
        """
        kept = self._kept_through(after)
        if kept is not None:
            return _page(islice(self._kept, kept, None))
        async with self._db.connection() as conn:
            rows = await read(conn, self._log, after)
        return [Entry(self._kind, *row) for row in rows]

    @property
    def reached(self) -> int:
        """Through which revision its readers can be given entries."""
        return self._end.revision if self._end else 0

    @property
    def _end(self) -> Position | None:
        return self._kept[-1].position if self._kept else self._start

    def _has(self, revision: int, payload: bytes) -> bool:
        return self._kept_through(Position(revision, check_of(payload))) is not None

    def _kept_through(self, position: Position) -> int | None:
        """Return how many of those kept reach to a position; None: it is not here."""
        if not self._start:
            return None
        number = position.revision - self._start.revision
        if not 0 <= number <= len(self._kept):
            return None
        here = self._kept[number - 1].position if number else self._start
        return number if here == position else None

    async def _follow(self) -> None:
        while self.bells:
            self._stale.clear()
            with self._outage:
                await self._catch_up()
                self._outage.over()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._stale.wait()
                continue
            await asyncio.sleep(RETRY_S)

    async def _catch_up(self) -> None:
        async with self._db.connection() as conn:
            try:
                while self._end and (rows := await read(conn, self._log, self._end)):
                    self._keep(rows)
            except Compacted:  # each reader learns from its own position what it misses
                self._start = None
                self._kept.clear()
                self._kept_bytes = 0
            if not self._start:
                self._start = await head(conn, self._log)
                self._ring()

    def _keep(self, rows: Iterable[tuple[int, bytes]]) -> None:
        for revision, payload in rows:
            if not self._end or revision <= self._end.revision:
                continue  # pushed while it was read
            entry = Entry(self._kind, revision, payload)
            self._kept.append(entry)
            self._kept_bytes += len(entry.wire)
            while len(self._kept) > KEPT or self._kept_bytes > KEPT_BYTES:
                oldest = self._kept.popleft()
                self._kept_bytes -= len(oldest.wire)
                self._start = oldest.position
        self._ring()

    def _ring(self) -> None:
        for ring in self.bells:
            ring()


def _page(entries: Iterable[Entry]) -> list[Entry]:
    page: list[Entry] = []
    size = 0
    for entry in islice(entries, PAGE):
        page.append(entry)
        size += len(entry.wire)
        if size >= PAGE_BYTES:
            break
    return page


class Logs:
    """The logs that this process appends to and has readers of."""

    def __init__(
        self, db: Database, bus: Bus, kinds: Mapping[str, type[Message]]
    ) -> None:
        self._db = db
        self._bus = bus
        self._kinds = kinds  # what each log consists of
        self._tails: dict[str, Tail] = {}
        self._outbox: deque[tuple[str, int, Sequence[bytes], Origin]] = deque()
        self._outbox_bytes = 0
        self._posted = asyncio.Event()
        self._followed = asyncio.Event()  # set while there is a tail
        self._telling = Outage(logger, "telling of the logs", buses.UNAVAILABLE)
        self._hearing = Outage(logger, "hearing of the logs", buses.UNAVAILABLE)

    async def run(self) -> None:
        """Tell other processes what is committed here, and hear them."""
        work = _again(self._tell, self._telling), _again(self._hear, self._hearing)
        await asyncio.gather(*work, return_exceptions=True)  # hands every cancel on

    def committed(self, log: str, first: int, events: Sequence[Event]) -> None:
        """Hand on what was just committed. Never waits: it is only a hurry."""
        for event in events:
            LOG_EVENTS.add(1, log, event.type)
        payloads = [event.payload for event in events]
        if tail := self._tails.get(log):
            tail.push(first, payloads)
        size = sum(map(len, payloads))
        if self._outbox_bytes + size <= OUTBOX_BYTES:
            self._outbox.append((log, first, payloads, tracing.ids()))
            self._outbox_bytes += size
            self._posted.set()

    @contextmanager
    def following(self, log: str, ring: Callable[[], None]) -> Iterator[Tail]:
        """Share the tail of a log; `ring` is called when it has grown."""
        tail = self._tails.get(log)
        if tail is None:
            tail = self._tails[log] = Tail(self._db, log, self._kinds[log])
        tail.bells.append(ring)
        self._followed.set()
        try:
            yield tail
        finally:
            tail.bells.remove(ring)
            if not tail.bells:
                del self._tails[log]
                tail.close()
            if not self._tails:
                self._followed.clear()

    def reached(self) -> dict[str, int]:
        """Return how far each log that is followed here has come here."""
        return {log: tail.reached for log, tail in self._tails.items()}

    async def _tell(self) -> None:
        self._outbox.clear()  # the bus was away, so the followers poll
        self._outbox_bytes = 0
        while True:
            await self._posted.wait()
            self._posted.clear()
            await asyncio.sleep(0)  # whoever waits for the commit goes first
            while self._outbox:
                log, first, payloads, origin = self._outbox.popleft()
                self._outbox_bytes -= sum(map(len, payloads))
                with tracing.together(f"announce {log}", [origin]):
                    await self._bus.announce_entries(log, first, payloads)
                self._telling.over()

    async def _hear(self) -> None:
        while True:
            await self._followed.wait()
            async with aclosing(self._bus.follow_entries()) as news:
                async for told in news:
                    if not self._followed.is_set():
                        break
                    if told is None:
                        self._hearing.over()
                        for tail in self._tails.values():
                            tail.refresh()
                    elif told[0] in self._tails:
                        self._tails[told[0]].push(*told[1:])


async def _again(work: Callable[[], Awaitable[None]], outage: Outage) -> None:
    """Do what needs the bus, again and again."""
    while True:
        with outage:
            await work()
        await asyncio.sleep(RETRY_S)
