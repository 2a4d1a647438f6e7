"""Whatever fails meanwhile leaves no half of a backup, and an empty database."""

import asyncio
import json
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from quantplane_server.backup import BackupError
from quantplane_server.backup import source as source_module
from quantplane_server.backup.archive import Archive
from quantplane_server.backup.manifest import Part
from quantplane_server.db import Database
from quantplane_server.embedded import Postgres
from quantplane_server.migrate import RestoreUnfinished, check_current, upgrade
from quantplane_server.testing import fresh_database
from tests.backup import (
    backup,
    connected,
    holdings,
    leftovers,
    restore,
    rewritten,
    rows,
    started,
    with_manifest,
)
from tests.backup.conftest import Source
from tests.conftest import both_editions
from tests.postgres import database
from tests.test_migrations import until

LIMIT = 24 << 20  # more than a segment of the log has


# --- The target ---------------------------------------------------------------------


@both_editions
async def test_a_restore_that_breaks_off_leaves_an_empty_database(
    source: Source, empty: str, tmp_path: Path
):
    def cut(name: str, data: bytes) -> bytes:
        return data if "json" in name else data[: len(data) * 3 // 4]

    file = rewritten(source.file, tmp_path / "file", cut)
    with pytest.raises(BackupError, match="pg_restore failed: "):
        await restore(file, empty)
    assert await leftovers(empty) == []


@both_editions
async def test_after_a_failed_restore_a_later_one_is_taken(
    source: Source, empty: str, tmp_path: Path
):
    file = with_manifest(
        source.file,
        tmp_path / "file",
        lambda m: m["databases"]["timeseries"]["tables"]["orders"].update(rows=41),
    )
    with pytest.raises(BackupError, match="orders has 40 rows of 41"):
        await restore(file, empty)
    assert await leftovers(empty) == []
    await restore(source.file, empty)
    assert await holdings(empty) == await holdings(source.dsn)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: p["tables"]["orders"].update(rows=41), "orders has 40 rows of 41"),
        (lambda p: p["tables"]["orders"].update(checksum="1"), "orders has other valu"),
        (lambda p: p["tables"].update(more=p["tables"]["users"]), "the table more is"),
        (lambda p: p["catalog"]["indexes"].append("one"), "indexes lack one"),
        (lambda p: p["catalog"]["constraints"].pop(), "constraints have valid_"),
        (lambda p: p["catalog"].pop("views"), "views have daily_bars"),
    ],
    ids=["rows", "checksum", "table", "missing", "unknown", "kind"],
)
def test_every_difference_is_told(source: Source, change: Any, why: str):
    with Archive(source.file) as archive:
        found = archive.manifest.databases["timeseries"]
    wanted = json.loads(found.model_dump_json())
    assert not list(Part.model_validate(wanted).differences(found))
    change(wanted)
    assert next(Part.model_validate(wanted).differences(found)).startswith(why)


# Of every kind that a database may have beside the schema's.
ADDED = """
    CREATE SCHEMA mine;
    CREATE EXTENSION pg_trgm;
    CREATE DOMAIN positive AS int CHECK (value > 0);
    CREATE TYPE size AS ENUM ('a', 'b');
    CREATE TYPE span AS RANGE (subtype = float8);
    CREATE TYPE pair AS (a int, b size);
    CREATE TABLE mine."Odd name" (
        id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, twice int GENERATED ALWAYS
        AS (id * 2) STORED, p positive, sizes size[], s span, both_ pair,
        short varchar(5) CHECK (short IN ('x', 'y')));
    INSERT INTO mine."Odd name" (p, sizes, s, both_, short)
        VALUES (1, '{a,b}', '[1,2]', (1, 'a'), 'x');
    CREATE INDEX ON mine."Odd name" (lower(short)) WHERE short IN ('x', 'y');
    CREATE TABLE parted (n int, t text) PARTITION BY RANGE (n);
    CREATE TABLE parted_0 PARTITION OF parted FOR VALUES FROM (0) TO (10);
    INSERT INTO parted VALUES (1, 'one');
    CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM parted;
    CREATE VIEW of_view AS SELECT * FROM counted;
    CREATE FUNCTION same(int, size) RETURNS boolean LANGUAGE sql RETURN true;
    CREATE OPERATOR === (LEFTARG = int, RIGHTARG = size, FUNCTION = same);
    CREATE PROCEDURE act(int) LANGUAGE sql AS 'SELECT 1';
    CREATE AGGREGATE total(int) (SFUNC = int4pl, STYPE = int);
    CREATE COLLATION c (PROVIDER = builtin, LOCALE = 'C.UTF-8');
    CREATE TEXT SEARCH CONFIGURATION words (COPY = simple);
    CREATE FUNCTION heard() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE EVENT TRIGGER hears ON ddl_command_start EXECUTE FUNCTION heard();
    CREATE PUBLICATION news FOR TABLE parted;
    SELECT lo_from_bytea(0, 'large');
    GRANT SELECT ON parted TO pg_monitor;
"""


