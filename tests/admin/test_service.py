"""AdminService, against what the catalogs say when they are asked otherwise."""

import time
from datetime import timedelta
from importlib.metadata import version

import redis.asyncio as redis

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server import migrate
from quantplane_server.config import Settings
from quantplane_server.db import Database, Edition
from quantplane_server.embedded import Valkey
from quantplane_server.main import recording, serving
from tests.admin import execute, fetch, has_chunks, signal, ticks, until, value
from tests.conftest import both_editions
from tests.postgres import database, let_in

EDITIONS = {
    Edition.PLAIN: pb.EDITION_PLAIN,
    Edition.APACHE: pb.EDITION_APACHE,
    Edition.COMMUNITY: pb.EDITION_COMMUNITY,
}
YEAR_S = 365 * 86_400


async def server_info(client: Client) -> pb.GetServerInfoResponse:
    return await client.admin.GetServerInfo(pb.GetServerInfoRequest())


async def report(client: Client) -> pb.GetStorageReportResponse:
    return await client.admin.GetStorageReport(pb.GetStorageReportRequest())


async def tables(client: Client) -> dict[str, pb.TableReport]:
    return {table.name: table for table in (await report(client)).tables}


# --- GetServerInfo ------------------------------------------------------------------


@both_editions
async def test_a_server_tells_what_it_is_and_what_it_stands_on(
    lone_client: Client, db: Database, redis_url: str
):
    info = await server_info(lone_client)
    assert info.version == version("quantplane-server")
    assert info.edition == EDITIONS[db.edition]
    shown = await value(db, "SHOW server_version")
    assert shown.startswith(info.postgresql_version)
    extension = "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
    assert info.timescaledb_version == (await value(db, extension) or "")
    async with redis.Redis.from_url(redis_url) as client:
        valkey = await client.info("server")
    assert info.bus_version == f"Valkey {valkey['valkey_version']}"
    revision = migrate.head_revision()
    assert info.schema_revision == info.reference_schema_revision == revision


async def test_a_server_tells_the_time_and_how_far_the_database_is_off(
    lone_client: Client,
):
    before = time.time()
    info = await server_info(lone_client)
    after = time.time()
    assert info.start_time.ToNanoseconds() / 1e9 < before
    assert before <= info.server_time.ToNanoseconds() / 1e9 <= after
    # One machine has one clock: what is measured is at most what the call took.
    assert abs(info.database_clock_offset.ToTimedelta()) <= timedelta(
        seconds=after - before
    )


async def test_a_server_whose_bus_is_away_still_tells_the_rest(dsn: str):
    async with Valkey() as valkey:
        settings = Settings(
            postgres_dsn=dsn, redis_url=valkey.url, listen="127.0.0.1:0", grace_s=2
        )
        async with serving(settings) as target, Client(target) as client:
            await valkey.kill()
            info = await server_info(client)
            await valkey.start()
    assert info.bus_version == ""
    assert info.postgresql_version


# --- GetStorageReport ---------------------------------------------------------------


@both_editions
async def test_all_tables_are_reported_with_their_rows(
    lone_client: Client, db: Database
):
    await ticks(db, "1 hour", "20 days", "40 days")
    await signal(db, "1 day")
    await execute(db, "ANALYZE")
    names = await fetch(
        db,
        """
        SELECT tablename FROM pg_tables
         WHERE schemaname = 'public' AND tablename NOT LIKE 'alembic%' ORDER BY 1
        """,
    )
    expected = {
        name: await value(db, f"SELECT count(*) FROM {name}") for (name,) in names
    }
    if db.edition is Edition.COMMUNITY:
        expected["market_data_daily"] = 0  # nothing is materialised yet
    found = await report(lone_client)
    assert [table.name for table in found.tables] == sorted(expected)
    assert {table.name: table.rows for table in found.tables} == expected


@both_editions
async def test_sizes_are_those_on_disk_with_chunks_and_indexes(
    lone_client: Client, db: Database
):
    await ticks(db, "1 hour", "20 days", "40 days")
    sizes = await fetch(
        db,
        """
        SELECT relname, pg_total_relation_size(oid)
               + coalesce((SELECT sum(pg_total_relation_size(inhrelid))::bigint
                             FROM pg_inherits WHERE inhparent = t.oid), 0)
          FROM pg_class AS t
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
           AND relname NOT LIKE 'alembic%'
        """,
    )
    found = await tables(lone_client)
    assert {name: found[name].total_bytes for name, _ in sizes} == dict(sizes)


@both_editions
async def test_hypertables_are_reported_with_their_chunks(
    lone_client: Client, db: Database
):
    await ticks(db, "1 hour", "20 days", "40 days")
    found = await tables(lone_client)
    if not has_chunks(db):
        assert not any(table.HasField("hypertable") for table in found.values())
        return
    names = await fetch(
        db, "SELECT hypertable_name FROM timescaledb_information.hypertables"
    )
    parts = {name for name, table in found.items() if table.HasField("hypertable")}
    assert parts - {"market_data_daily"} == {name for (name,) in names}
    ((chunks, start, end),) = await fetch(
        db,
        """
        SELECT count(*), min(_timescaledb_functions.to_timestamp(range_start)),
               max(_timescaledb_functions.to_timestamp(range_end))
          FROM _timescaledb_catalog.dimension_slice
        """,
    )
    hypertable = found["market_data"].hypertable
    assert (hypertable.chunks, hypertable.compressed_chunks) == (chunks, 0)
    assert chunks == 3
    assert hypertable.start_time.ToDatetime(start.tzinfo) == start
    assert hypertable.end_time.ToDatetime(end.tzinfo) == end
    empty = found["orders"].hypertable
    assert (empty.chunks, empty.HasField("start_time")) == (0, False)


