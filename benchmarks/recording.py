"""How fast quotes get into the database, in rows a second."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import asyncpg

from benchmarks import streams
from benchmarks.child import Parent
from benchmarks.harness import ANSWER_S, Bench, Figure, Sample
from benchmarks.tape import Tape
from quantplane_server.bus import SHARDS, Bus, Position
from quantplane_server.market_data.durability import Durability

QUOTES = 200_000
BATCH_ROWS = 10_000  # of the baseline, each its own commit
COLUMNS = (
    "time", "symbol", "open", "high", "low", "close", "volume", "vwap", "bid", "ask",
    "bid_size", "ask_size",
)  # fmt: skip


async def vs_copy(bench: Bench) -> Figure:
    """Compare a recorder that finds the bus full with COPY of the same rows."""
    figure = await bench.in_turns("rows/s", lambda: _drain(bench), lambda: _copy(bench))
    bench.note("end to end")
    rates = [await _end_to_end(bench) for _ in range(2)]
    figure.extra["end_to_end_per_s"] = round(sum(rates) / len(rates))
    return figure


async def _drain(bench: Bench) -> Sample:
    """Fill the bus without a recorder, then measure one until all is committed."""
    tape = Tape(QUOTES)
    await bench.empty_bus()
    async with bench.database() as dsn:
        async with bench.server_without_recorder(dsn=dsn) as (target, _):
            await _publish(bench, target, tape, durable=False)
        async with _recorded(bench.redis_url) as (recorded, heads):
            async with bench.command("record", dsn=dsn):
                began = perf_counter()
                await recorded(heads)
                seconds = perf_counter() - began
        await _check_rows(dsn)
    return {"value": QUOTES / seconds}


async def _copy(bench: Bench) -> Sample:
    async with bench.database() as dsn:
        async with bench.child(copy, dsn=dsn, tape=Tape(QUOTES).json()) as child:
            await child.hear()
            child.say(go=True)
            seconds = (await child.hear())["seconds"]
        await _check_rows(dsn)
    return {"value": QUOTES / seconds}


async def _end_to_end(bench: Bench) -> float:
    """Return rows a second from the first quote published to the last durable."""
    await bench.empty_bus()
    async with bench.database() as dsn, bench.server(dsn=dsn) as (target, _):
        return QUOTES / await _publish(bench, target, Tape(QUOTES), durable=True)


async def _publish(bench: Bench, target: str, tape: Tape, durable: bool) -> float:
    """Return the seconds until all is accepted, or durable."""
    tape_json = tape.json()
    async with bench.child(streams.publish, target=target, tape=tape_json) as child:
        await child.hear()
        child.say(go=True)
        published = await child.hear()
        if durable:
            published |= await child.hear()
    end: float = published["durable" if durable else "accepted"]
    return end - published["began"]


@asynccontextmanager
async def _recorded(redis_url: str) -> AsyncIterator[Any]:
    """Yield what waits until given positions are durable, and the present heads."""
    bus = Bus(redis_url, cap_bytes=1 << 40)
    durability = Durability(bus)
    changed = asyncio.Event()
    durability.changed.add(changed)

    async def recorded(heads: dict[int, Position]) -> None:
        async with asyncio.timeout(ANSWER_S):
            while not durability.covers(heads):
                await changed.wait()
                changed.clear()

    following = asyncio.create_task(durability.run())
    try:
        heads = await bus.heads(range(SHARDS))
        yield recorded, {shard: head for shard, head in heads.items() if head.number}
    finally:
        following.cancel()
        await asyncio.wait([following])
        await bus.close()


async def _check_rows(dsn: str) -> None:
    conn = await asyncpg.connect(dsn)
    try:
        rows = await conn.fetchval("SELECT count(*) FROM market_data")
    finally:
        await conn.close()
    if rows != QUOTES:
        raise RuntimeError(f"{rows:,} rows were stored, not {QUOTES:,}")


async def copy(
    parent: Parent, dsn: str, tape: dict[str, Any], table: str = "market_data"
) -> None:
    """COPY a tape's rows when told to; say how many seconds that took."""
    rows = list(Tape(**tape).rows())
    conn = await asyncpg.connect(dsn)
    parent.say(ready=True)
    await parent.hear()
    began = perf_counter()
    for start in range(0, len(rows), BATCH_ROWS):
        await conn.copy_records_to_table(
            table, records=rows[start : start + BATCH_ROWS], columns=COLUMNS
        )
    parent.say(seconds=perf_counter() - began)
    await conn.close()
