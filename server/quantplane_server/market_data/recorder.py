"""Writes what is on the bus into the database, exactly once.

A shard's position on the bus is a row in the database, moved in the transaction that
stores what lies before it: whatever is killed, the two agree. An advisory lock gives
each shard one recorder among all servers, and a position that is not where this
recorder left it means that another has taken over.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from math import inf
from time import time
from typing import NamedTuple

from asyncpg import UniqueViolationError

from quantplane import v1 as pb
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.bus import SHARDS, START, Bus, Entry, Mark, Position
from quantplane_server.db import Connection, Database
from quantplane_server.market_data import queries
from quantplane_server.market_data.queries import Encoded, Move, SymbolDay
from quantplane_server.tasks import Outage, end
from quantplane_server.telemetry.metrics import ROWS_RECORDED

logger = logging.getLogger(__name__)

Store = Callable[[Connection, bytes], Awaitable[None]]

COMMIT_BYTES = 1 << 19  # collected at most before they are committed
UPSERTS = 64  # commits that don't try COPY, after one that met existing rows
RETRY_S = 0.5
TAKE_OVER_S = 2.0  # between attempts to get shards that others record
MARKS = 64  # trims per replay window
KNOWN_DAYS = 100_000  # marked days remembered at most


class _TakenOver(Exception):
    """Another server records this shard now."""


KNOWN: tuple[type[Exception], ...] = (
    _TakenOver,
    *buses.UNAVAILABLE,
    *databases.UNAVAILABLE,
)


class _Shard:
    """A shard that this process records."""

    def __init__(self, number: int, position: Position) -> None:
        self.number = number
        self.position = position  # of the database
        self.collected: list[Entry] = []
        self._marks: deque[tuple[Position, int]] = deque()  # with bytes appended

    def trim_before(self, appended: int, window_bytes: int) -> Position | None:
        """Return the position that the replay window has moved past, if any."""
        if not self._marks or appended - self._marks[-1][1] > window_bytes // MARKS:
            self._marks.append((self.position, appended))
        passed = None
        while self._marks[0][1] < appended - window_bytes:
            passed = self._marks.popleft()[0]
        return passed


class _Batch(NamedTuple):
    """What one commit stores."""

    quotes: Encoded
    reach: list[tuple[_Shard, Entry, Entry]]  # its first and last entry by shard


class Recorder:
    """Records the shards that no other server records."""

    def __init__(self, bus: Bus, db: Database, window_bytes: int) -> None:
        self._bus = bus
        self._db = db
        self._window_bytes = window_bytes  # per shard, kept on the bus for replay
        self._shards: dict[int, _Shard] = {}
        self._collected_bytes = 0
        self._upserts = 0
        self._marked: set[SymbolDay] = set()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._committed = asyncio.Event()
        self._outage = Outage(logger, "recording", KNOWN)

    async def run(self) -> None:
        """Record until cancelled; what is on the bus then waits for the next one."""
        while True:
            with self._outage:
                async with self._db.session() as conn:
                    await self._record(conn)
            await asyncio.sleep(RETRY_S)

    async def flush(self) -> None:
        """Return once all is recorded that was on the bus, of the shards it records."""
        heads = await self._bus.heads(self._shards)
        while any(s.position < heads[n] for n, s in self._shards.items() if n in heads):
            self._committed.clear()
            await self._committed.wait()

    async def _record(self, conn: Connection) -> None:
        """Record with one connection, whose advisory locks are the claim."""
        self._shards = {}
        self._marked.clear()  # this may be another database, restored or failed over
        await queries.prepare_recorder(conn)
        while True:
            await self._claim(conn)
            if not self._shards:  # others record them all
                await asyncio.sleep(TAKE_OVER_S)
            elif len(self._shards) < SHARDS:
                await self._record_shards(conn, TAKE_OVER_S)
            else:
                await self._record_shards(conn, inf)

    async def _record_shards(self, conn: Connection, for_s: float) -> None:
        """Commit what comes; while one commit is under way, the next is prepared."""
        self._drop_collected()
        follow = asyncio.create_task(self._follow())
        follow.add_done_callback(self._wake)
        commit: asyncio.Task[None] | None = None
        until = asyncio.get_running_loop().time() + for_s
        try:
            while asyncio.get_running_loop().time() < until:
                await self._woken(for_s)
                if follow.done():
                    follow.result()
                if commit and commit.done():
                    commit.result()
                if batch := await self._prepare():
                    if commit:
                        await commit
                    commit = asyncio.create_task(self._commit(conn, batch))
                    commit.add_done_callback(self._wake)
            if commit:
                await commit
        finally:
            await end(follow, *([commit] if commit else []))

    async def _claim(self, conn: Connection) -> None:
        """Take the shards that are free."""
        free = [
            shard
            for shard in range(SHARDS)
            if shard not in self._shards and await queries.lock_recorder(conn, shard)
        ]
        known = await queries.bus_positions(conn, free)
        heads = await self._bus.heads(free)
        for shard in free:
            position = known.get(shard, START)
            self._shards[shard] = _Shard(shard, position)
            await self._announce(shard, min(position, heads[shard]))
        if all(self._shards[shard].position >= heads[shard] for shard in free):
            self._outage.over()

    async def _announce(self, shard: int, position: Position) -> None:
        """Tell what is recorded, in case the last recorder died before it could."""
        if position == START:
            return
        before = Position(position.epoch, position.number - 1)
        for entry in (await self._bus.read(shard, before))[:1]:
            if entry.position == position:
                await self._bus.mark_recorded([Mark(shard, position, entry.appended)])

    async def _follow(self) -> None:
        """Collect what comes, as far ahead of the commits as COMMIT_BYTES allows."""
        reached = {number: shard.position for number, shard in self._shards.items()}
        async with aclosing(self._bus.follow(reached)) as pages:
            async for number, entries in pages:
                while self._collected_bytes > COMMIT_BYTES:
                    self._room.clear()
                    await self._room.wait()
                self._shards[number].collected += entries
                reached[number] = entries[-1].position
                self._collected_bytes += sum(
                    len(part) for entry in entries for part in entry.parts.values()
                )
                self._filled.set()

    async def _prepare(self) -> _Batch | None:
        """Take what is collected and encode it for the database."""
        work = [(s, s.collected) for s in self._shards.values() if s.collected]
        if not work:
            return None
        self._drop_collected()
        payload = b"".join(
            part for _, es in work for entry in es for part in entry.parts.values()
        )
        quotes = pb.StreamQuotesResponse.FromString(payload).quotes
        encoded = await queries.encode_quotes(quotes)
        return _Batch(encoded, [(shard, es[0], es[-1]) for shard, es in work])

    async def _commit(self, conn: Connection, batch: _Batch) -> None:
        for shard, first, _ in batch.reach:
            _warn_of_holes(shard, first)
        try:
            store = queries.upsert_quotes if self._upserts else queries.copy_quotes
            await self._store(conn, batch, store)
        except UniqueViolationError:
            self._upserts = UPSERTS
            await self._store(conn, batch, queries.upsert_quotes)
        self._upserts = max(0, self._upserts - 1)
        ROWS_RECORDED.add(batch.quotes.row_count)
        marks = []
        for shard, _, last in batch.reach:
            shard.position, appended = last.position, last.appended
            trim = shard.trim_before(appended, self._window_bytes)
            marks.append(Mark(shard.number, shard.position, appended, trim))
        self._committed.set()
        await self._bus.mark_recorded(marks)
        self._outage.over()

    async def _store(self, conn: Connection, batch: _Batch, store: Store) -> None:
        moves = [
            Move(s.number, s.position, last.position) for s, _, last in batch.reach
        ]
        async with conn.transaction():
            await store(conn, batch.quotes.rows)
            if not await queries.move_bus_positions(conn, moves):
                raise _TakenOver("another server has taken over")
            if days := self._unmarked(batch.quotes.days):
                await queries.mark_days(conn, days)
        if len(self._marked) + len(days) > KNOWN_DAYS:
            self._marked.clear()
        self._marked |= days

    def _unmarked(self, days: set[SymbolDay]) -> set[SymbolDay]:
        """Return the days that may have no mark.

        Marks of today and later stay: only days that are over are aggregated.
        """
        today = int(time() // 86_400)
        return {day for day in days if day[1] < today or day not in self._marked}

    async def _woken(self, at_most_s: float) -> None:
        timeout_s = None if at_most_s == inf else at_most_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._filled.wait()
        self._filled.clear()

    def _wake(self, _: asyncio.Task[None]) -> None:
        self._filled.set()

    def _drop_collected(self) -> None:
        for shard in self._shards.values():
            shard.collected = []
        self._collected_bytes = 0
        self._room.set()


def _warn_of_holes(shard: _Shard, first: Entry) -> None:
    if shard.position != first.previous:
        logger.error(
            "shard %d of the bus goes on at %s after %s: what followed that one and "
            "was not recorded is lost",
            *(shard.number, first.position, shard.position),
        )