async def test_what_users_have_added_comes_back_and_goes_after_a_failure(
    dsn: str, empty: str, tmp_path: Path
):
    async with connected(dsn) as connection:
        await connection.execute(ADDED)
    file = await backup(dsn, tmp_path / "file")
    wrong = with_manifest(
        file,
        tmp_path / "patched",
        lambda m: m["databases"]["timeseries"]["tables"]["parted"].update(rows=2),
    )
    with pytest.raises(BackupError, match="parted has 1 rows of 2"):
        await restore(wrong, empty)
    assert await leftovers(empty) == []
    await restore(file, empty)
    for table in ('mine."Odd name"', "parted", "of_view"):
        assert await rows(empty, table) == await rows(dsn, table)


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_an_extension_that_was_there_stays(
    source: Source, empty: str, tmp_path: Path
):
    async with connected(empty) as connection:
        await connection.execute("CREATE EXTENSION timescaledb")
    file = with_manifest(
        source.file,
        tmp_path / "file",
        lambda m: m["databases"]["timeseries"]["tables"]["orders"].update(rows=41),
    )
    with pytest.raises(BackupError, match="orders has"):
        await restore(file, empty)
    assert await leftovers(empty) == ["extension timescaledb"]
    await restore(source.file, empty)


async def test_a_failure_in_the_second_database_empties_both(
    edition: str, source: Source, empty: str, tmp_path: Path
):
    both = {"timeseries": source.dsn, "reference": source.dsn}
    file = with_manifest(
        await backup(both, tmp_path / "file"),
        tmp_path / "patched",
        lambda m: m["databases"]["reference"]["tables"]["orders"].update(rows=41),
    )
    async with database(edition, migrated=False) as other:
        with pytest.raises(BackupError, match="not what reference was: orders has 40"):
            await restore(file, {"timeseries": empty, "reference": other})
        assert await leftovers(empty) == await leftovers(other) == []


