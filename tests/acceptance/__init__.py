"""Helpers: real files, read in plain Python, and the command run as a process."""

import asyncio
import csv
import gzip
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb

COMMAND = Path(sys.executable).with_name("quantplane")
DATA = Path(__file__).parents[3] / "shared" / "data"
TICKS = DATA / "eurusd-ticks-2020-01-01.csv.gz"
BIDS = DATA / "gbpusd-m1-bid-2012.csv.gz"
ASKS = DATA / "gbpusd-m1-ask-2012.csv.gz"
FUTURE = DATA / "6EH4-m1-2024-01.csv.gz"
PATIENCE_S = 60.0
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")


async def quantplane(*arguments: str | Path, target: str) -> str:
    """Run the command and return what it prints; fail unless it succeeds."""
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *map(str, arguments),
        "--target",
        target,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode()


class Tick(NamedTuple):
    time: datetime
    bid: float
    ask: float


class Row(NamedTuple):
    """A bar; None is unknown."""

    time: datetime
    open: float | None
    high: float | None
    low: float | None
    close: float
    volume: int | None
    bid: float | None
    ask: float | None


def ticks() -> list[Tick]:
    """Return the file's ticks; its stamps are five hours behind UTC."""
    with gzip.open(TICKS, "rt") as file:
        return [
            Tick(_eastern(stamp), float(bid), float(ask))
            for stamp, bid, ask, _ in csv.reader(file)
        ]


def _eastern(stamp: str) -> datetime:
    """Parse 20200101 170000065."""
    seconds = datetime.strptime(stamp[:-3], "%Y%m%d %H%M%S").replace(tzinfo=UTC)
    return seconds + timedelta(hours=5, milliseconds=int(stamp[-3:]))


def closes(path: Path) -> dict[datetime, float]:
    """Return the closes of a file of one-minute bars."""
    with gzip.open(path, "rt") as file:
        return {
            datetime.fromisoformat(row["timestamp"]): float(row["close"])
            for row in csv.DictReader(file)
        }


def minutes() -> list[Row]:
    """Return bid and ask joined by minute; the close is the middle."""
    bids, asks = closes(BIDS), closes(ASKS)
    return [
        Row(t, None, None, None, (bids[t] + asks[t]) / 2, None, bids[t], asks[t])
        for t in sorted(bids.keys() & asks.keys())
    ]


def future() -> list[Row]:
    """Return the future's bars, which have open, high, low and volume."""
    with gzip.open(FUTURE, "rt") as file:
        return [
            Row(
                datetime.fromisoformat(row["timestamp_utc"]).replace(tzinfo=UTC),
                *(float(row[name]) for name in ("open", "high", "low", "close")),
                int(row["volume"]),
                None,
                None,
            )
            for row in csv.DictReader(file)
        ]


def aggregated(rows: list[Row], interval: timedelta) -> list[Row]:
    """Return the bars of the interval, aligned in UTC."""
    buckets: dict[datetime, list[Row]] = {}
    for row in rows:
        buckets.setdefault(row.time - (row.time - EPOCH) % interval, []).append(row)
    return [_merged(start, bucket) for start, bucket in buckets.items()]


def _merged(start: datetime, rows: list[Row]) -> Row:
    first, last = rows[0], rows[-1]
    return Row(
        start,
        first.close if first.open is None else first.open,
        max(row.close if row.high is None else row.high for row in rows),
        min(row.close if row.low is None else row.low for row in rows),
        last.close,
        None if first.volume is None else sum(row.volume or 0 for row in rows),
        last.bid,
        last.ask,
    )


def row_of(bar: pb.Bar) -> Row:
    names = Row._fields[1:]
    values = [getattr(bar, name) if bar.HasField(name) else None for name in names]
    return Row(bar.time.ToDatetime(tzinfo=UTC), *values)


def stamp(time: datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(time)
    return made


async def recorded(dsn: str) -> list[asyncpg.Record]:
    """Return the rows of market_data in order of time."""
    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch("SELECT * FROM market_data ORDER BY time"))
    finally:
        await connection.close()
