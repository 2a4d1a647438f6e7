"""What the servers do for their database now and then, where it does not by itself.

One of all servers does it: the one whose session holds an advisory lock, which
PostgreSQL frees when that session ends, however it ends. Who has lost its session
notices at the end of a task at the latest. Until then another may have begun the same
task, and every task must stand that.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import asyncpg

from quantplane_server import db as databases
from quantplane_server.admin import queries
from quantplane_server.admin.queries import AGING, KEYS, LOG, Keys
from quantplane_server.db import Connection, Database, Edition
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

RESULT = 1_000  # characters kept
BATCH_ROWS = 50_000  # deleted in a transaction
BATCHES = 20  # per table and run
CHUNKS = 50  # dropped per table and run: each takes locks
PAGE_KEYS = 500  # looked up per table and run; 0.2 ms each among hundreds of chunks
FIRST = UUID(int=0)


class Task(NamedTuple):
    """Something to do again and again."""

    name: str
    description: str
    run: Callable[[Database], Awaitable[str]]  # returns what it did, for people


class TaskFailed(Exception):
    """A task did not do all of its work. The text is for people."""


class Maintenance:
    """Runs tasks, or waits until no other server does."""

    def __init__(self, db: Database, tasks: Sequence[Task], interval_s: float) -> None:
        self._db = db
        self._tasks = tasks
        self._interval_s = interval_s
        self._outage = Outage(logger, "maintenance", databases.UNAVAILABLE)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with self._outage:
                async with self._db.session() as session:
                    while True:
                        if await queries.claim_maintenance(session):
                            for task in self._tasks:
                                await self._run(session, task)
                        self._outage.over()
                        await asyncio.sleep(self._interval_s)
            await asyncio.sleep(self._interval_s)

    async def _run(self, session: Connection, task: Task) -> None:
        """Run a task and note what became of it."""
        began = time.monotonic()
        try:
            result, succeeded = await task.run(self._db), True
        except Exception as error:
            result, succeeded = reason(error), False
            known = isinstance(error, KNOWN)
            logger.warning(
                "%s failed: %s", task.name, result, exc_info=None if known else error
            )
        duration = timedelta(seconds=time.monotonic() - began)
        await queries.note_run(session, task.name, duration, succeeded, result[:RESULT])


KNOWN = (TaskFailed, asyncpg.PostgresError, *databases.UNAVAILABLE)


def reason(error: Exception) -> str:
    """Return why a task failed, for people."""
    if isinstance(error, TaskFailed):
        return str(error)
    if isinstance(error, databases.UNAVAILABLE):
        return "the database can't be reached"
    if isinstance(error, asyncpg.PostgresError):
        return readable(str(error.args[0]))
    return "internal error; the server's log has the details"


def readable(message: str) -> str:
    """Return the first line of what PostgreSQL says, without the paths of its files."""
    return re.sub(r'"[^"]*/[^"]*"', "a file", message.partition("\n")[0])


def own_tasks() -> list[Task]:
    """Return the tasks of this slice, new: they remember where they are."""
    return [
        Task(
            "retention",
            "remove rows that are older than retention_policies says",
            remove_old,
        ),
        Task(
            "orphaned keys",
            "remove the keys of signals, orders and executions that are gone",
            OrphanedKeys().run,
        ),
    ]


# --- Retention ----------------------------------------------------------------------


async def remove_old(db: Database) -> str:
    """Remove what is older than each table's retention, a bounded part per run.

    Of a hypertable whole chunks go. Of a plain table rows go that nothing refers to.
    """
    async with db.connection() as conn:
        retention = await queries.retention(conn)
        hypertables = set[str]()
        if db.edition is not Edition.PLAIN:
            hypertables = await queries.hypertables(conn)
    removed, failed = [], []
    for table, drop_after in retention.items():
        try:
            if table not in (*AGING, LOG):
                raise TaskFailed("not a table of time series")
            if drop_after <= timedelta():
                raise TaskFailed("drop_after must be above 0")
            if table == LOG:
                continue
            remove = _drop_chunks if table in hypertables else _delete_rows
            since = await kept_since(db, table)
            if since and (what := await remove(db, table, since)):
                removed.append(f"{table}: {what}")
        except (TaskFailed, asyncpg.PostgresError) as error:
            failed.append(f"{table}: {reason(error)}")
    if failed:
        raise TaskFailed(", ".join(failed + removed))
    return ", ".join(removed) or "nothing to remove"


async def kept_since(db: Database, table: str) -> datetime | None:
    """Return the time that a table's rows are kept from; None: without end."""
    async with db.connection() as conn:
        since = await queries.kept_since(conn, table)
        if since is None and db.edition is Edition.COMMUNITY:
            since = await queries.policy_kept_since(conn, table)
        return since


async def _drop_chunks(db: Database, table: str, since: datetime) -> str:
    async with db.transaction() as conn:
        await queries.bound_waiting(conn)
        return _said(await queries.drop_chunks(conn, table, since, CHUNKS), "chunk")


async def _delete_rows(db: Database, table: str, since: datetime) -> str:
    rows = 0
    for _ in range(BATCHES):
        async with db.transaction() as conn:
            deleted = await queries.delete_rows(conn, table, since, BATCH_ROWS)
        rows += deleted
        if deleted < BATCH_ROWS:
            break
    return _said(rows, "row")


def _said(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}" if count else ""


# --- Keys ---------------------------------------------------------------------------


class OrphanedKeys:
    """Goes round the key tables, a page of each per run, and removes orphans.

    Dropping a chunk fires no triggers, so the keys of its rows stay behind.
    """

    def __init__(self) -> None:
        self._after = dict.fromkeys(KEYS, FIRST)

    async def run(self, db: Database) -> str:
        removed = []
        for keys in KEYS:
            if what := _said(await self._clean(db, keys), "key"):
                removed.append(f"{keys.name}: {what}")
        return ", ".join(removed) or "nothing to remove"

    async def _clean(self, db: Database, keys: Keys) -> int:
        async with db.connection() as conn:
            page = await queries.keys_after(conn, keys, self._after[keys], PAGE_KEYS)
        orphans = [id for id, orphaned in page if orphaned]
        removed = await delete_keys(db, keys, orphans) if orphans else 0
        self._after[keys] = page[-1][0] if len(page) == PAGE_KEYS else FIRST
        return removed


async def delete_keys(db: Database, keys: Keys, ids: Iterable[UUID]) -> int:
    """Delete keys that have no rows and that nothing refers to; return how many."""
    async with db.transaction() as conn:
        deleted = await queries.delete_keys(conn, keys, ids)
        if not deleted:
            return 0
        # A row with such an id may have been written meanwhile, counting on its key.
        # Once no transaction writes, all of them can be seen.
        await queries.bound_waiting(conn)
        await queries.lock_writers_out(conn, keys)
        if await queries.any_row(conn, keys, deleted):
            raise TaskFailed(f"rows of {keys.name} came back; trying again")
    return len(deleted)
