"""How fast the daily bars of a year are, from one-minute bars, in bars a second."""

from datetime import timedelta
from time import perf_counter

import asyncpg

from benchmarks import bars
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure
from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.db import Database
from quantplane_server.market_data.daily import aggregate_days

ROUNDS = 3
CALLS = 20  # of ListBars, a round

FROM_ROWS = """
    SELECT time_bucket('1 day', time) AS day,
           first(open, time), max(high), min(low), last(close, time), sum(volume),
           sum(vwap * volume) / nullif(sum(volume), 0),
           last(bid, time), last(ask, time), last(bid_size, time), last(ask_size, time)
      FROM market_data WHERE symbol = $1
     GROUP BY day ORDER BY day
"""


async def vs_rows(bench: Bench) -> Figure:
    """Compare ListBars, served by the aggregate, with SQL on the rows by asyncpg."""
    await bars.load(bench.dsn)
    db = await Database.open(bench.dsn)
    await aggregate_days(db)
    await db.close()
    async with (
        bench.server() as (target, _),
        bench.child(compare, target=target, dsn=bench.dsn) as child,
    ):
        turns = []
        for turn in range(ROUNDS):
            bench.note(f"round {turn + 1} of {ROUNDS}")
            turns.append(await child.hear())
    ours = [{"value": bars.DAYS / turn["aggregate_s"]} for turn in turns]
    baseline = [{"value": bars.DAYS / turn["rows_s"]} for turn in turns]
    figure = Figure.of("bars/s", ours, baseline)
    figure.extra["call_ms"] = round(1e3 * bars.DAYS / figure.value, 2)
    figure.extra["baseline_query_ms"] = round(1e3 * bars.DAYS / figure.baseline, 1)
    return figure


async def compare(parent: Parent, target: str, dsn: str) -> None:
    """Read the year both ways in turns; say the seconds that each took."""
    conn = await asyncpg.connect(dsn)
    request = pb.ListBarsRequest(symbol=bars.SYMBOL)
    request.interval.FromTimedelta(timedelta(days=1))
    async with Client(target) as client:
        for _ in range(ROUNDS):
            began = perf_counter()
            for _ in range(CALLS):
                response = await client.market_data.ListBars(request)
            between = perf_counter()
            rows = await conn.fetch(FROM_ROWS, bars.SYMBOL)
            ended = perf_counter()
            assert response.source == pb.BAR_SOURCE_DAILY
            assert [b.close for b in response.bars] == [row[4] for row in rows]
            parent.say(aggregate_s=(between - began) / CALLS, rows_s=ended - between)
