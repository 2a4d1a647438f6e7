"""What a server has for its logs, and what tests write to them."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server.bus import Bus
from quantplane_server.db import Database
from quantplane_server.log import START, Event, Logs, Position, append
from quantplane_server.tasks import end

PATIENCE_S = 30.0
NOBODY = "redis://127.0.0.1:1"  # a bus that is away


def event(number: int, size: int = 0) -> Event:
    signal = pb.Signal(signal_id=str(number), symbol="x" * size)
    return Event("published", "A", pb.SignalEvent(signal=signal).SerializeToString())


def number(message: pb.SignalEvent) -> int:
    return int(message.signal.signal_id)


async def write(
    db: Database, numbers: Iterable[int], log: str = "signals", size: int = 0
) -> tuple[int, list[Event]]:
    """Append events in a transaction; return the first revision, and them."""
    events = [event(each, size) for each in numbers]
    async with db.transaction() as conn:
        return await append(conn, log, events), events


async def set_back(db: Database, revision: int, log: str = "signals") -> None:
    """Make a log what it was at a revision, as a restored database would have it."""
    async with db.transaction() as conn:
        await conn.execute(
            "DELETE FROM event_log WHERE log = $1 AND revision > $2", log, revision
        )
        await conn.execute(
            "UPDATE log_head SET revision = $2 WHERE log = $1", log, revision
        )


async def forget(db: Database, before: int, log: str = "signals") -> None:
    """Delete the entries before a revision, as retention would."""
    async with db.connection() as conn:
        await conn.execute(
            "DELETE FROM event_log WHERE log = $1 AND revision < $2", log, before
        )


class Process:
    """A server as far as logs go: a pool, a bus, and logs of signals by any name."""

    def __init__(self, db: Database, redis_url: str) -> None:
        self.db = db
        self.bus = Bus(redis_url, cap_bytes=1)
        self.logs = Logs(db, self.bus, defaultdict(lambda: pb.SignalEvent))

    async def commit(
        self, numbers: Iterable[int], log: str = "signals", size: int = 0
    ) -> None:
        first, events = await write(self.db, numbers, log, size)
        self.logs.committed(log, first, events)


@asynccontextmanager
async def process(dsn: str, redis_url: str) -> AsyncIterator[Process]:
    db = await Database.open(dsn, acquire_timeout_s=2)
    made = Process(db, redis_url)
    task = asyncio.create_task(made.logs.run())
    try:
        yield made
    finally:
        await end(task)
        await made.bus.close()
        await db.close()


class Reader:
    """Reads a log as it grows, and keeps what it reads."""

    def __init__(
        self, process: Process, log: str = "signals", after: Position = START
    ) -> None:
        self.tail: Any = None
        self.position = after
        self.revisions: list[int] = []
        self.numbers: list[int] = []
        self.wake = asyncio.Event()
        self._process = process
        self._log = log
        self._grown = asyncio.Event()

    async def __aenter__(self) -> "Reader":
        """Return once the tail knows where the log ends."""
        self._following = self._process.logs.following(self._log, self.wake.set)
        self.tail = self._following.__enter__()
        if not self.tail._start:
            async with asyncio.timeout(PATIENCE_S):
                await self.wake.wait()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.sleep(0)
        if not self._task.done():
            await end(self._task)
        self._following.__exit__(None, None, None)

    async def reached(self, revision: int) -> list[int]:
        """Return the revisions that were read, once there are so many."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.revisions) < revision:
                self._grown.clear()
                grown = asyncio.create_task(self._grown.wait())
                await asyncio.wait((grown, self._task), return_when="FIRST_COMPLETED")
                grown.cancel()
                if self._task.done():
                    self._task.result()
        return self.revisions

    async def ended(self) -> None:
        """Raise what ends the reading."""
        async with asyncio.timeout(PATIENCE_S):
            await self._task

    async def _run(self) -> None:
        while True:
            self.wake.clear()
            entries = None
            with suppress(*databases.UNAVAILABLE):
                entries = await self.tail.read(self.position)
            if entries is None:
                await asyncio.sleep(0.05)  # the database is away
            elif entries:
                self.position = entries[-1].position
                self.revisions += [entry.message.revision for entry in entries]
                self.numbers += [number(entry.message) for entry in entries]
                self._grown.set()
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):  # as a heartbeat would
                        await self.wake.wait()
