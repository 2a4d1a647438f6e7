"""Some tables instead of all, into a database that has its schema."""

import os
from pathlib import Path

import pytest

from quantplane_server import migrate
from quantplane_server.backup import BackupError
from tests.backup import (
    TABLES,
    backup,
    connected,
    holdings,
    restore,
    rows,
    run,
    with_manifest,
)
from tests.backup.conftest import Source
from tests.conftest import both_editions
from tests.postgres import database

# Migrations put rows there, or they follow from others.
SEEDED = {
    *("permissions", "server_keys", "retention_policies"),
    *("signing_keys", "identity_version"),
}
COMPUTED = {"pending_days", "aggregated_days"}
SUBSET = [t.name for t in TABLES if t.name not in SEEDED | COMPUTED]

CARRIED = {
    "signals": {"signal_keys"},
    "orders": {"order_keys", "signal_keys"},
    "executions": {"execution_keys", "order_keys"},
    "options_chains": {"option_chain_times"},
    "audit_logs": {"users"},
    "event_log": {"log_head"},
}


@pytest.fixture(autouse=True)
async def nobody(dsn: str) -> None:
    """Tables that migrations leave empty are so: without the user of other tests."""
    async with connected(dsn) as connection:
        await connection.execute("TRUNCATE users CASCADE")


async def refused(file: Path, dsn: str, why: str) -> None:
    before = await holdings(dsn)
    with pytest.raises(BackupError, match=why):
        await restore(file, dsn)
    assert await holdings(dsn) == before


@both_editions
async def test_all_tables_by_name_come_back_with_their_rows(
    source: Source, dsn: str, tmp_path: Path
):
    await restore(await backup(source.dsn, tmp_path / "file", *SUBSET), dsn)
    for table in SUBSET:
        assert await rows(dsn, table) == await rows(source.dsn, table), table


async def test_a_table_brings_the_rows_that_it_needs_and_no_others(
    source: Source, dsn: str, tmp_path: Path
):
    came: set[str] = set()
    for table, carried in CARRIED.items():
        await restore(await backup(source.dsn, tmp_path / table, table), dsn)
        came |= {table} | carried
        for name in SUBSET:
            wanted = await rows(source.dsn, name) if name in came else []
            assert await rows(dsn, name) == wanted, (table, name)


@both_editions
async def test_the_days_of_market_data_are_computed_again(
    source: Source, dsn: str, tmp_path: Path
):
    await restore(await backup(source.dsn, tmp_path / "file", "market_data"), dsn)
    days = "SELECT count(DISTINCT (symbol, time_bucket('1 day', time))) FROM {}"
    async with connected(dsn) as connection:
        count = await connection.fetchval(days.format("market_data"))
        assert await connection.fetchval("SELECT count(*) FROM pending_days") == count
        assert await connection.fetchval("SELECT count(*) FROM daily_bars") == count


@both_editions
async def test_a_lost_table_comes_back_beside_the_others(
    source: Source, empty: str, tmp_path: Path
):
    await restore(source.file, empty)
    async with connected(empty) as connection:
        await connection.execute("TRUNCATE signals")  # which leaves signal_keys
    await restore(await backup(source.dsn, tmp_path / "file", "signals"), empty)
    for table in "signals", "signal_keys", "orders":
        assert await rows(empty, table) == await rows(source.dsn, table)


async def test_needed_rows_that_are_others_by_now_are_refused(
    source: Source, empty: str, tmp_path: Path
):
    await restore(source.file, empty)
    async with connected(empty) as connection:
        await connection.execute("TRUNCATE signals")
        await connection.execute(
            "UPDATE signal_keys SET request_hash = 'x'"
            " WHERE signal_id = (SELECT min(signal_id::text)::uuid FROM signal_keys)"
        )
    file = await backup(source.dsn, tmp_path / "file", "signals", "market_data")
    async with connected(empty) as connection:
        await connection.execute("TRUNCATE market_data")
    await refused(file, empty, "signal_keys has other values than the backup in 1 row")


async def test_new_rows_get_new_numbers(source: Source, dsn: str, tmp_path: Path):
    await restore(await backup(source.dsn, tmp_path / "file", "audit_logs"), dsn)
    before = await rows(dsn, "audit_logs")
    async with connected(dsn) as connection:
        number = await connection.fetchval(
            "INSERT INTO audit_logs (action, resource_type) VALUES ('a', 'b')"
            " RETURNING log_id"
        )
        assert number == await connection.fetchval("SELECT max(log_id) FROM audit_logs")
    assert len(await rows(dsn, "audit_logs")) == len(before) + 1