@both_editions
async def test_compressed_chunks_are_reported_before_and_after(
    lone_client: Client, db: Database
):
    await ticks(db, "1 hour", "20 days", "40 days")
    if db.edition is Edition.COMMUNITY:
        async with db.connection() as conn:
            await conn.execute(
                "SELECT compress_chunk(c)"
                "  FROM show_chunks('market_data', INTERVAL '7 days') AS c"
            )
    found = (await tables(lone_client))["market_data"].hypertable
    expected = (0, 0, 0)
    if db.edition is Edition.COMMUNITY:
        (expected,) = await fetch(
            db,
            """
            SELECT count(*), sum(before_compression_total_bytes)::bigint,
                   sum(after_compression_total_bytes)::bigint
              FROM chunk_compression_stats('market_data')
             WHERE compression_status = 'Compressed'
            """,
        )
        assert expected[0] == 2
    assert expected == (
        found.compressed_chunks,
        found.bytes_before_compression,
        found.bytes_after_compression,
    )


@both_editions
async def test_retention_is_reported_whoever_sees_to_it(
    lone_client: Client, db: Database
):
    found = await tables(lone_client)
    kept = {
        name: table.retention.ToTimedelta() / timedelta(days=365)
        for name, table in found.items()
        if table.HasField("retention")
    }
    years = {"market_data": 5, "signals": 5, "options_chains": 5}
    years["option_chain_times"] = 5
    years["event_log"] = 30 / 365
    assert kept == years | {"portfolio_snapshots": 10}


@both_editions
async def test_an_unknown_table_s_retention_is_not_reported(
    lone_client: Client, db: Database
):
    await execute(
        db, "INSERT INTO retention_policies VALUES ('x', '1 y'), ('orders', '1 y')"
    )
    found = await tables(lone_client)
    assert "x" not in found
    assert found["orders"].retention.seconds == YEAR_S


@both_editions
async def test_policies_of_the_database_are_reported_with_their_last_run(
    lone_client: Client, db: Database
):
    if db.edition is not Edition.COMMUNITY:
        assert not any(t.policies for t in (await tables(lone_client)).values())
        return
    await execute(db, RUNS, ERRORS)
    found = await tables(lone_client)
    compression, retention = found["market_data"].policies
    assert compression.description == "compress chunks older than 7 days"
    assert compression.last_start_time.seconds == 1_704_067_200
    assert compression.last_duration.seconds == 2
    assert compression.last_succeeded
    assert retention.name == "retention"
    assert retention.description == "drop rows older than 5 years"
    assert retention.HasField("last_start_time")
    assert not retention.last_succeeded
    assert retention.last_result == "could not open file a file"
    (refresh,) = found["market_data_daily"].policies
    assert "3 days" in refresh.description
    assert not refresh.HasField("last_start_time")


# As the database's scheduler notes them.
RUNS = """
    INSERT INTO _timescaledb_internal.bgw_job_stat
    SELECT job_id, '2024-01-01', '2024-01-01 00:00:02', '2024-01-02', '2024-01-01',
           proc_name = 'policy_compression', 1, '2 s', '0', 1, 0, 0, 0, 0, 0
      FROM timescaledb_information.jobs WHERE hypertable_name = 'market_data'
"""
ERRORS = """
    INSERT INTO _timescaledb_internal.bgw_job_stat_history
        (job_id, execution_start, execution_finish, succeeded, data)
    SELECT job_id, '2024-01-01', '2024-01-01 00:00:02', false,
           '{"error_data": {"message": "could not open file \\"base/1/2\\""}}'
      FROM timescaledb_information.jobs
     WHERE hypertable_name = 'market_data' AND proc_name = 'policy_retention'
"""


async def test_tasks_of_the_servers_are_reported_with_their_last_run(
    lone_client: Client, db: Database, settings: Settings
):
    tasks = (await report(lone_client)).tasks
    names = [task.name for task in tasks]
    assert names == ["daily bars", "event log", "orphaned keys", "retention"]
    assert all(task.description for task in tasks)
    assert not any(task.HasField("last_start_time") for task in tasks)
    async with recording(settings):
        runs = "SELECT count(*) = $1 FROM maintenance_runs"
        await until(lambda: value(db, runs, len(names)))
    tasks = (await report(lone_client)).tasks
    assert all(task.last_succeeded for task in tasks)
    assert {task.name: task.last_result for task in tasks} == dict(
        await fetch(db, "SELECT task, result FROM maintenance_runs")
    )
    stored = await fetch(db, "SELECT started_at FROM maintenance_runs ORDER BY task")
    assert [
        (t.last_start_time.ToDatetime(stored[0][0].tzinfo),) for t in tasks
    ] == stored


async def test_days_to_aggregate_are_counted(lone_client: Client, db: Database):
    assert (await report(lone_client)).pending_days == 0
    await execute(db, "INSERT INTO pending_days VALUES ('A', now()), ('B', now())")
    assert (await report(lone_client)).pending_days == 2


@both_editions
async def test_reference_data_may_live_in_another_database(
    edition: str, redis_url: str
):
    async with (
        database(edition, migrated=False) as dsn,
        database(edition, migrated=False) as reference_dsn,
    ):
        await migrate.upgrade(dsn, reference_dsn)
        await let_in(reference_dsn)
        settings = Settings(
            postgres_dsn=dsn,
            reference_dsn=reference_dsn,
            redis_url=redis_url,
            listen="127.0.0.1:0",
            grace_s=2,
        )
        async with serving(settings) as target, Client(target) as client:
            found = await tables(client)
            info = await server_info(client)
    assert {"market_data", "users", "audit_logs"} <= set(found)
    assert found["users"].total_bytes > 0
    assert info.reference_schema_revision == migrate.head_revision()
