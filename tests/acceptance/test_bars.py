"""A month of one-minute bars, imported and read back in every way there is."""

import csv
import math
from datetime import timedelta
from pathlib import Path

from quantplane import Client, frames
from quantplane import v1 as pb
from tests.acceptance import (
    FUTURE,
    Row,
    aggregated,
    future,
    minutes,
    needs_data,
    quantplane,
    row_of,
    stamp,
)
from tests.conftest import Server, both_editions

pytestmark = needs_data
PAIR, CONTRACT = "GBPUSD", "6EH4"
COUNT = 30_117

INTERVALS = timedelta(minutes=5), timedelta(hours=1), timedelta(days=1)


async def import_pair(server: Server, folder: Path) -> list[Row]:
    """Import bid and ask joined into one file; return what it must come back as."""
    rows = minutes()
    joined = folder / "joined.csv"
    with joined.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["time", "bid", "ask"])
        writer.writerows([row.time.isoformat(), row.bid, row.ask] for row in rows)
    told = await quantplane(
        "import", "bars", joined, "--symbol", PAIR, target=server.target
    )
    assert told == f"{COUNT:,} rows read, {COUNT:,} stored, 0 refused\n"
    return rows


async def import_future(server: Server) -> list[Row]:
    """Import the file as it is."""
    columns = ("time=timestamp_utc", "open=open", "high=high", "low=low")
    more = ("close=close", "volume=volume")
    await quantplane(
        *("import", "bars", FUTURE, "--symbol", CONTRACT),
        *("--columns", ",".join(columns + more)),
        target=server.target,
    )
    return future()


async def listed(client: Client, request: pb.ListBarsRequest) -> list[Row]:
    """Return the bars of all pages."""
    rows: list[Row] = []
    while True:
        response = await client.market_data.ListBars(request)
        assert len(response.bars) <= (request.page_size or 1_000)
        rows += map(row_of, response.bars)
        request.page_token = response.next_page_token
        if not request.page_token:
            return rows


async def streamed(client: Client, request: pb.StreamBarsRequest) -> list[Row]:
    """Return the bars of all columns."""
    rows: list[Row] = []
    for chunk in await frames.read_bars(client, request):
        stamps = [pb.Bar().time for _ in chunk.time_us]
        for at, time_us in zip(stamps, chunk.time_us, strict=True):
            at.FromMicroseconds(time_us)
        columns = [list(getattr(chunk, name)) for name in Row._fields[1:]]
        filled = [column or [None] * len(stamps) for column in columns]
        for at, *values in zip(stamps, *filled, strict=True):
            known = [None if v in (None, -1) or math.isnan(v) else v for v in values]
            rows.append(Row(row_of(pb.Bar(time=at)).time, *known))
    return rows


@both_editions
async def test_imported_bars_come_back_from_pages(
    server: Server, client: Client, tmp_path: Path
):
    rows = await import_pair(server, tmp_path)
    assert len(rows) == COUNT
    for page_size in (0, 7_000, 10_000):
        request = pb.ListBarsRequest(symbol=PAIR, page_size=page_size)
        assert await listed(client, request) == rows
    part = pb.ListBarsRequest(
        symbol=PAIR, start_time=stamp(rows[100].time), end_time=stamp(rows[5_000].time)
    )
    assert await listed(client, part) == rows[100:5_000]


@both_editions
async def test_imported_bars_come_back_as_columns(
    server: Server, client: Client, tmp_path: Path
):
    rows = await import_pair(server, tmp_path)
    assert await streamed(client, pb.StreamBarsRequest(symbols=[PAIR])) == rows


async def test_imported_bars_come_back_as_a_pandas_frame(
    server: Server, client: Client, tmp_path: Path
):
    rows = await import_pair(server, tmp_path)
    request = pb.StreamBarsRequest(symbols=[PAIR])
    frame = frames.to_pandas(await frames.read_bars(client, request))
    assert len(frame) == COUNT
    assert (frame["symbol"] == PAIR).all()
    assert [time.to_pydatetime() for time in frame["time"]] == [r.time for r in rows]
    for name in ("close", "bid", "ask"):
        assert frame[name].tolist() == [getattr(row, name) for row in rows]
    unknown = ["open", "high", "low", "volume", "vwap", "bid_size", "ask_size"]
    assert frame[unknown].isna().all(axis=None)


@both_editions
async def test_bars_of_longer_intervals_are_those_of_plain_python(
    server: Server, client: Client, tmp_path: Path
):
    symbols = {
        PAIR: await import_pair(server, tmp_path),
        CONTRACT: await import_future(server),
    }
    for symbol, rows in symbols.items():
        for length in INTERVALS:
            expected = aggregated(rows, length)
            request = pb.ListBarsRequest(symbol=symbol, page_size=500)
            request.interval.FromTimedelta(length)
            assert await listed(client, request) == expected
            whole = pb.StreamBarsRequest(symbols=[symbol], interval=request.interval)
            assert await streamed(client, whole) == expected
