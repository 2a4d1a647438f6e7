"""Short ways to fill a database and to look into it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from quantplane_server.db import Database, Edition


async def execute(db: Database, *statements: str) -> None:
    async with db.connection() as conn:
        for statement in statements:
            await conn.execute(statement)


async def fetch(db: Database, query: str, *args: Any) -> list[Any]:
    async with db.connection() as conn:
        return [tuple(row) for row in await conn.fetch(query, *args)]


async def value(db: Database, query: str, *args: Any) -> Any:
    async with db.connection() as conn:
        return await conn.fetchval(query, *args)


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    while not await condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own, in autocommit mode."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def ticks(db: Database, *ages: str) -> None:
    """Store a row of market data for each age: an interval before now."""
    for age in ages:
        await execute(
            db,
            f"""
            INSERT INTO market_data (time, symbol, close)
            VALUES (now() - INTERVAL '{age}', 'A', 1)
            """,
        )


async def signal(db: Database, age: str, status: str = "active", **more: str) -> str:
    """Store a signal and return its id; further columns are SQL expressions."""
    id = str(uuid.uuid4())
    columns = ", ".join(["status", *more])
    values = ", ".join([f"'{status}'", *more.values()])
    await execute(
        db,
        f"""
        INSERT INTO signals (signal_id, time, strategy_id, symbol, signal_type,
                             strength, confidence, {columns})
        VALUES ('{id}', now() - INTERVAL '{age}', 's', 'A', 'LONG', 1, 1, {values})
        """,
    )
    return id


async def order(db: Database, age: str, signal_id: str | None = None) -> str:
    """Store an order and return its id."""
    id = str(uuid.uuid4())
    await execute(
        db,
        f"""
        INSERT INTO orders (order_id, created_at, signal_id, symbol, side, order_type,
                            quantity)
        VALUES ('{id}', now() - INTERVAL '{age}', {quoted(signal_id)}, 'A', 'buy',
                'market', 1)
        """,
    )
    return id


async def execution(db: Database, age: str, order_id: str | None = None) -> str:
    """Store an execution and return its id."""
    id = str(uuid.uuid4())
    await execute(
        db,
        f"""
        INSERT INTO executions (execution_id, time, order_id, symbol, side, quantity,
                                price)
        VALUES ('{id}', now() - INTERVAL '{age}', {quoted(order_id)}, 'A', 'buy', 1, 1)
        """,
    )
    return id


def quoted(id: str | None) -> str:
    return f"'{id}'" if id else "NULL"


async def keys(db: Database) -> set[str]:
    """Return the ids in all key tables."""
    rows = await fetch(
        db,
        """
        SELECT signal_id::text FROM signal_keys
        UNION ALL SELECT order_id::text FROM order_keys
        UNION ALL SELECT execution_id::text FROM execution_keys
        """,
    )
    return {id for (id,) in rows}


async def vanish(db: Database, table: str, id: str) -> None:
    """Delete a row without its triggers, as dropping its chunk does."""
    async with db.transaction() as conn:
        await conn.execute("SET LOCAL session_replication_role = replica")
        column = f"{table.removesuffix('s')}_id"
        await conn.execute(f"DELETE FROM {table} WHERE {column} = '{id}'")


def has_chunks(db: Database) -> bool:
    return db.edition is not Edition.PLAIN
