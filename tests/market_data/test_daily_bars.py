"""Bars of whole days: from the daily aggregate, and always what the rows give."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quantplane import Client, violations_of
from quantplane import v1 as pb
from quantplane_server.db import Connection, Database, Edition
from quantplane_server.market_data import queries
from quantplane_server.market_data.daily import aggregate_days
from quantplane_server.market_data.queries import BarRange
from tests.conftest import both_editions
from tests.market_data import kind
from tests.market_data.test_bars import (
    START,
    bar,
    listed,
    store,
    streamed,
    unpacked,
)
from tests.market_data.test_daily import (
    DAY,
    DAY_MINUTES,
    daily,
    day_bar,
    pending,
    write,
)

MONDAY = datetime(2000, 1, 3, tzinfo=UTC)

Rows = dict[tuple[str, int], pb.Bar]
"""Bars as stored, by symbol and minute after START."""


# --- Exactness ----------------------------------------------------------------------


def bars_of(rows: Rows, symbol: str, first: int, last: int, width: int) -> list[pb.Bar]:
    """Return the bars of `width` days over minutes [first, last), in plain Python."""
    buckets: dict[datetime, list[pb.Bar]] = {}
    for (name, minute), row in sorted(rows.items()):
        if name == symbol and first <= minute < last:
            time = START + timedelta(minutes=minute)
            buckets.setdefault(time - (time - MONDAY) % (width * DAY), []).append(row)
    return [merged(start, found) for start, found in buckets.items()]


def merged(start: datetime, rows: list[pb.Bar]) -> pb.Bar:
    def value(row: pb.Bar, name: Any) -> Any:
        return getattr(row, name) if row.HasField(name) else None

    def price(row: pb.Bar, name: str) -> float:
        known = value(row, name)
        return row.close if known is None else float(known)

    volumes = [row.volume for row in rows if row.HasField("volume")]
    traded = [row for row in rows if row.HasField("volume") and row.HasField("vwap")]
    weight = sum(row.volume for row in traded)
    made = pb.Bar(
        symbol=rows[0].symbol,
        open=price(rows[0], "open"),
        high=max(price(row, "high") for row in rows),
        low=min(price(row, "low") for row in rows),
        close=rows[-1].close,
        volume=sum(volumes) if volumes else None,
        vwap=sum(r.vwap * r.volume for r in traded) / weight if weight else None,
        **{name: value(rows[-1], name) for name in ("bid", "ask")},
        **{name: value(rows[-1], name) for name in ("bid_size", "ask_size")},
    )
    made.time.FromDatetime(start)
    return made


def assert_equal(got: list[pb.Bar], expected: list[pb.Bar]) -> None:
    """A vwap is a sum of products, whose last bits depend on the order of the rows."""
    for one, other in zip(got, expected, strict=True):
        assert one.HasField("vwap") == other.HasField("vwap")
        if other.HasField("vwap"):
            assert one.vwap == pytest.approx(other.vwap, rel=1e-12, abs=0)
            one.vwap = other.vwap
        assert one == other


prices = st.integers(-50, 50).map(lambda n: n / 8)
volumes = st.integers(0, 1_000)
optional = {
    "open": prices, "high": prices, "low": prices, "bid": prices, "ask": prices,
    "vwap": st.floats(1, 100), "volume": volumes, "bid_size": volumes,
    "ask_size": volumes,
}  # fmt: skip
values = st.fixed_dictionaries({"close": prices}, optional=optional)
# Few different minutes, so that days have several rows and rows are replaced.
minutes = st.builds(
    lambda day, minute: day * DAY_MINUTES + minute,
    st.integers(0, 9),
    st.sampled_from([0, 1, 700, 1_439]),
)
symbols = st.sampled_from("AB")
stored = st.dictionaries(st.tuples(symbols, minutes), values, min_size=1, max_size=30)
read = st.tuples(symbols, minutes, minutes, st.integers(1, 7), st.integers(1, 9))
steps = st.lists(
    stored | read | st.sampled_from(["aggregate", "compress"]), min_size=4, max_size=10
)
examples = count()


@both_editions
@given(stored, steps)
@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # to shrink would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_bars_of_whole_days_are_those_of_plain_python_whatever_came_when(
    lone_client: Client, db: Database, first: Any, steps: list[Any]
):
    run = next(examples)  # one database for all, so each has its own symbols
    rows: Rows = {}
    partial, whole = (1, 9 * DAY_MINUTES + 700), (0, 10 * DAY_MINUTES)
    reads = [("A", *partial, 1, 5), ("A", *whole, 7, 5)]
    for step in [first, *steps, *reads, "aggregate", *reads]:
        match step:
            case dict():
                await put(lone_client, rows, step, run)
            case "aggregate":
                await aggregate_days(db)
                assert not await pending(db)
            case "compress":
                await compress(db)
            case symbol, one, other, width, page_size:
                span = min(one, other), max(one, other)
                await check(lone_client, rows, f"{symbol}{run}", span, width, page_size)


async def put(client: Client, rows: Rows, step: Any, run: int) -> None:
    new = {
        (f"{symbol}{run}", minute): bar(f"{symbol}{run}", minute, **fields)
        for (symbol, minute), fields in step.items()
    }
    await store(client, list(new.values()))
    rows.update(new)


async def compress(db: Database) -> None:
    if db.edition is Edition.COMMUNITY:
        async with db.connection() as conn:
            await conn.execute(
                "SELECT compress_chunk(c) FROM show_chunks('market_data') AS c"
            )


async def check(
    client: Client, rows: Rows, symbol: str, span: tuple[int, int], width: int,
    page_size: int,
) -> None:  # fmt: skip
    if not any(name == symbol for name, _ in rows):
        return  # unknown
    expected = bars_of(rows, symbol, *span, width)
    start, end = (bar(symbol, minute).time for minute in span)
    interval = {"seconds": width * 86_400}
    wanted = {"start_time": start, "end_time": end, "interval": interval}
    assert_equal(await listed(client, symbol, page_size=page_size, **wanted), expected)
    assert_equal(await columns(client, symbol, **wanted), expected)


async def columns(client: Client, symbol: str, **wanted: Any) -> list[pb.Bar]:
    """Return the bars that StreamBars sends."""
    chunks = await streamed(client, symbols=[symbol], **wanted)
    return [one for chunk in chunks for one in unpacked(chunk)]


async def test_responses_say_what_their_bars_were_computed_from(
    lone_client: Client,
):
    await store(lone_client, [bar("A", 0)])
    for seconds, source in {
        86_400: pb.BAR_SOURCE_DAILY,
        7 * 86_400: pb.BAR_SOURCE_DAILY,
        86_401: pb.BAR_SOURCE_ROWS,
        None: pb.BAR_SOURCE_ROWS,
    }.items():
        interval = {"seconds": seconds} if seconds else None
        request = pb.ListBarsRequest(symbol="A", interval=interval)
        assert (await lone_client.market_data.ListBars(request)).source == source
        stream = pb.StreamBarsRequest(symbols=["A"], interval=interval)
        responses = [r async for r in lone_client.market_data.StreamBars(stream)]
        assert [r.source for r in responses if kind(r) == "data"] == [source]


@pytest.mark.parametrize("minutes", [60, DAY_MINUTES])
async def test_a_page_begins_with_a_whole_bar_whatever_came_since_the_last(
    lone_client: Client, db: Database, minutes: int
):
    await write(db, bar("A", 5), bar("A", minutes + 5))
    interval = {"seconds": minutes * 60}
    request = pb.ListBarsRequest(symbol="A", interval=interval, page_size=1)
    first = await lone_client.market_data.ListBars(request)
    await write(db, bar("A", minutes, 3.0))
    request.page_token = first.next_page_token
    second = await lone_client.market_data.ListBars(request)
    assert [one.open for one in second.bars] == [3.0]


@both_editions
async def test_a_volume_beyond_its_field_is_refused(lone_client: Client, db: Database):
    await write(db, *(bar("A", minute, volume=1 << 62) for minute in (0, 1)))
    await aggregate_days(db)
    for seconds in 3_600, 86_400:
        for read in listed, columns:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read(lone_client, "A", interval={"seconds": seconds})
            assert violations_of(raised.value)[0][0] == "interval"


# --- Retention ----------------------------------------------------------------------

CUT = START + 10 * DAY  # where a chunk of TimescaleDB ends, too


async def drop_rows(db: Database) -> None:
    """Remove rows as retention does."""
    async with db.connection() as conn:
        if db.edition is Edition.PLAIN:
            await conn.execute("DELETE FROM market_data WHERE time < $1", CUT)
        else:
            await conn.execute(
                "SELECT drop_chunks('market_data', $1::timestamptz)", CUT
            )


@both_editions
async def test_daily_bars_outlive_their_rows(lone_client: Client, db: Database):
    days = range(0, 20, 3)
    await write(db, *(bar("A", day * DAY_MINUTES, day) for day in days))
    await aggregate_days(db)
    await drop_rows(db)
    assert [one.close for one in await listed(lone_client, "A")] == [12, 15, 18]
    expected = [day_bar("A", day, day) for day in days]
    assert await columns(lone_client, "A", interval={"seconds": 86_400}) == expected
    for page_size in (1_000, 2):
        assert await daily(lone_client, "A", page_size=page_size) == expected


@both_editions
async def test_a_symbol_of_which_only_daily_bars_are_left_is_known(
    lone_client: Client, db: Database
):
    await write(db, bar("A", 0, 7.0))
    await aggregate_days(db)
    await drop_rows(db)
    assert await daily(lone_client, "A") == [day_bar("A", 0, 7.0)]
    assert await listed(lone_client, "A") == []


@both_editions
async def test_rows_that_come_after_retention_cost_no_daily_bar(
    lone_client: Client, db: Database
):
    await write(db, bar("A", 0, 1.0), bar("B", 0, 1.0))
    await aggregate_days(db)
    await drop_rows(db)
    await write(db, bar("A", 5, 9.0))
    await aggregate_days(db, since=CUT)
    assert await daily(lone_client, "B") == [day_bar("B", 0, 1.0)]
    assert await daily(lone_client, "A") == [day_bar("A", 0, 9.0)]
    await drop_rows(db)
    await aggregate_days(db, since=CUT)
    assert await daily(lone_client, "A") == [day_bar("A", 0, 1.0)]


# --- Plans --------------------------------------------------------------------------

Node = dict[str, Any]


class Explained:
    """A connection that explains what it is asked instead of answering."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.nodes: list[Node] = []  # that were executed

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {query}"
        (plan,) = json.loads(await self._conn.fetchval(explain, *args))
        self.nodes += executed(plan["Plan"])
        return []


