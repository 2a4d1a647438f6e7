import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from quantplane_server import migrate
from quantplane_server.db import UNAVAILABLE, Connection, Database, Edition
from quantplane_server.embedded import Postgres
from tests.postgres import database

SOCKET = ".s.PGSQL.5432"
ENDING = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"
ENDED = b"E" + (len(ENDING) + 4).to_bytes(4, "big") + ENDING

END_SLEEPER = """
    DO $$ BEGIN
        LOOP
            PERFORM pg_stat_clear_snapshot();
            PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND wait_event = 'PgSleep';
            EXIT WHEN FOUND;
        END LOOP;
    END $$
"""


@pytest.fixture(params=["postgres_dsn", "timescale_dsn"], ids=["plain", "timescale"])
def server_dsn(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


async def test_the_edition_is_what_the_database_has(
    postgres_dsn: str, timescale_dsn: str
):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        assert db.edition is Edition.PLAIN
    async with database(timescale_dsn) as dsn, opened(dsn) as db:
        async with db.connection() as connection:
            license = await connection.fetchval("SHOW timescaledb.license")
        expected = {"apache": Edition.APACHE, "timescale": Edition.COMMUNITY}
        assert db.edition is expected[license]


async def test_a_database_without_the_extension_is_plain_on_any_server(
    server_dsn: str,
):
    async with database(server_dsn, migrated=False) as dsn, opened(dsn) as db:
        assert db.edition is Edition.PLAIN


async def test_the_schema_has_a_revision_once_it_is_migrated(server_dsn: str):
    async with database(server_dsn, migrated=False) as dsn, opened(dsn) as db:
        assert await db.schema_revision("timeseries") is None
        await migrate.upgrade(dsn)
        assert await db.schema_revision("timeseries") == migrate.head_revision()


async def test_connections_speak_utc(postgres_dsn: str):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        async with db.connection() as connection:
            assert await connection.fetchval("SHOW timezone") == "UTC"
            assert await connection.fetchval("SHOW application_name") == "quantplane"


async def test_a_session_takes_its_locks_with_it(postgres_dsn: str):
    lock = "SELECT pg_advisory_lock(1)"
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        async with db.session() as session:
            await session.execute(lock)
        async with asyncio.timeout(10), db.connection() as connection:
            await connection.execute(lock)


async def test_a_transaction_is_kept_at_its_end_and_undone_by_an_error(
    postgres_dsn: str,
):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        async with db.transaction() as connection:
            await put(connection, "kept")
        with pytest.raises(LookupError):
            async with db.transaction() as connection:
                await put(connection, "undone")
                raise LookupError
        async with db.connection() as connection:
            assert await purposes(connection) == {"kept", "tokens"}


async def test_a_readonly_transaction_refuses_to_write(postgres_dsn: str):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            async with db.transaction(readonly=True) as connection:
                await put(connection, "refused")


@pytest.mark.parametrize(
    ("isolation", "seen"),
    [("read_committed", {"tokens", "later"}), ("repeatable_read", {"tokens"})],
)
async def test_only_a_repeatable_read_sees_one_snapshot(
    postgres_dsn: str, isolation, seen
):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        async with db.transaction(isolation) as reader:
            assert await purposes(reader) == {"tokens"}
            async with db.connection() as writer:
                await put(writer, "later")
            assert await purposes(reader) == seen


async def test_a_connection_that_is_lost_is_unavailable_and_replaced(
    postgres_dsn: str,
):
    async with database(postgres_dsn) as dsn, opened(dsn, pool_size=2) as db:
        with pytest.raises(UNAVAILABLE):
            async with db.transaction() as lost, db.connection() as other:
                query = asyncio.create_task(lost.fetchval("SELECT pg_sleep(60)"))
                await other.fetchval(END_SLEEPER)
                await query
        async with db.connection() as one, db.connection() as two:
            assert await one.fetchval("SELECT 1") + await two.fetchval("SELECT 1") == 2


async def test_a_connection_lost_between_statements_is_unavailable_too(
    postgres_dsn: str,
):
    async with database(postgres_dsn) as dsn, opened(dsn, pool_size=2) as db:
        with pytest.raises(UNAVAILABLE):
            async with db.transaction() as lost, db.connection() as other:
                noticed = asyncio.Event()
                lost.add_termination_listener(lambda _: noticed.set())
                pid = await lost.fetchval("SELECT pg_backend_pid()")
                await other.fetchval("SELECT pg_terminate_backend($1)", pid)
                await noticed.wait()
                await lost.fetchval("SELECT 1")


async def test_a_connection_is_unavailable_once_postgresql_says_that_it_ends(
    postgres_dsn: str, tmp_path: Path
):
    async with (
        relayed(postgres_dsn, tmp_path) as (dsn, clients),
        opened(dsn, pool_size=2) as db,
        db.connection() as other,
    ):
        for begin in (db.connection, db.transaction):
            async with db.connection() as connection:
                await connection.fetchval("SELECT 1")
            clients[-1].write(ENDED)
            await other.fetchval("SELECT 1")  # by then it was read
            with pytest.raises(UNAVAILABLE):
                async with begin() as connection:
                    await connection.fetchval("SELECT 1")


async def test_who_is_cut_off_leaves_nothing_to_the_next_user(postgres_dsn: str):
    """Wherever it was: preparing a statement leaves a transaction of its own."""
    async with database(postgres_dsn) as dsn, opened(dsn, pool_size=1) as db:

        async def read(n: int) -> None:
            async with db.connection() as connection:
                await connection.fetchval(f"SELECT {n} + $1::int", n)  # prepared anew

        for steps in range(100):
            reading = asyncio.create_task(read(steps))
            for _ in range(steps):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            async with db.transaction("repeatable_read") as connection:
                assert await connection.fetchval("SHOW transaction_isolation") == (
                    "repeatable read"
                )


async def test_a_wrong_argument_is_not_taken_for_an_absent_database(postgres_dsn: str):
    async with database(postgres_dsn) as dsn, opened(dsn) as db:
        with pytest.raises(asyncpg.DataError) as caught:
            async with db.connection() as connection:
                await connection.fetchval("SELECT $1::int", "word")
        assert not isinstance(caught.value, UNAVAILABLE)


async def test_waiting_for_a_free_connection_ends(postgres_dsn: str):
    async with database(postgres_dsn) as dsn:
        async with opened(dsn, pool_size=1, acquire_timeout_s=0.1) as db:
            async with db.connection():
                with pytest.raises(TimeoutError):
                    async with db.connection():
                        pass
            async with db.connection() as connection:
                assert await connection.fetchval("SELECT 1") == 1


async def test_a_database_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(UNAVAILABLE):
        await Database.open(f"postgresql://nobody@/nothing?host={tmp_path}")


async def test_the_pool_recovers_when_postgresql_was_killed():
    async with Postgres() as server, opened(server.dsn, pool_size=3) as db:
        with pytest.raises(UNAVAILABLE):
            async with db.connection() as one, db.connection():
                await server.kill()
                await one.fetchval("SELECT 1")
        for _ in range(5):
            with pytest.raises(UNAVAILABLE):
                async with db.transaction() as connection:
                    await connection.fetchval("SELECT 1")
        await server.start()
        for _ in range(5):
            async with db.transaction() as connection:
                assert await connection.fetchval("SELECT 1") == 1


@asynccontextmanager
async def opened(dsn: str, **options: Any) -> AsyncIterator[Database]:
    db = await Database.open(dsn, **options)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def relayed(
    dsn: str, folder: Path
) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """A DSN of the same server, and what writes to each client beside the server."""
    server_folder = parse_qs(urlsplit(dsn).query)["host"][0]
    clients = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer)
        path = f"{server_folder}/{SOCKET}"
        from_server, to_server = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, to_server), copy(from_server, writer))

    async with await asyncio.start_unix_server(relay, folder / SOCKET):
        yield dsn.replace(server_folder, str(folder)), clients


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


async def put(connection: Connection, purpose: str) -> None:
    await connection.execute("INSERT INTO server_keys VALUES ($1, '')", purpose)


async def purposes(connection: Connection) -> set[str]:
    rows = await connection.fetch("SELECT purpose FROM server_keys")
    return {row["purpose"] for row in rows}
