"""What a hypertable costs when rows come in, in rows a second."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from benchmarks.harness import Bench, Figure, Sample
from benchmarks.recording import QUOTES, copy
from benchmarks.tape import Tape
from tests.postgres import database
from tests.timescale import timescale_server

PLAIN = "plain_market_data"


async def vs_plain(bench: Bench) -> Figure:
    """Compare COPY, as the recorder's, into market_data and into a plain table."""
    bench.note("starting TimescaleDB")
    async with _timescale() as server, database(server) as dsn:
        conn = await asyncpg.connect(dsn)
        try:
            await conn.execute(f"CREATE TABLE {PLAIN} (LIKE market_data INCLUDING ALL)")

            async def fill(table: str) -> Sample:
                await conn.execute(f"TRUNCATE {table}")
                arguments = {"dsn": dsn, "tape": Tape(QUOTES).json(), "table": table}
                async with bench.child(copy, **arguments) as child:
                    await child.hear()
                    child.say(go=True)
                    return {"value": QUOTES / (await child.hear())["seconds"]}

            return await bench.in_turns(
                "rows/s", lambda: fill("market_data"), lambda: fill(PLAIN)
            )
        finally:
            await conn.close()


@asynccontextmanager
async def _timescale() -> AsyncIterator[str]:
    """Yield a TimescaleDB server; it runs event loops of its own to start and stop."""
    server = timescale_server()
    dsn = await asyncio.to_thread(server.__enter__)
    try:
        yield dsn
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)
