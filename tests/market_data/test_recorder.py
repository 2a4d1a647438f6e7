"""Recording on a connection that does not last."""

import asyncio

import asyncpg

from quantplane import Client
from tests.conftest import Server
from tests.market_data import quotes

BATCH = 2_000
BATCHES = 5
TRIES = 2

# The recorder's backend, which reads no rows before it has the lock of their table.
COPYING = """
    SELECT pid FROM pg_stat_activity
     WHERE datname = current_database() AND query LIKE 'COPY %'
       AND wait_event_type = 'Lock' AND pid <> ALL ($1)
"""


async def test_quotes_are_recorded_though_the_connection_is_lost_while_they_are_sent(
    server: Server, client: Client, dsn: str
):
    """More than a socket holds, so that who sends them waits for room."""
    ended: list[int] = []
    async with (
        asyncpg.create_pool(dsn, min_size=2, max_size=2) as pool,
        client.publish_quotes() as publisher,
    ):
        async with pool.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE market_data IN EXCLUSIVE MODE")
            for n in range(BATCHES):
                await publisher.send(quotes("A", range(n * BATCH, (n + 1) * BATCH)))
            while len(ended) < TRIES:
                while not (pid := await pool.fetchval(COPYING, ended)):
                    await asyncio.sleep(0.01)
                await pool.execute("SELECT pg_terminate_backend($1)", pid)
                ended.append(pid)
        await publisher.durable()
        stored = await pool.fetch("SELECT symbol, bid FROM market_data ORDER BY time")
    assert [int(row["bid"]) for row in stored] == list(range(BATCHES * BATCH))
