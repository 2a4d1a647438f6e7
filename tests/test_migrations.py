import asyncio
import os
import random
import shutil
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from quantplane_server import migrate
from quantplane_server.db import Database, Edition
from tests.postgres import database

REPOSITORY = Path(__file__).parents[1]

WIDTHS = ["1 microsecond", "15 minutes", "90 minutes", "1 day", "7 days", "1000 days"]
WIDTHS += ["1 month", "5 months", "1 year", "10 years"]

SOME_MARKET_DATA = """
    INSERT INTO market_data (time, symbol, close, volume)
    SELECT '2024-01-01'::timestamptz + i * INTERVAL '7 minutes',
           CASE i % 2 WHEN 0 THEN 'A' ELSE 'B' END, i, 1
      FROM generate_series(1, 5000) AS i
"""
MORE_TABLES = """
Table("more_series", timeseries, Column("number", Integer))
Table("more_reference", reference, Column("number", Integer))
"""
BROKEN_MIGRATION = '''"""Broken"""
from alembic import op
revision, down_revision = "0006", "0005"
def upgrade(part):
    op.execute("CREATE TABLE half_done ()")
    op.execute("UPDATE server_keys SET purpose = 'changed'")
    op.execute("SELECT 1 / 0")
'''


@pytest.fixture(params=["postgres_dsn", "timescale_dsn"], ids=["plain", "timescale"])
def server_dsn(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what `alembic` works on, to add migrations to."""
    shutil.copy(REPOSITORY / "alembic.ini", tmp_path)
    shutil.copytree(REPOSITORY / "migrations", tmp_path / "migrations")
    return tmp_path


async def test_the_schema_goes_up_and_down_and_up_again(server_dsn: str):
    async with database(server_dsn, migrated=False) as dsn:
        await alembic(dsn, "upgrade", "head")
        await alembic(dsn, "check")
        tables = await names(dsn)
        await alembic(dsn, "downgrade", "base")
        left = {"alembic_version", "alembic_version_reference"}
        assert set(await names(dsn)) == left | {f"{table}_pkc" for table in left}
        await alembic(dsn, "upgrade", "head")
        await alembic(dsn, "check")
        assert await names(dsn) == tables


async def test_a_second_upgrade_changes_nothing(server_dsn: str):
    async with database(server_dsn) as dsn:
        before = await fetch(dsn, "SELECT * FROM server_keys")
        assert await migrate.upgrade(dsn) == migrate.head_revision()
        assert await fetch(dsn, "SELECT * FROM server_keys") == before


@pytest.mark.parametrize("revision", ["0001"])
async def test_an_upgrade_keeps_the_data_of_an_older_revision(
    server_dsn: str, revision: str
):
    rows = "SELECT * FROM market_data ORDER BY time, symbol"
    async with database(server_dsn, migrated=False) as dsn:
        await alembic(dsn, "upgrade", revision)
        async with connected(dsn) as connection:
            await connection.execute(SOME_MARKET_DATA)
        before = await fetch(dsn, rows), await fetch(dsn, "SELECT * FROM server_keys")
        await alembic(dsn, "upgrade", "head")
        await alembic(dsn, "check")
        assert before == (
            await fetch(dsn, rows),
            await fetch(dsn, "SELECT * FROM server_keys"),
        )
        days = await fetch(dsn, "SELECT symbol, sum(volume) FROM daily_bars GROUP BY 1")
        assert sorted(days) == [("A", 2500), ("B", 2500)]
        await alembic(dsn, "downgrade", revision)
        assert await fetch(dsn, rows) == before[0]


async def test_time_series_and_reference_data_may_live_in_two_databases(
    server_dsn: str, repository: Path
):
    async with (
        database(server_dsn, migrated=False) as dsn,
        database(server_dsn, migrated=False) as reference_dsn,
    ):
        both = {"QUANTPLANE_REFERENCE_DSN": reference_dsn}
        await alembic(dsn, "upgrade", "head", **both)
        await alembic(dsn, "check", **both)
        timeseries, reference = await names(dsn), await names(reference_dsn)
        assert "market_data" in timeseries and "users" not in timeseries
        assert "users" in reference and "market_data" not in reference
        add_tables(repository)
        there = {**both, "cwd": repository}
        await alembic(dsn, "revision", "--autogenerate", "-m", "more", **there)
        await alembic(dsn, "upgrade", "head", **there)
        await alembic(dsn, "check", **there)
        assert "more_series" in await names(dsn)
        assert "more_reference" in await names(reference_dsn)
        await alembic(dsn, "downgrade", "-1", **there)
        assert await names(dsn) == timeseries
        assert await names(reference_dsn) == reference


async def test_parts_in_one_database_are_migrated_each_for_itself(
    server_dsn: str, repository: Path
):
    add_tables(repository)
    async with database(server_dsn) as dsn:
        await alembic(dsn, "revision", "--autogenerate", "-m", "more", cwd=repository)
        made = (repository / "migrations/versions/0006_more.py").read_text()
        assert made.count("more_series") == made.count("more_reference") == 2
        await alembic(dsn, "upgrade", "head", cwd=repository)
        await alembic(dsn, "check", cwd=repository)
        await alembic(dsn, "downgrade", "-1", cwd=repository)
        await alembic(dsn, "check")


async def test_upgrades_that_meet_go_one_after_another(server_dsn: str):
    async with database(server_dsn, migrated=False) as dsn:
        async with connected(dsn) as connection:
            await connection.execute("SELECT pg_advisory_lock($1)", migrate.LOCK)
            upgrades = [
                asyncio.create_task(alembic(dsn, "upgrade", "head")) for _ in range(2)
            ]
            upgrades += [asyncio.create_task(migrate.upgrade(dsn)) for _ in range(2)]
            # Two processes, and this one, which sends its own two one by one.
            await until(
                connection,
                "SELECT count(*) = 3 FROM pg_locks WHERE NOT granted"
                " AND locktype = 'advisory' AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database())",
            )
        await asyncio.gather(*upgrades)
        assert len(await fetch(dsn, "SELECT * FROM server_keys")) == 1


async def test_every_installation_has_its_own_keys(server_dsn: str):
    keys = set()
    for _ in range(2):
        async with database(server_dsn, migrated=False) as dsn:
            await migrate.upgrade(dsn)
            keys |= set(await fetch(dsn, "SELECT purpose, key FROM server_keys"))
    assert len(keys) == 2
    assert {(purpose, len(key)) for purpose, key in keys} == {("tokens", 32)}


async def test_time_buckets_are_those_of_timescale(
    postgres_dsn: str, timescale_dsn: str
):
    times = [*some_times(random.Random(1), 500), None]
    times += [datetime(2000, 1, day, tzinfo=UTC) for day in range(1, 12)]
    await assert_equal_results(
        postgres_dsn,
        timescale_dsn,
        """
        SELECT width, time, time_bucket(width::interval, time)
          FROM unnest($1::timestamptz[]) time, unnest($2::text[]) width
         ORDER BY width, time
        """,
        times,
        WIDTHS,
    )


@pytest.mark.parametrize("width", ["0 days", "-1 day", "-1 month", "1 month 1 day"])
async def test_impossible_buckets_are_refused_by_all(server_dsn: str, width: str):
    async with database(server_dsn) as dsn:
        with pytest.raises(asyncpg.PostgresError):
            await fetch(dsn, "SELECT time_bucket($1::text::interval, now())", width)


@pytest.mark.parametrize("type", ["double precision", "bigint", "integer"])
async def test_first_and_last_are_those_of_timescale(
    postgres_dsn: str, timescale_dsn: str, type: str
):
    dice = random.Random(2)
    times = [*some_times(dice, 2_000), *[None] * 100]
    dice.shuffle(times)
    values = [dice.choice([None, *range(-9, 9)]) for _ in times]
    await assert_equal_results(
        postgres_dsn,
        timescale_dsn,
        f"""
        SELECT time_bucket('300 days', time), first(value, time), last(value, time),
               pg_typeof(first(value, time))::text
          FROM unnest($1::timestamptz[], $2::text[]::{type}[]) AS row (time, value)
         GROUP BY 1 ORDER BY 1
        """,
        times,
        [None if value is None else str(value) for value in values],
    )


@pytest.mark.parametrize(
    "rows",
    [
        "(1, NULL), (2, NULL)",
        "(1, NULL), (2, '2024-01-01'), (3, NULL)",
        "(NULL, '2024-01-01'), (2, '2024-01-02'), (NULL, '2024-01-03')",
        "(1, '2024-01-01'), (2, '2024-01-01'), (3, '2024-01-01')",
        "(1, '-infinity'), (2, '2024-01-01'), (3, 'infinity')",
    ],
    ids=["no time", "one time", "null values", "equal times", "infinite times"],
)
async def test_first_and_last_treat_odd_rows_as_timescale_does(
    postgres_dsn: str, timescale_dsn: str, rows: str
):
    await assert_equal_results(
        postgres_dsn,
        timescale_dsn,
        f"""
        SELECT first(value::float8, time::timestamptz),
               last(value::float8, time::timestamptz)
          FROM (VALUES {rows}) row (value, time)
        """,
    )


async def test_first_and_last_may_be_computed_in_parallel(postgres_dsn: str):
    query = "SELECT first(close, time), last(close, time) FROM market_data"
    async with database(postgres_dsn) as dsn, connected(dsn) as connection:
        await connection.execute(
            """
            INSERT INTO market_data (time, symbol, close)
            SELECT '2024-01-01'::timestamptz + i * interval '1 minute', 'A', i
              FROM generate_series(1, 5000) i ORDER BY i * 7919 % 5003;
            ANALYZE market_data;
            SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
            SET min_parallel_table_scan_size = 0
            """
        )
        plan = str(await connection.fetch(f"EXPLAIN {query}"))
        assert "Partial Aggregate" in plan and "Gather" in plan
        assert tuple(await connection.fetchrow(query)) == (1, 5000)


async def test_a_new_revision_of_an_unchanged_schema_is_empty(
    server_dsn: str, repository: Path
):
    async with database(server_dsn) as dsn:
        await alembic(dsn, "revision", "--autogenerate", "-m", "none", cwd=repository)
    made = repository / "migrations/versions/0006_none.py"
    assert "op." not in made.read_text()


async def test_a_failed_migration_leaves_the_database_as_it_was(
    server_dsn: str, repository: Path
):
    (repository / "migrations/versions/0006_broken.py").write_text(BROKEN_MIGRATION)
    async with database(server_dsn) as dsn:
        before = await names(dsn), await fetch(dsn, "SELECT * FROM server_keys")
        with pytest.raises(AssertionError, match="division by zero"):
            await alembic(dsn, "upgrade", "head", cwd=repository)
        after = await names(dsn), await fetch(dsn, "SELECT * FROM server_keys")
        assert after == before
        await alembic(dsn, "check")


async def test_a_server_refuses_a_schema_that_is_not_its_own(server_dsn: str):
    async with database(server_dsn, migrated=False) as dsn:
        opened = await Database.open(dsn)
        with pytest.raises(migrate.SchemaOutdated, match="run `quantplane-server migr"):
            await migrate.check_current(opened, "timeseries")
        await migrate.upgrade(dsn)
        await migrate.check_current(opened, "timeseries")
        await opened.close()


async def test_who_may_not_create_the_extension_is_told_who_may(timescale_dsn: str):
    role = f"desk_{uuid.uuid4().hex}"
    async with (
        database(timescale_dsn, migrated=False) as dsn,
        connected(dsn) as connection,
    ):
        await connection.execute(f"CREATE ROLE {role}")
        await connection.execute(f"GRANT ALL ON SCHEMA public TO {role}")
        try:
            with pytest.raises(AssertionError, match="CREATE EXTENSION timescaledb"):
                await alembic(f"{dsn}&role={role}", "upgrade", "head")
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def test_alembic_takes_the_urls_of_sqlalchemy_too(postgres_dsn: str):
    async with database(postgres_dsn) as dsn:
        dsn = dsn.replace("postgresql://", "postgresql+asyncpg://")
        assert migrate.head_revision() in await alembic(dsn, "current")


async def test_alembic_asks_for_the_database_it_was_not_given():
    with pytest.raises(AssertionError, match="set QUANTPLANE_POSTGRES_DSN"):
        await alembic("", "current")


def add_tables(repository: Path) -> None:
    with (repository / "migrations/tables.py").open("a") as file:
        file.write(MORE_TABLES)


async def alembic(
    dsn: str, *command: str, cwd: Path = REPOSITORY, **variables: str
) -> str:
    """Run `alembic` as a person does, and return what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "alembic", *command),
        cwd=cwd,
        env=os.environ | {"QUANTPLANE_POSTGRES_DSN": dsn} | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


