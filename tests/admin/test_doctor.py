"""The doctor: what is wrong is found, and what it says to do mends it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from quantplane_server import migrate
from quantplane_server.admin import doctor
from quantplane_server.admin.findings import Finding, Mark, disk, skew
from quantplane_server.config import Settings
from quantplane_server.db import RESTORING, Database, Edition
from quantplane_server.embedded import Valkey, services
from quantplane_server.main import recording
from quantplane_server.market_data.queries import overdue_day_count
from tests.admin import execute, has_chunks, until, value
from tests.conftest import both_editions
from tests.postgres import database

COMMAND = Path(sys.executable).with_name("quantplane-server")
NOBODY = "postgresql://me:secret@127.0.0.1:1/x"


async def examined(settings: Settings) -> dict[str, list[Finding]]:
    """Return what the doctor finds, by subject."""
    findings: dict[str, list[Finding]] = {}
    async for finding in doctor.examine(settings, overdue_day_count):
        findings.setdefault(finding.subject, []).append(finding)
    return findings


async def the(settings: Settings, subject: str) -> Finding:
    """Return the only finding on a subject."""
    (finding,) = (await examined(settings))[subject]
    return finding


async def run(**environment: str) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed."""
    nothing = {"QUANTPLANE_POSTGRES_DSN": "", "QUANTPLANE_REDIS_URL": ""}
    process = await asyncio.create_subprocess_exec(
        *(COMMAND, "doctor"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **nothing, **environment},
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


# --- The command --------------------------------------------------------------------


async def test_all_is_well_with_what_up_runs_once_a_server_was_there(tmp_path: Path):
    async with services(tmp_path) as up:
        await migrate.upgrade(up.postgres_dsn)
        settings = Settings(postgres_dsn=up.postgres_dsn, redis_url=up.redis_url)
        async with recording(settings):
            db = await Database.open(up.postgres_dsn)
            runs = "SELECT count(*) = 4 FROM maintenance_runs"
            await until(lambda: value(db, runs))
            await db.close()
        code, out = await run(QUANTPLANE_DATA_DIR=str(tmp_path))
    lines = [line for line in out.splitlines() if "disk" not in line]
    assert code == 0
    assert all(line.startswith("ok ") for line in lines[:-1]), out
    subjects = [*doctor.LOOKS, *doctor.TIME_SERIES_LOOKS, *doctor.BUS_LOOKS]
    for subject in set(subjects) - {"hypertables", "policies"}:
        assert f"  {subject}  " in out


async def test_what_is_not_set_is_told_and_how_to_set_it(tmp_path: Path):
    code, out = await run(QUANTPLANE_DATA_DIR=str(tmp_path))
    assert code == 1
    assert "QUANTPLANE_POSTGRES_DSN is not set" in out
    assert "QUANTPLANE_REDIS_URL is not set" in out
    assert "--data-dir" in out


async def test_what_is_away_is_told_and_the_others_are_looked_at(postgres_dsn: str):
    code, out = await run(
        QUANTPLANE_POSTGRES_DSN=NOBODY,
        QUANTPLANE_REFERENCE_DSN=postgres_dsn,
        QUANTPLANE_REDIS_URL="redis://:secret@127.0.0.1:1",
    )
    assert code == 1
    marks = {line[6:30].strip(): line.split()[0] for line in out.splitlines()[:-1]}
    assert (marks["database"], marks["bus"]) == ("fail", "fail")
    assert marks["reference database"] == "ok"
    assert "start PostgreSQL, or correct QUANTPLANE_POSTGRES_DSN" in out
    assert "start Valkey or Redis, or correct QUANTPLANE_REDIS_URL" in out
    assert "secret" not in out
    assert "Traceback" not in out


async def test_what_is_no_address_is_told_too():
    dsn = "postgresql://127.0.0.1/x?sslmode=nonsense"
    settings = Settings(
        postgres_dsn=dsn, reference_dsn=dsn, redis_url="redis://127.0.0.1:65536"
    )
    findings = await examined(settings)
    assert [f.mark for fs in findings.values() for f in fs] == [Mark.FAIL] * 3


# --- PostgreSQL ---------------------------------------------------------------------


@both_editions
async def test_the_edition_is_told(settings: Settings, db: Database):
    assert (await the(settings, "database")).mark is Mark.OK
    assert (await the(settings, "edition")).found.startswith(db.edition)


@both_editions
async def test_a_schema_that_is_missing_is_mended_by_migrating(
    edition: str, redis_url: str
):
    async with database(edition, migrated=False) as dsn:
        settings = Settings(postgres_dsn=dsn, reference_dsn=dsn, redis_url=redis_url)
        for subject in "schema", "reference schema":
            finding = await the(settings, subject)
            assert finding.mark is Mark.FAIL
            assert "at nothing" in finding.found
            assert finding.mend == "quantplane-server migrate"
        await migrate.upgrade(dsn)
        assert (await the(settings, "schema")).mark is Mark.OK
        assert (await the(settings, "reference schema")).mark is Mark.OK


async def test_a_schema_of_a_newer_server_wants_that_server(
    settings: Settings, db: Database
):
    await execute(db, "UPDATE alembic_version SET version_num = '9999'")
    finding = await the(settings, "schema")
    assert finding.mark is Mark.FAIL
    assert finding.mend.startswith("upgrade quantplane-server")


async def test_a_restore_that_was_cut_off_is_found(settings: Settings, db: Database):
    await execute(db, f"CREATE SCHEMA {RESTORING}")
    finding = await the(settings, "schema")
    assert (finding.mark, finding.mend) == (
        Mark.FAIL,
        "quantplane-server restore, again",
    )


async def test_settings_that_lose_data_in_a_crash_are_found(settings: Settings):
    # The tests' own server keeps nothing.
    findings = (await examined(settings))["durability"]
    assert {finding.mark for finding in findings} == {Mark.FAIL}
    assert [finding.mend for finding in findings] == [
        "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()",
        "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()",
    ]


async def test_commits_that_do_not_wait_are_found(settings: Settings, db: Database):
    name = await value(db, "SELECT current_database()")
    await execute(db, f"ALTER DATABASE {name} SET synchronous_commit = off")
    findings = (await examined(settings))["durability"]
    assert findings[-1].found.startswith("synchronous_commit is off")


@pytest.mark.parametrize(
    "size, mark", [(2, Mark.FAIL), (10, Mark.OK), (1_000, Mark.WARN)]
)
async def test_the_pool_must_fit(settings: Settings, size: int, mark: Mark):
    settings = settings.model_copy(update={"pool_size": size})
    assert (await the(settings, "connections")).mark is mark


@asynccontextmanager
async def stranger(dsn: str, db: Database) -> AsyncIterator[str]:
    """Yield the DSN of a role that may do nothing."""
    role = await value(db, "SELECT current_database() || '_role'")
    name = await value(db, "SELECT current_database()")
    await execute(
        db,
        f"CREATE ROLE {role} LOGIN",
        f"REVOKE ALL ON DATABASE {name} FROM public",
        f"GRANT CONNECT ON DATABASE {name} TO {role}",
    )
    user = await value(db, "SELECT current_user")
    try:
        yield dsn.replace(f"//{user}@", f"//{role}@")
    finally:
        await execute(
            db,
            f"REASSIGN OWNED BY {role} TO {user}",
            f"DROP OWNED BY {role}",
            f"DROP ROLE {role}",
        )


@both_editions
async def test_privileges_that_are_missing_are_mended_by_granting_them(
    settings: Settings, dsn: str, db: Database
):
    async with stranger(dsn, db) as its_dsn:
        theirs = settings.model_copy(update={"postgres_dsn": its_dsn})
        findings = await examined(theirs)
        assert "permission denied" in findings["schema"][0].found
        tables, *others = findings["privileges"]
        assert tables.mark is Mark.FAIL
        assert "market_data (SELECT, INSERT, UPDATE, DELETE)" in tables.found
        assert any("temporary" in finding.found for finding in others)
        assert any("migrate" in finding.found for finding in others)
        await execute(db, tables.mend, *(f.mend.partition(", or")[0] for f in others))
        assert any("drop chunks" in f.found for f in others) == has_chunks(db)
        findings = await examined(theirs)
        assert findings["schema"][0].mark is Mark.OK
        assert findings["privileges"][0].mark is Mark.OK


@both_editions
async def test_time_series_that_are_no_hypertables_are_found(
    settings: Settings, db: Database
):
    if not has_chunks(db):
        assert "hypertables" not in await examined(settings)
        return
    assert (await the(settings, "hypertables")).mark is Mark.OK
    name = await value(db, "SELECT current_database()")
    await execute(
        db,
        "CREATE SCHEMA plain",
        "CREATE TABLE plain.market_data (LIKE market_data INCLUDING ALL)",
        f"ALTER DATABASE {name} SET search_path = plain, public",
    )
    finding = await the(settings, "hypertables")
    assert finding.mark is Mark.FAIL
    assert finding.found.startswith("market_data: no hypertables")


@both_editions
async def test_a_table_that_grows_for_ever_is_found(settings: Settings, db: Database):
    finding = await the(settings, "retention")
    assert finding.mark is Mark.OK
    assert "market_data 5 years" in finding.found
    removal = "DELETE FROM retention_policies WHERE table_name = 'signals'"
    if db.edition is Edition.COMMUNITY:
        removal = "SELECT remove_retention_policy('signals')"
    await execute(db, removal)
    finding = await the(settings, "retention")
    assert (finding.mark, finding.found) == (
        Mark.WARN,
        "signals keeps its rows for ever",
    )
    await execute(db, finding.mend)
    assert (await the(settings, "retention")).mark is Mark.OK


@both_editions
async def test_policies_that_are_missing_or_fail_are_found(
    settings: Settings, db: Database
):
    if db.edition is not Edition.COMMUNITY:
        assert "policies" not in await examined(settings)
        return
    await execute(
        db,
        "SELECT remove_compression_policy('market_data')",
        "SELECT remove_continuous_aggregate_policy('market_data_daily')",
        """
        INSERT INTO _timescaledb_internal.bgw_job_stat
        SELECT job_id, now(), now(), now(), now(), false, 1, '2 s', '0', 1,
               0, 0, 0, 0, 0
          FROM timescaledb_information.jobs WHERE hypertable_name = 'signals'
        """,
    )
    findings = (await examined(settings))["policies"]
    assert {finding.mark for finding in findings} == {Mark.WARN}
    assert any(finding.found.startswith("signals: retention") for finding in findings)
    missing = [finding for finding in findings if "SELECT add_" in finding.mend]
    await execute(db, *(finding.mend for finding in missing))
    findings = (await examined(settings))["policies"]
    assert not any("SELECT add_" in finding.mend for finding in findings)


async def test_maintenance_that_does_not_happen_is_found(
    settings: Settings, db: Database
):
    settings = settings.model_copy(update={"maintenance_s": 60.0})
    finding = await the(settings, "maintenance")
    assert (finding.mark, finding.found) == (Mark.WARN, "has never run")
    assert "quantplane-server serve" in finding.mend
    note = "INSERT INTO maintenance_runs VALUES ('t', now() - INTERVAL '{}', '1 s', {})"
    await execute(db, note.format("5 hours", "true, 'done'"))
    finding = await the(settings, "maintenance")
    assert (finding.mark, finding.found) == (Mark.WARN, "last run 4 hours ago")
    await execute(db, "UPDATE maintenance_runs SET started_at = now()")
    assert (await the(settings, "maintenance")).mark is Mark.OK
    await execute(
        db, "UPDATE maintenance_runs SET succeeded = false, result = 'broken'"
    )
    finding = await the(settings, "maintenance")
    assert (finding.mark, finding.found) == (Mark.WARN, "t failed: broken")


async def test_days_that_were_never_aggregated_are_found(
    settings: Settings, db: Database
):
    mark = "INSERT INTO pending_days VALUES ('A', now() - INTERVAL '{}')"
    await execute(db, mark.format("1 hour"), mark.format("30 hours"))
    assert (await the(settings, "daily bars")).mark is Mark.OK
    await execute(db, mark.format("3 days"))
    finding = await the(settings, "daily bars")
    assert finding.mark is Mark.WARN
    assert finding.found.startswith("1 days")


# --- Valkey -------------------------------------------------------------------------


@pytest.fixture
async def valkey(settings: Settings) -> AsyncIterator[tuple[Settings, redis.Redis]]:
    """Settings that name a Valkey of the test's own, and a client of it."""
    async with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        yield settings.model_copy(update={"redis_url": valkey.url}), client


async def test_a_bus_that_keeps_nothing_is_found(valkey: Any):
    settings, client = valkey
    await client.config_set("appendonly", "no")
    finding = await the(settings, "bus log")
    assert finding.mark is Mark.FAIL
    statement = finding.mend.partition(",")[0]
    assert statement == "CONFIG SET appendonly yes"
    await client.execute_command(*statement.split())
    finding = await the(settings, "bus log")
    assert "appendfsync no" in finding.found  # as Valkey of the tests is
    assert finding.mark is Mark.WARN
    await client.execute_command(*finding.mend.partition(",")[0].split())
    assert (await the(settings, "bus log")).mark is Mark.OK


async def test_a_bus_that_forgets_when_it_is_full_is_found(valkey: Any):
    settings, client = valkey
    await client.config_set("maxmemory-policy", "allkeys-lru")
    assert (await the(settings, "bus eviction")).mark is Mark.OK  # it is never full
    await client.config_set("maxmemory", "4gb")
    finding = await the(settings, "bus eviction")
    assert finding.mark is Mark.FAIL
    await client.execute_command(*finding.mend.partition(",")[0].split())
    assert (await the(settings, "bus eviction")).mark is Mark.OK


async def test_a_bus_with_less_memory_than_it_may_want_is_found(valkey: Any):
    settings, client = valkey
    settings = settings.model_copy(update={"cap_mb": 20, "window_mb": 10})
    assert (await the(settings, "bus memory")).mark is Mark.OK
    await client.config_set("maxmemory", "29mb")
    finding = await the(settings, "bus memory")
    assert finding.mark is Mark.WARN
    assert "only 29 MB" in finding.found
    settings = settings.model_copy(update={"cap_mb": 1, "window_mb": 1})
    await client.set("big", b"x" * (4 << 20))
    finding = await the(settings, "bus memory")
    assert finding.mark is Mark.WARN
    assert "what else lives there" in finding.mend


async def test_a_bus_that_keeps_its_settings_to_itself_is_not_blamed(valkey: Any):
    settings, client = valkey
    await client.execute_command(
        *"ACL SETUSER guest on >pw ~* &* +@all -config -client".split()
    )
    url = settings.redis_url.replace("unix://", "unix://guest@") + "?password=pw"
    guest = settings.model_copy(update={"redis_url": url})
    findings = await examined(guest)
    assert "unknown" in findings["bus log"][0].found
    assert "unknown" in findings["bus disk"][0].found
    assert not any(
        finding.mark is Mark.FAIL
        for subject, found in findings.items()
        if subject.startswith("bus")
        for finding in found
    )


async def test_a_look_that_is_refused_is_told_and_the_others_go_on(valkey: Any):
    settings, client = valkey
    await client.execute_command(*"ACL SETUSER default -info".split())
    findings = await examined(settings)
    assert "no permissions" in findings["bus"][0].found
    assert findings["schema"][0].mark is Mark.OK


# --- Either -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offset_s, mark",
    [(0.9, "ok"), (-0.9, "ok"), (1.1, "warn"), (-59, "warn"), (61, "fail")],
)
def test_clocks_that_differ_are_found(offset_s: float, mark: str):
    assert skew(offset_s).mark == mark
    assert ("behind" in skew(offset_s).found) == (offset_s < 0)


def test_room_that_can_not_be_seen_is_unknown(tmp_path: Path):
    assert "free at" in disk(str(tmp_path)).found
    assert "unknown" in disk(str(tmp_path / "missing")).found
    assert "unknown" in disk(None).found