@asynccontextmanager
async def held_up(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Have pg_restore wait where the tables are filled; yield who can watch it."""
    async with connected(dsn) as holder, connected(dsn) as watcher:
        await holder.execute("BEGIN; LOCK TABLE pg_trigger IN EXCLUSIVE MODE")
        yield watcher


async def stands_in_the_middle(watcher: asyncpg.Connection) -> None:
    await until(
        watcher,
        "SELECT count(*) > 0 FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND relation = 'pg_trigger'::regclass"
        " AND application_name = 'quantplane pg_restore'",
    )
    assert await watcher.fetchval("SELECT count(*) FROM market_data")


async def test_an_interrupted_restore_leaves_an_empty_database(
    source: Source, empty: str
):
    async with held_up(empty) as watcher:
        process = await started("restore", source.file, QUANTPLANE_POSTGRES_DSN=empty)
        await stands_in_the_middle(watcher)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        # It ends its own sessions, though the lock is still held.
        _, err = await process.communicate()
    assert (process.returncode, b"Traceback" in err) == (130, False)
    assert await leftovers(empty) == []


async def test_a_killed_pg_restore_leaves_an_empty_database(source: Source, empty: str):
    async with held_up(empty) as watcher:
        restoring = asyncio.create_task(restore(source.file, empty))
        await stands_in_the_middle(watcher)
        (child,) = [p for p in psutil.Process().children() if is_pg_restore(p)]
        child.kill()
        with pytest.raises(BackupError, match="pg_restore failed: it ended with -9"):
            await restoring
    assert await leftovers(empty) == []


def is_pg_restore(process: psutil.Process) -> bool:
    return process.name().startswith("pg_restore")


async def test_a_killed_server_is_waited_for_and_its_database_emptied(source: Source):
    async with Postgres() as postgres:
        empty = await fresh_database(postgres.dsn)
        restoring = asyncio.create_task(restore(source.file, empty))
        async with held_up(empty) as watcher:
            await stands_in_the_middle(watcher)
            await postgres.kill()
        await postgres.start()
        with pytest.raises(BackupError, match="pg_restore failed: "):
            await restoring
        assert await leftovers(empty) == []


async def test_a_killed_restore_is_told_and_the_next_one_clears_up(
    source: Source, empty: str, tmp_path: Path
):
    async with held_up(empty) as watcher:
        process = await started("restore", source.file, QUANTPLANE_POSTGRES_DSN=empty)
        await stands_in_the_middle(watcher)
        process.kill()
        await process.communicate()
    with pytest.raises(BackupError, match="holds a part of a backup"):
        await backup(empty, tmp_path / "file")
    db = await Database.open(empty)
    with pytest.raises(RestoreUnfinished, match="run `quantplane-server restore` aga"):
        await check_current(db, "timeseries")
    await db.close()
    await restore(source.file, empty)
    assert await holdings(empty) == await holdings(source.dsn)


async def test_a_target_that_is_lost_while_rows_are_sent_to_it_is_told(
    dsn: str, empty: str, tmp_path: Path
):
    await fill(dsn)
    file = await backup(dsn, tmp_path / "file", "event_log")
    await upgrade(empty)
    async with connected(empty) as holder, connected(empty) as watcher:
        await holder.execute("SELECT pg_advisory_lock(1)")
        # Its rows are more than a connection holds, and none is read before the lock.
        await holder.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END'"
        )
        await holder.execute(
            "CREATE TRIGGER wait BEFORE INSERT ON event_log EXECUTE FUNCTION wait()"
        )
        restoring = asyncio.create_task(restore(file, empty))
        await until(watcher, f"SELECT count(*) > 0 FROM ({COPYING})")
        await watcher.execute(f"SELECT pg_terminate_backend(pid) FROM ({COPYING})")
        with pytest.raises(BackupError, match="the target can't be reached"):
            await restoring
        assert not await rows(empty, "event_log")


COPYING = """
    SELECT pid FROM pg_stat_activity
     WHERE datname = current_database() AND query LIKE 'COPY %'
       AND wait_event = 'advisory'
"""


async def fill(dsn: str) -> None:
    """Store 40 MB."""
    async with connected(dsn) as connection:
        await connection.execute(
            "ALTER TABLE event_log ALTER payload SET STORAGE EXTERNAL"
        )
        await connection.execute(
            "INSERT INTO event_log (log, revision, type, key, payload)"
            " SELECT 'a', i, '', '', repeat('x', 1 << 20)::bytea"
            " FROM generate_series(1, 40) AS i"
        )


async def test_a_full_disk_leaves_an_empty_database(dsn: str, tmp_path: Path):
    await fill(dsn)
    file = await backup(dsn, tmp_path / "file")
    async with Postgres() as postgres:
        full = await fresh_database(postgres.dsn)
        await postgres.stop()
        with file_size_limited():
            await postgres.start()
        with pytest.raises(BackupError, match=r"COPY failed .*: File too large"):
            await restore(file, full)
        assert await leftovers(full) == []
        await postgres.stop()
        await postgres.start()
        await restore(file, full)


@contextmanager
def file_size_limited() -> Iterator[None]:
    """Let this process, and those that it starts now, write no large files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Backups ------------------------------------------------------------------------


async def test_a_full_disk_leaves_no_file(source: Source, tmp_path: Path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    file = tmp_path / "file"
    process = await started(
        "backup", file, limit=limit, QUANTPLANE_POSTGRES_DSN=source.dsn
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == (
        f"quantplane-server: {file} can't be written: File too large"
    )
    assert os.listdir(tmp_path) == []


async def test_an_interrupted_backup_leaves_no_file(dsn: str, tmp_path: Path):
    async with connected(dsn) as holder, connected(dsn) as watcher:
        async with holder.transaction():
            await holder.execute("LOCK TABLE signals")
            process = await started(
                "backup", tmp_path / "file", QUANTPLANE_POSTGRES_DSN=dsn
            )
            await until(
                watcher,
                "SELECT count(*) > 0 FROM pg_locks"
                " WHERE NOT granted AND relation = 'signals'::regclass",
            )
            assert os.listdir(tmp_path) == ["file.partial"]
            process.send_signal(signal.SIGTERM)
            await process.communicate()
    assert process.returncode == 130
    assert os.listdir(tmp_path) == []


async def test_a_backup_that_was_killed_is_not_in_the_way(
    source: Source, tmp_path: Path
):
    (tmp_path / "file.partial").write_bytes(b"x" * 1_000_000)
    file = await backup(source.dsn, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
    assert file.stat().st_size < 1_000_000


async def test_two_backups_do_not_write_one_file(dsn: str, tmp_path: Path):
    async with connected(dsn) as holder, connected(dsn) as watcher:
        async with holder.transaction():
            await holder.execute("LOCK TABLE signals")
            first = asyncio.create_task(backup(dsn, tmp_path / "file"))
            await until(
                watcher,
                "SELECT count(*) > 0 FROM pg_locks"
                " WHERE NOT granted AND relation = 'signals'::regclass",
            )
            with pytest.raises(BackupError, match="another backup writes"):
                await backup(dsn, tmp_path / "file")
    with Archive(await first) as archive:
        await archive.check(lambda _: None)


async def test_a_table_that_somebody_wants_alone_does_not_hold_a_backup_up(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(source_module, "LOCK_WAIT_MS", 100)
    waits = (
        "SELECT count(*) > 0 FROM pg_locks"
        " WHERE NOT granted AND relation = '{}'::regclass"
    )
    async with connected(dsn) as holder, connected(dsn) as other, connected(dsn) as me:
        async with holder.transaction():
            await holder.execute("LOCK TABLE users")
            backing_up = asyncio.create_task(backup(dsn, tmp_path / "file"))
            await until(me, waits.format("users"))
            # It has the lock on signals; pg_dump will have to queue for its own.
            wanting = asyncio.create_task(other.execute("TRUNCATE signals"))
            await until(me, waits.format("signals"))
        with pytest.raises(
            BackupError, match=r"(?s)pg_dump failed: .*locks: try again"
        ):
            await backing_up
        await wanting
    assert os.listdir(tmp_path) == []