@both_editions
async def test_a_table_with_rows_is_refused(source: Source, dsn: str, tmp_path: Path):
    file = await backup(source.dsn, tmp_path / "file", "market_data", "signals")
    async with connected(dsn) as connection:
        await connection.execute(
            "INSERT INTO market_data (time, symbol, close) VALUES (now(), 'A', 1)"
        )
    await refused(file, dsn, "market_data has rows, and a restore changes none")


@both_editions
async def test_what_differs_after_all_is_rolled_back(
    source: Source, dsn: str, tmp_path: Path
):
    file = with_manifest(
        await backup(source.dsn, tmp_path / "file", "signals", "market_data"),
        tmp_path / "patched",
        lambda m: m["databases"]["timeseries"]["tables"]["market_data"].update(rows=1),
    )
    await refused(file, dsn, "what was loaded is not what market_data was")


async def test_a_database_without_the_schema_is_refused(
    source: Source, empty: str, tmp_path: Path
):
    file = await backup(source.dsn, tmp_path / "file", "signals")
    await refused(file, empty, r"and the target's at nothing\n.*quantplane-server migr")


async def test_another_revision_is_refused(source: Source, dsn: str, tmp_path: Path):
    file = with_manifest(
        await backup(source.dsn, tmp_path / "file", "signals"),
        tmp_path / "patched",
        lambda m: m["databases"]["timeseries"]["revisions"].update(timeseries="0001"),
    )
    await refused(file, dsn, "schema is at 0001 and the target's at 0005")


async def test_a_part_goes_to_another_edition(
    postgres_source: Source, timescale_dsn: str, tmp_path: Path
):
    tables = "orders", "market_data", "heston_parameters"
    file = await backup(postgres_source.dsn, tmp_path / "file", *tables)
    async with database(timescale_dsn) as dsn:
        await restore(file, dsn)
        for table in tables:
            assert await rows(dsn, table) == await rows(postgres_source.dsn, table)


async def test_tables_of_two_databases_are_found_in_both(
    postgres_dsn: str, source: Source, dsn: str, tmp_path: Path
):
    async with (
        database(postgres_dsn, migrated=False) as timeseries,
        database(postgres_dsn, migrated=False) as reference,
    ):
        await migrate.upgrade(timeseries, reference)
        both = {"timeseries": timeseries, "reference": reference}
        await restore(await backup(source.dsn, tmp_path / "1", "signals"), timeseries)
        async with connected(reference) as connection:
            await connection.execute(
                "INSERT INTO configurations (key, value) VALUES ('a', '1')"
            )
        file = await backup(both, tmp_path / "2", "signals", "configurations")
        # One database may have both parts.
        await restore(file, dsn)
        assert await rows(dsn, "signals") == await rows(source.dsn, "signals")
        assert await rows(dsn, "configurations") == await rows(
            reference, "configurations"
        )


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (
            "nothing",
            "there is no table nothing\n  hint: the tables are alembic_version",
        ),
        ("market_data_daily", "is computed from .*\n.*give --table market_data,"),
        ("daily_bars", "is computed from the rows of market_data"),
        ("pending_days", "is computed from the rows of market_data"),
        ("orders; DROP TABLE orders", "there is no table orders; DROP"),
    ],
)
async def test_what_is_no_table_is_told(
    source: Source, tmp_path: Path, table: str, why: str
):
    with pytest.raises(BackupError, match=why):
        await backup(source.dsn, tmp_path / "file", "signals", table)
    assert os.listdir(tmp_path) == []


async def test_the_command_takes_several_tables(
    source: Source, dsn: str, tmp_path: Path
):
    file = tmp_path / "file"
    code, out, _ = await run(
        *("backup", file, "--table", "signals", "--table", "positions"),
        QUANTPLANE_POSTGRES_DSN=source.dsn,
    )
    assert (code, "3 tables with 120 rows" in out) == (0, True)
    code, out, _ = await run("restore", file, QUANTPLANE_POSTGRES_DSN=dsn)
    assert (code, "3 tables with 120 rows" in out) == (0, True)


async def test_a_whole_backup_is_not_for_a_database_with_a_schema(
    source: Source, dsn: str
):
    await refused(source.file, dsn, "is not empty")
