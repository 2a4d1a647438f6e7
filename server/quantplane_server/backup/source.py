"""Writing a backup: of whole databases by pg_dump, or of some tables by COPY."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from quantplane_server.db import Connection
from quantplane_server.tasks import end

from . import fingerprint, subset, tools
from .archive import CHUNK, Writer
from .errors import BackupError
from .fingerprint import FIRST_OID
from .manifest import Manifest, Part, dump_of
from .progress import Progress
from .session import explained, libpq, session
from .target import refuse_unfinished

LOCK_WAIT_MS = 10_000
LOCK_HINT = "it may have waited for a table that a job or a migration locks: try again"
TRIES = 5

# Also chunks, which compression and retention change.
LOCKED = f"""
    SELECT c.oid::regclass::text
      FROM pg_class AS c
      JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid >= {FIRST_OID} AND c.relkind IN ('r', 'p')
       AND n.nspname !~ '^pg_'
       AND NOT EXISTS (SELECT FROM pg_depend AS d
                        WHERE d.classid = 'pg_class'::regclass
                          AND d.objid = c.oid AND d.deptype = 'e')
     ORDER BY 1
"""


async def backup(
    dsns: Mapping[str, str], path: Path, tables: Sequence[str], progress: Progress
) -> Manifest:
    """Write a backup of the databases to `path`, or of `tables` if any are named.

    Each database as it was at one moment, while others go on writing; two databases
    at two moments, as close as can be. Raises BackupError, and leaves no file then.
    """
    with Writer(path) as writer, explained("the database"):
        async with AsyncExitStack() as stack:
            sources = {
                name: await stack.enter_async_context(_snapshot(dsn))
                # The audit log first: it tells only what the event log has, then.
                for name, dsn in sorted(dsns.items())
            }
            manifest = Manifest(
                created_at=datetime.now(UTC), whole=not tables, databases={}
            )
            if tables:
                selections = await subset.selected(sources, tables)
                for name, selection in selections.items():
                    manifest.databases[name] = await subset.dump(
                        sources[name][0], selection, writer, progress
                    )
            else:
                for name, source in sources.items():
                    manifest.databases[name] = await _dump(
                        name, dsns[name], *source, writer, progress
                    )
        writer.finish(manifest)
    return manifest


@asynccontextmanager
async def _snapshot(dsn: str) -> AsyncIterator[tuple[Connection, str]]:
    """Yield a connection that sees one moment, and the snapshot's name for others.

    The tables are locked first, against what a snapshot does not protect from: rows
    seem to be gone for it once their table is truncated, as compression does with
    a chunk, or rewritten. Reading and writing go on.
    """
    async with session(dsn) as connection:
        await refuse_unfinished(connection)
        if not await fingerprint.revisions(connection):
            raise BackupError(
                "the database has no schema of quantplane",
                "QUANTPLANE_POSTGRES_DSN must name the database that the server uses",
            )
        for _ in range(TRIES):
            locked = await connection.fetch(LOCKED)
            transaction = connection.transaction(
                isolation="repeatable_read", readonly=True
            )
            await transaction.start()
            try:
                # No query before it: the first one takes the snapshot.
                names = ", ".join(row[0] for row in locked)
                await connection.execute(
                    f"LOCK TABLE ONLY {names} IN ACCESS SHARE MODE"
                )
                snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
                unlocked = set(await connection.fetch(LOCKED)) - set(locked)
            except asyncpg.UndefinedTableError:  # dropped between the two
                unlocked = {()}
            if not unlocked:
                yield connection, snapshot
                return
            await transaction.rollback()
    raise BackupError("tables come and go too fast to take a backup", "try again")


async def _dump(
    name: str,
    dsn: str,
    connection: Connection,
    snapshot: str,
    writer: Writer,
    progress: Progress,
) -> Part:
    programs = tools.find(connection.get_server_version().major)
    progress.step(f"dumping {name}")
    describing = asyncio.create_task(
        fingerprint.describe(connection, programs.major, lambda _: None)
    )
    try:
        with libpq(dsn) as uri, writer.member(dump_of(name)) as write:
            options = (
                *("--format=custom", f"--snapshot={snapshot}", f"--dbname={uri}"),
                *(f"--lock-wait-timeout={LOCK_WAIT_MS}", "--no-subscriptions"),
            )
            async with tools.running(
                programs.folder / "pg_dump", *options, hint=LOCK_HINT
            ) as run:
                assert run.stdout
                size = 0
                while chunk := await run.stdout.read(CHUNK):
                    write(chunk)
                    size += len(chunk)
                    progress.bytes(size)
        progress.step(f"counting and summing the rows of {name}")
        return await describing
    finally:
        await end(describing)
