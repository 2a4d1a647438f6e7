"""A restored database is the one that was backed up."""

import asyncio
import os
import stat
from datetime import timedelta
from pathlib import Path

import pytest

from quantplane_server import migrate
from quantplane_server.backup.session import libpq
from quantplane_server.db import Database
from quantplane_server.embedded import services
from tests.backup import (
    TABLES,
    backup,
    connected,
    definitions,
    holdings,
    restore,
    rows,
    run,
)
from tests.backup.conftest import Source
from tests.conftest import both_editions
from tests.postgres import database
from tests.test_migrations import alembic, until


@both_editions
async def test_a_restored_database_has_the_same_rows_and_definitions(
    source: Source, empty: str
):
    await restore(source.file, empty)
    held = await holdings(source.dsn)
    assert all(held[table.name] for table in TABLES if table.name in held)
    assert await holdings(empty) == held
    assert await definitions(empty) == await definitions(source.dsn)


@both_editions
async def test_a_restored_database_can_be_served(source: Source, empty: str):
    await restore(source.file, empty)
    await alembic(empty, "check")
    db = await Database.open(empty)
    try:
        await migrate.check_current(db, "timeseries")
        await migrate.check_current(db, "reference")
    finally:
        await db.close()


@both_editions
async def test_a_restored_database_takes_new_rows_and_refuses_duplicates(
    source: Source, empty: str
):
    await restore(source.file, empty)
    upsert = (
        "INSERT INTO market_data (time, symbol, close) VALUES ($1, 'S0', 1)"
        " ON CONFLICT (time, symbol) DO UPDATE SET close = excluded.close"
    )
    before = len(await rows(empty, "market_data"))
    async with connected(empty) as connection:
        (first,) = await connection.fetchrow("SELECT min(time) FROM market_data")
        for time in (first, first + timedelta(days=900)):
            await connection.execute(upsert, time)
            await connection.execute(upsert, time)
        await connection.execute(
            "INSERT INTO audit_logs (action, resource_type) VALUES ('a', 'b')"
        )
        await connection.execute(
            "INSERT INTO permissions (role, resource, action) VALUES ('a', 'b', 'c')"
        )
    assert len(await rows(empty, "market_data")) == before + 1


@both_editions
async def test_a_backup_is_of_one_moment_while_others_write(
    dsn: str, empty: str, tmp_path: Path
):
    written = 0

    async def write() -> None:
        nonlocal written
        async with connected(dsn) as connection:
            await connection.execute("INSERT INTO log_head VALUES ('a', 0)")
            while True:
                async with connection.transaction():
                    head = await connection.fetchval(
                        "UPDATE log_head SET revision = revision + 1 RETURNING revision"
                    )
                    await connection.execute(
                        "INSERT INTO event_log (log, revision, type, key, payload)"
                        " VALUES ('a', $1, '', '', '')",
                        head,
                    )
                    await connection.execute(
                        "INSERT INTO portfolio_snapshots SELECT now() + $1 *"
                        " INTERVAL '1 day', 1, 1, 1, 1, 1, 1, 1, 1, 1",
                        head,
                    )
                written = head

    writing = asyncio.create_task(write())
    while not written:
        await asyncio.sleep(0.01)
    before = written
    file = await backup(dsn, tmp_path / "file")
    after = written
    writing.cancel()

    await restore(file, empty)
    async with connected(empty) as connection:
        head = await connection.fetchval("SELECT revision FROM log_head")
        events = await connection.fetchval("SELECT count(*) FROM event_log")
        snapshots = await connection.fetchval(
            "SELECT count(*) FROM portfolio_snapshots"
        )
    assert before <= head < after
    assert head == events == snapshots


@both_editions
async def test_a_table_that_is_rewritten_meanwhile_is_not_lost(
    dsn: str, empty: str, tmp_path: Path
):
    insert = "INSERT INTO signals (time, strategy_id, symbol, signal_type, strength,"
    insert += " confidence) VALUES (now(), 'a', $1, 'LONG', 1, 1)"
    async with connected(dsn) as connection:
        await connection.execute(insert, "old")
        rewriting = connection.transaction()
        await rewriting.start()
        await connection.execute("TRUNCATE signals")
        await connection.execute(insert, "new")
        backing_up = asyncio.create_task(backup(dsn, tmp_path / "file"))
        await until(
            connection,
            "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())",
        )
        await rewriting.commit()
    await restore(await backing_up, empty)
    assert await rows(empty, "signals") == await rows(dsn, "signals")
    assert "new" in (await rows(empty, "signals"))[0]


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_two_databases_are_in_one_file(
    edition: str, source: Source, empty: str, tmp_path: Path
):
    async with (
        database(edition, migrated=False) as timeseries,
        database(edition, migrated=False) as reference,
        database(edition, migrated=False) as other,
    ):
        await migrate.upgrade(timeseries, reference)
        both = {"timeseries": timeseries, "reference": reference}
        file = await backup(both, tmp_path / "file")
        await restore(file, {"timeseries": empty, "reference": other})
        for new, old in (empty, timeseries), (other, reference):
            assert await holdings(new) == await holdings(old)
            assert await definitions(new) == await definitions(old)


async def test_a_backup_is_for_its_owner_alone(source: Source):
    assert stat.S_IMODE(source.file.stat().st_mode) == 0o600
    assert os.listdir(source.file.parent) == [source.file.name]


async def test_the_commands_tell_what_they_did(
    source: Source, empty: str, tmp_path: Path
):
    file = tmp_path / "file"
    code, out, _ = await run("backup", file, QUANTPLANE_POSTGRES_DSN=source.dsn)
    assert (code, out.startswith(f"{file}: ")) == (0, True)
    code, out, _ = await run("restore", file, QUANTPLANE_POSTGRES_DSN=empty)
    assert code == 0
    assert "restored and found equal" in out
    assert "market_data" in out


async def test_the_database_of_up_is_found_by_its_folder(
    source: Source, tmp_path: Path
):
    folder, file = tmp_path / "folder", tmp_path / "file"
    own = {"QUANTPLANE_POSTGRES_DSN": "", "QUANTPLANE_DATA_DIR": str(folder)}
    code, _, err = await run("backup", file, **own)
    assert (code, f"no database in {folder}" in err) == (1, True)
    code, out, _ = await run("restore", source.file, **own)
    assert code == 0
    async with services(folder):
        code, again, _ = await run("backup", file, **own)
    assert code == 0
    assert again.partition(": ")[2].partition(" rows")[0] in out


def test_a_password_is_never_in_the_arguments():
    dsn = "postgresql://me:s%3Aecret@host:5/db?sslmode=require&application_name=x%20y"
    with libpq(dsn) as uri:
        assert "secret" not in uri
        assert uri.startswith("postgresql://me@host:5/db?sslmode=require&")
        passfile = Path(uri.partition("passfile=")[2].replace("%2F", "/"))
        assert passfile.read_text() == "*:*:*:*:s\\:ecret\n"
        assert stat.S_IMODE(passfile.stat().st_mode) == 0o600
    assert not passfile.exists()