def executed(node: Node) -> Iterator[Node]:
    if node["Actual Loops"]:
        yield node
        for child in node.get("Plans", []):
            yield from executed(child)


async def explained(db: Database, wanted: BarRange) -> list[Node]:
    async with db.connection() as conn:
        explained = Explained(conn)
        await queries.bars(explained, wanted, 1_000)
        return explained.nodes


async def fill(db: Database) -> None:
    """Store six weeks of half-hourly rows of 30 symbols."""
    async with db.connection() as conn:
        await conn.execute(
            """
            INSERT INTO market_data (time, symbol, close)
            SELECT time, 'S' || number, 1
              FROM generate_series($1::timestamptz, $1 + INTERVAL '42 days',
                                   '30 minutes') AS time,
                   generate_series(1, 30) AS number
            """,
            START,
        )
        await conn.execute(
            """
            INSERT INTO pending_days (symbol, day)
            SELECT DISTINCT symbol, time_bucket('1 day', time) FROM market_data
            """
        )
        await conn.execute("VACUUM ANALYZE market_data")


async def chunks(db: Database, start: datetime, end: datetime) -> set[str]:
    """Return the tables that hold the rows of a range of time."""
    async with db.connection() as conn:
        if db.edition is Edition.PLAIN:
            return {"market_data"}
        rows = await conn.fetch(
            """
            SELECT chunk_name FROM timescaledb_information.chunks
             WHERE hypertable_name = 'market_data'
               AND range_start < $2 AND range_end > $1
            """,
            start,
            end,
        )
    return {row["chunk_name"] for row in rows}


@both_editions
async def test_history_is_read_by_index_and_from_the_chunks_of_its_range(db: Database):
    await fill(db)
    start, end = START + 15 * DAY, START + 20 * DAY
    nodes = await explained(db, BarRange("S1", start, end, None))
    tables = {node["Relation Name"] for node in nodes if "Relation Name" in node}
    assert tables == await chunks(db, start, end)
    for node in nodes:
        assert node["Node Type"] != "Seq Scan"
        assert "market_data_symbol" in node.get("Index Name", "market_data_symbol")


@both_editions
async def test_bars_of_aggregated_days_read_no_rows(db: Database):
    await fill(db)
    await aggregate_days(db)
    start, end = START + DAY, START + 30 * DAY
    nodes = await explained(db, BarRange("S1", start, end, DAY))
    tables = await chunks(db, start, end)
    touched = [node for node in nodes if node.get("Relation Name") in tables]
    if db.edition is not Edition.PLAIN:  # plain has but one table to look into
        assert not touched
    for node in touched:
        assert node["Actual Rows"] == node.get("Rows Removed by Filter", 0) == 0
