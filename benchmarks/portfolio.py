"""What watching a portfolio costs, in quotes a second that readers receive."""

import asyncio

import asyncpg

from benchmarks.child import Parent
from benchmarks.fanout import from_server
from benchmarks.harness import Bench, Figure, Sample
from benchmarks.tape import Tape, names
from quantplane import Client
from quantplane import v1 as pb

POSITIONS = 500
QUOTES = 100_000
READERS = 9


async def cost(bench: Bench) -> Figure:
    """Compare quotes beside a watched portfolio of all their symbols with quotes alone.

    The quotes come as fast as they can, which is above 10,000 a second.
    """
    await _hold_positions(bench.dsn)
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "quotes/s",
            lambda: _beside_watcher(bench, target),
            lambda: from_server(bench, target, _tape(), READERS),
            rounds=5,
        )


async def _hold_positions(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.executemany(
        "INSERT INTO positions (symbol, quantity, average_cost, opened_at)"
        " VALUES ($1, 100, 99, now())",
        [(name,) for name in names(POSITIONS)],
    )
    await connection.close()


async def _beside_watcher(bench: Bench, target: str) -> Sample:
    async with bench.child(watch, target=target) as watcher:
        await watcher.hear()
        sample = await from_server(bench, target, _tape(), READERS)
        watcher.say(stop=True)
        return sample | await watcher.hear()


def _tape() -> Tape:
    return Tape(QUOTES, symbols=POSITIONS)


async def watch(parent: Parent, target: str) -> None:
    """Watch the portfolio until told to stop; say how many positions came."""
    positions = 0

    async def follow() -> None:
        nonlocal positions
        request = pb.WatchPortfolioRequest()
        async with Client(target) as client:
            stream = client.follow(client.portfolio.WatchPortfolio, request)
            async for response in stream:
                positions += len(response.positions)
                if response.event.HasField("snapshot_complete"):
                    parent.say(ready=True)

    following = asyncio.create_task(follow())
    await parent.hear()
    parent.say(positions_told=positions)
    following.cancel()
