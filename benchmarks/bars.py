"""How fast bars get from the database into a program, in rows a second."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import asyncpg
import numpy as np

from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure
from benchmarks.recording import COLUMNS
from quantplane import Client, frames
from quantplane import v1 as pb

DAYS = 257  # of trading in a year, each of 24 hours
ROWS = DAYS * 1_440  # one-minute bars
ROUNDS = 3
SYMBOL = "BARS"
START = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday
DTYPE = np.dtype(
    [
        ("time", "i8"), ("open", "f8"), ("high", "f8"), ("low", "f8"),
        ("close", "f8"), ("volume", "i8"), ("vwap", "f8"), ("bid", "f8"),
        ("ask", "f8"), ("bid_size", "i4"), ("ask_size", "i4"),
    ]
)  # fmt: skip


async def vs_asyncpg(bench: Bench) -> Figure:
    """Compare StreamBars into pandas with asyncpg into a numpy record array."""
    await load(bench.dsn)
    async with (
        bench.server() as (target, _),
        bench.child(compare, target=target, dsn=bench.dsn) as child,
    ):
        turns = []
        for turn in range(ROUNDS):
            bench.note(f"round {turn + 1} of {ROUNDS}")
            turns.append(await child.hear())
    ours = [{"value": ROWS / turn["frame_s"]} for turn in turns]
    baseline = [{"value": ROWS / turn["array_s"]} for turn in turns]
    return Figure.of("rows/s", ours, baseline)


async def load(dsn: str) -> None:
    """Store a year of one-minute bars of one symbol, and mark its days."""
    conn = await asyncpg.connect(dsn)
    try:
        await conn.copy_records_to_table(
            "market_data", records=_rows(), columns=COLUMNS
        )
        await conn.execute(
            """
            INSERT INTO pending_days (symbol, day)
            SELECT DISTINCT symbol, time_bucket('1 day', time) FROM market_data
            """
        )
        await conn.execute("VACUUM ANALYZE market_data")
    finally:
        await conn.close()


def _rows() -> Iterator[tuple[Any, ...]]:
    for i in range(ROWS):
        day, minute = divmod(i, 1_440)
        week, weekday = divmod(day, 5)
        time = START + timedelta(weeks=week, days=weekday, minutes=minute)
        price = 100 + i % 997 * 0.01
        prices = (price, price + 0.05, price - 0.05, price + 0.01)
        sides = (price, price + 0.02, 100 + i % 50, 120 + i % 50)
        yield time, SYMBOL, *prices, i % 9_000, price, *sides


async def compare(parent: Parent, target: str, dsn: str) -> None:
    """Read all bars both ways in turns; say the seconds that each took."""
    conn = await asyncpg.connect(dsn)
    # Times as integers, as the array has them: datetime objects would cost more.
    await conn.set_type_codec(
        "timestamptz", schema="pg_catalog", format="tuple",
        encoder=lambda time: time, decoder=lambda time: time[0],
    )  # fmt: skip
    async with Client(target) as client:
        for _ in range(ROUNDS):
            began = perf_counter()
            frame = await _frame(client)
            between = perf_counter()
            array = await _array(conn)
            ended = perf_counter()
            assert len(frame) == len(array) == ROWS
            assert frame["close"].sum() == array["close"].sum()
            parent.say(frame_s=between - began, array_s=ended - between)


async def _frame(client: Client) -> Any:
    request = pb.StreamBarsRequest(symbols=[SYMBOL])
    return frames.to_pandas(await frames.read_bars(client, request))


async def _array(conn: asyncpg.Connection) -> Any:
    rows = await conn.fetch(
        f"""
        SELECT {", ".join(DTYPE.names or ())} FROM market_data
         WHERE symbol = $1 ORDER BY time
        """,
        SYMBOL,
    )
    return np.fromiter(map(tuple, rows), DTYPE, len(rows))
