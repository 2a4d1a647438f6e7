"""The database: a pool of connections, and which edition of it this is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from time import perf_counter
from typing import Literal, NamedTuple, Self, TypeAlias

import asyncpg
import asyncpg.pool

from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import CONNECTION_WAIT, DB_ERRORS
from quantplane_server.telemetry.statements import Statements, waited

Connection: TypeAlias = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Isolation: TypeAlias = Literal["read_committed", "repeatable_read"]

# What to catch around `connection` or `transaction`, not inside of them, to learn
# that the database is away and a later try may succeed. OSError covers refused,
# reset and missing sockets, and TimeoutError.
UNAVAILABLE: tuple[type[Exception], ...] = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
)

EDITION = """
    SELECT CASE
        WHEN NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')
            THEN 'plain'
        WHEN current_setting('timescaledb.license', true) = 'timescale'
            THEN 'community'
        ELSE 'apache'
    END
"""

# Where each part of the schema keeps its revision; they may live in two databases.
VERSION_TABLES = {
    "timeseries": "alembic_version",
    "reference": "alembic_version_reference",
}

# A schema that is there while a backup is restored, and after a restore that was cut
# off.
RESTORING = "quantplane_restoring"

LOST = "the connection was lost"


class Edition(StrEnum):
    """What the database can do, from the least to the most."""

    PLAIN = "plain"
    """PostgreSQL alone."""

    APACHE = "apache"
    """TimescaleDB's hypertables, without its policies and aggregates."""

    COMMUNITY = "community"
    """All of TimescaleDB."""


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that is reset only if it was spoilt: that takes a round trip."""

    _spoilt = False

    def spoil(self) -> None:
        """Say that a statement may have been cut off.

        If that was while it was prepared, it has a transaction begun of which asyncpg
        does not know.
        """
        self._spoilt = True

    def get_reset_query(self) -> str:
        spoilt, self._spoilt = self._spoilt, False
        return str(super().get_reset_query()) if spoilt else ""


class _Traced(Statements, _Connection):
    """A connection whose statements have spans, within calls that are recorded."""


class Pool(NamedTuple):
    """How the connections of a database are doing."""

    size: int  # open
    in_use: int
    max_size: int
    waiting: int  # who would use one


class Database:
    """Connections to one PostgreSQL database, replaced when they are lost."""

    def __init__(
        self, pool: asyncpg.Pool, edition: Edition, acquire_timeout_s: float, name: str
    ) -> None:
        self.edition = edition
        self.name = name
        self._pool = pool
        self._acquire_timeout_s = acquire_timeout_s
        self._users = 0  # of connections, and who would be one

    @classmethod
    async def open(
        cls,
        dsn: str,
        pool_size: int = 10,
        acquire_timeout_s: float = 10,
        name: str = "db",
    ) -> Self:
        """Connect, and find out the edition. Raises one of UNAVAILABLE if away.

        Metrics have the name.

        Waiting longer than `acquire_timeout_s` for a free connection raises
        TimeoutError, which callers meet as an unavailable database.
        """
        pool = await asyncpg.create_pool(
            dsn,
            min_size=0,  # a floor would be tried, and logged, while PostgreSQL is away
            max_size=pool_size,
            timeout=acquire_timeout_s,
            connection_class=_Traced if tracing.tracer else _Connection,
            server_settings={"timezone": "UTC", "application_name": "quantplane"},
        )
        try:
            edition = Edition(await pool.fetchval(EDITION))
        except BaseException:
            pool.terminate()
            raise
        return cls(pool, edition, acquire_timeout_s, name)

    async def close(self) -> None:
        """Wait until every connection has been given back, then close them."""
        await self._pool.close()

    def pool(self) -> Pool:
        size = self._pool.get_size()
        in_use = size - self._pool.get_idle_size()
        waiting = max(0, self._users - in_use)
        return Pool(size, in_use, self._pool.get_max_size(), waiting)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit mode: each statement is its own transaction.

        To leave the block by an error resets it; nothing else does. So a statement that
        is cut off must end the block, and who changes settings or takes session locks
        needs a `session`.
        """
        self._users += 1
        began = perf_counter()
        try:
            async with self._pool.acquire(
                timeout=self._acquire_timeout_s
            ) as connection:
                if CONNECTION_WAIT.on:
                    CONNECTION_WAIT.record(perf_counter() - began, self.name)
                waited(perf_counter() - began)
                try:
                    yield connection
                except BaseException as error:
                    if not _lost(connection):
                        connection.spoil()
                    elif isinstance(error, asyncpg.InterfaceError):
                        # asyncpg raises it for a caller's mistake too, which no later
                        # try would mend.
                        raise ConnectionResetError(LOST) from error
                    raise
        except asyncpg.InternalClientError as error:
            # PostgreSQL said that it ends the connection, and has not closed it yet.
            raise ConnectionResetError(LOST) from error
        except (asyncpg.PostgresError, OSError) as error:
            DB_ERRORS.add(1, type(error).__name__)
            raise
        finally:
            self._users -= 1

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Connection]:
        """A connection that is closed at the end, and its advisory locks with it."""
        async with self.connection() as connection:
            try:
                yield connection
            finally:
                connection.terminate()

    @asynccontextmanager
    async def transaction(
        self, isolation: Isolation = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Connection]:
        """A connection in a transaction: committed at the end, or undone by an error.

        With `repeatable_read` every statement sees the same snapshot.
        """
        async with (
            self.connection() as connection,
            connection.transaction(isolation=isolation, readonly=readonly),
        ):
            yield connection

    async def ping(self) -> None:
        """Return if the database answers."""
        async with self.connection() as connection:
            await connection.execute("SELECT 1")

    async def is_partial(self) -> bool:
        """Whether a backup is being restored into it, or was so not to the end."""
        async with self.connection() as connection:
            marked = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)"
            return bool(await connection.fetchval(marked, RESTORING))

    async def schema_revision(self, part: str) -> str | None:
        """The revision that migrations have brought a part of the schema to, if any."""
        table = VERSION_TABLES[part]
        async with self.connection() as connection:
            if await connection.fetchval("SELECT to_regclass($1)", table):
                revision: str | None = await connection.fetchval(
                    f"SELECT version_num FROM {table}"
                )
                return revision
            return None


async def try_lock(conn: Connection, name: str, number: int = 0) -> bool:
    """Take an advisory lock while the connection lives, if nobody else has it."""
    locked: bool = await conn.fetchval(
        "SELECT pg_try_advisory_lock(hashtext($1), $2)", name, number
    )
    return locked


def _lost(connection: Connection) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:  # the pool has taken a lost connection back
        return True