async def assert_equal_results(
    a_dsn: str, b_dsn: str, query: str, *arguments: object
) -> None:
    """Run the query on the shims and on TimescaleDB's own functions."""
    async with database(a_dsn) as a, database(b_dsn) as b:
        assert await edition_of(a) is Edition.PLAIN
        assert await edition_of(b) is not Edition.PLAIN
        results = await fetch(a, query, *arguments)
        assert results == await fetch(b, query, *arguments)
        assert results


def some_times(dice: random.Random, count: int) -> list[datetime]:
    """Different times, before and after 2000, to the microsecond."""
    century = timedelta(days=36_525) // timedelta(microseconds=1)
    start = datetime(1950, 1, 1, tzinfo=UTC)
    steps = dice.sample(range(century), count)
    return [start + timedelta(microseconds=step) for step in steps]


async def edition_of(dsn: str) -> Edition:
    opened = await Database.open(dsn, pool_size=1)
    await opened.close()
    return opened.edition


async def names(dsn: str) -> list[str]:
    """The names of all that is in the database and not of an extension."""
    rows = await fetch(
        dsn,
        """
        SELECT name::text FROM (
            SELECT oid, relname, relnamespace FROM pg_class
            UNION SELECT oid, proname, pronamespace FROM pg_proc
        ) AS object (oid, name, namespace)
         WHERE namespace = 'public'::regnamespace
           AND NOT EXISTS (SELECT FROM pg_depend
                            WHERE objid = object.oid AND deptype = 'e')
         ORDER BY name
        """,
    )
    return [name for (name,) in rows]


async def fetch(dsn: str, query: str, *arguments: object) -> list[tuple[Any, ...]]:
    async with connected(dsn) as connection:
        return [tuple(row) for row in await connection.fetch(query, *arguments)]


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn, server_settings={"timezone": "UTC"})
    try:
        yield connection
    finally:
        await connection.close()


async def until(connection: asyncpg.Connection, condition: str) -> None:
    async with asyncio.timeout(30):
        while not await connection.fetchval(
            f"SELECT pg_sleep(0.01), ({condition})", column=1
        ):
            pass
