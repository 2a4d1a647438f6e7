"""PublishBars, ListBars, StreamBars and ListSymbols, on both editions."""

import asyncio
import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.main import serving
from tests.conftest import both_editions
from tests.market_data import Sender, kind, quotes

START = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday
MINUTE = timedelta(minutes=1)


def bar(symbol: str, minute: float, close: float | None = 1.0, **fields: Any) -> pb.Bar:
    made = pb.Bar(symbol=symbol, close=close, **fields)
    made.time.FromDatetime(START + minute * MINUTE)
    return made


def full_bar(symbol: str, minute: int, rng: random.Random) -> pb.Bar:
    price = rng.uniform(-5, 5)
    return bar(
        symbol, minute, price, open=price - 1, high=price + 2, low=price - 2,
        volume=rng.randrange(1_000), vwap=price + 0.1, bid=price - 0.01,
        ask=price + 0.01, bid_size=rng.randrange(9), ask_size=0,
    )  # fmt: skip


async def store(client: Client, *batches: list[pb.Bar]) -> None:
    sender = Sender(client.market_data.PublishBars())
    for number, bars in enumerate(batches, 1):
        await sender.send(pb.PublishBarsRequest(batch=number, bars=bars))
        assert (await sender.next()).durable_through == number
    await sender.call.done_writing()


async def listed(client: Client, symbol: str, **fields: Any) -> list[pb.Bar]:
    request = pb.ListBarsRequest(symbol=symbol, **fields)
    bars: list[pb.Bar] = []
    while True:
        response = await client.market_data.ListBars(request)
        bars += response.bars
        if not response.next_page_token:
            return bars
        assert response.bars
        request.page_token = response.next_page_token


async def streamed(client: Client, **fields: Any) -> list[pb.BarColumns]:
    request = pb.StreamBarsRequest(**fields)
    chunks = []
    async for response in client.follow(client.market_data.StreamBars, request):
        if kind(response) == "data":
            chunks.append(response.columns)
    return chunks


def unpacked(columns: pb.BarColumns) -> list[pb.Bar]:
    """Return columns as bars, in plain Python."""
    bars = []
    for i, time_us in enumerate(columns.time_us):
        made = pb.Bar(symbol=columns.symbol)
        made.time.FromMicroseconds(time_us)
        for field in pb.BarColumns.DESCRIPTOR.fields[2:]:
            column = getattr(columns, field.name)
            value = column[i] if column else -1 if "int" in field.name else None
            if (
                value is not None
                and value == value
                and (
                    value != -1 or field.name not in ("volume", "bid_size", "ask_size")
                )
            ):
                setattr(made, field.name, value)
        bars.append(made)
    return bars


def resampled(bars: list[pb.Bar], seconds: int) -> list[pb.Bar]:
    """Aggregate full bars, independently of the database."""
    buckets: dict[int, list[pb.Bar]] = {}
    origin = int(datetime(2000, 1, 3, tzinfo=UTC).timestamp())
    for one in sorted(bars, key=lambda b: b.time.ToNanoseconds()):
        at = one.time.seconds
        buckets.setdefault(at - (at - origin) % seconds, []).append(one)
    made = []
    for start, rows in buckets.items():
        volume = sum(row.volume for row in rows)
        total = pb.Bar(
            symbol=rows[0].symbol, open=rows[0].open, close=rows[-1].close,
            high=max(row.high for row in rows), low=min(row.low for row in rows),
            volume=volume, bid=rows[-1].bid, ask=rows[-1].ask,
            bid_size=rows[-1].bid_size, ask_size=rows[-1].ask_size,
        )  # fmt: skip
        if volume:
            total.vwap = sum(row.vwap * row.volume for row in rows) / volume
        total.time.seconds = start
        made.append(total)
    return made


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(raised.value)


@both_editions
async def test_bars_come_back_as_they_were_by_pages_and_by_columns(client: Client):
    rng = random.Random(1)
    bars = [full_bar("A", minute, rng) for minute in range(500)]
    bars += [bar("A", 500), bar("A", 501, volume=0)]  # null is not 0
    await store(client, bars[:300], bars[300:])
    for page_size in (1_000, 7):
        assert await listed(client, "A", page_size=page_size) == bars
    chunks = await streamed(client, symbols=["A"])
    assert [bar for chunk in chunks for bar in unpacked(chunk)] == bars


@both_editions
@pytest.mark.parametrize("seconds", [60, 300, 3_600, 86_400, 7 * 86_400, 777])
async def test_intervals_equal_an_independent_aggregation(client: Client, seconds: int):
    rng = random.Random(seconds)
    minutes = sorted(rng.sample(range(20_000), 1_500))  # two weeks, with holes
    bars = [full_bar("A", minute, rng) for minute in minutes]
    await store(client, bars)
    expected = resampled(bars, seconds)
    for page_size in (1_000, 3):
        got = await listed(
            client, "A", page_size=page_size, interval={"seconds": seconds}
        )
        assert_equal_but_for_rounding(got, expected)
    chunks = await streamed(client, symbols=["A"], interval={"seconds": seconds})
    got = [bar for chunk in chunks for bar in unpacked(chunk)]
    assert_equal_but_for_rounding(got, expected)


def assert_equal_but_for_rounding(got: list[pb.Bar], expected: list[pb.Bar]) -> None:
    """A vwap is a sum of products, whose last bits depend on the order of the rows."""
    for one, other in zip(got, expected, strict=True):
        assert one.HasField("vwap") == other.HasField("vwap")
        assert one.vwap == pytest.approx(other.vwap, rel=1e-9, abs=1e-9)
        rounded = pb.Bar()
        rounded.CopyFrom(one)
        if one.HasField("vwap"):
            rounded.vwap = other.vwap
        assert rounded == other


@both_editions
async def test_a_bar_replaces_the_one_of_its_symbol_and_time(client: Client):
    rng = random.Random(2)
    await store(client, [full_bar("A", 0, rng), full_bar("B", 0, rng)])
    await store(client, [bar("A", 0, 7.0), bar("A", 1, 1.0), bar("A", 1, 2.0)])
    assert await listed(client, "A") == [bar("A", 0, 7.0), bar("A", 1, 2.0)]


async def test_a_range_includes_its_start_and_excludes_its_end(client: Client):
    bars = [bar("A", minute) for minute in range(10)]
    await store(client, bars)
    fields = {"start_time": bars[2].time, "end_time": bars[5].time}
    assert await listed(client, "A", **fields) == bars[2:5]
    chunks = await streamed(client, symbols=["A"], **fields)
    assert [b for chunk in chunks for b in unpacked(chunk)] == bars[2:5]
    assert (
        await listed(client, "A", start_time=bars[5].time, end_time=bars[5].time) == []
    )


async def test_pages_do_not_shift_when_rows_are_inserted(client: Client):
    await store(client, [bar("A", minute) for minute in range(0, 20, 2)])
    request = pb.ListBarsRequest(symbol="A", page_size=4)
    first = await client.market_data.ListBars(request)
    await store(client, [bar("A", 1), bar("A", 9)])
    request.page_token = first.next_page_token
    second = await client.market_data.ListBars(request)
    assert list(second.bars) == [bar("A", m) for m in (8, 9, 10, 12)]


async def test_a_page_token_of_another_query_is_refused(client: Client):
    await store(client, [bar(s, m) for s in ("A", "B") for m in range(9)])
    request = pb.ListBarsRequest(symbol="A", page_size=4)
    token = (await client.market_data.ListBars(request)).next_page_token
    refused = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")
    for other in (
        pb.ListBarsRequest(symbol="B", page_token=token),
        pb.ListBarsRequest(symbol="A", interval={"seconds": 60}, page_token=token),
        pb.ListBarsRequest(symbol="A", page_token=token[:-4]),
        pb.ListBarsRequest(symbol="A", page_token="nonsense"),
    ):
        assert await code_of(client.market_data.ListBars(other)) == refused
    symbols = pb.ListSymbolsRequest(page_token=token)
    assert await code_of(client.market_data.ListSymbols(symbols)) == refused


async def test_a_page_may_be_asked_for_in_another_size(client: Client):
    bars = [bar("A", minute) for minute in range(9)]
    await store(client, bars)
    first = pb.ListBarsRequest(symbol="A", page_size=4)
    token = (await client.market_data.ListBars(first)).next_page_token
    rest = pb.ListBarsRequest(symbol="A", page_size=100, page_token=token)
    assert list((await client.market_data.ListBars(rest)).bars) == bars[4:]


async def test_a_download_that_was_cut_resumes_behind_its_last_chunk(client: Client):
    total = 20_000  # more than one chunk
    for start in range(0, total, 2_000):
        await store(client, [bar("A", m) for m in range(start, start + 2_000)])
    await store(client, [bar("B", 0)])
    request = pb.StreamBarsRequest(symbols=["B", "A"])
    call = client.market_data.StreamBars(request)
    responses = aiter(call)
    assert kind(await anext(responses)) == "subscribed"
    first = await anext(responses)
    call.cancel()
    request.resume_token = first.resume_token
    rest = [r async for r in client.market_data.StreamBars(request)]
    times = list(first.columns.time_us)
    times += [t for r in rest if r.columns.symbol == "A" for t in r.columns.time_us]
    assert len(times) == len(set(times)) == total
    assert times == sorted(times)
    assert [r.columns.symbol for r in rest if kind(r) == "data"] == ["A", "B"]
    assert kind(rest[-1]) == "complete"


async def test_an_unknown_symbol_is_told(client: Client):
    expected = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SYMBOL")
    request = pb.ListBarsRequest(symbol="NONE")
    assert await code_of(client.market_data.ListBars(request)) == expected
    await store(client, [bar("A", 0)])
    stream = client.market_data.StreamBars(pb.StreamBarsRequest(symbols=["A", "NONE"]))
    assert await code_of(anext(aiter(stream))) == expected


@both_editions
async def test_symbols_are_listed_in_order_with_their_times(client: Client):
    await store(client, [bar(s, m) for s in ("C", "A", "B b", "Ä") for m in (3, 1, 2)])
    names: list[str] = []
    request = pb.ListSymbolsRequest(page_size=2)
    while True:
        response = await client.market_data.ListSymbols(request)
        for symbol in response.symbols:
            assert symbol.first_time == bar("A", 1).time
            assert symbol.last_time == bar("A", 3).time
        names += [symbol.symbol for symbol in response.symbols]
        if not response.next_page_token:
            break
        request.page_token = response.next_page_token
    assert sorted(names) == sorted({"C", "A", "B b", "Ä"})
    assert len(names) == 4


async def test_recorded_quotes_are_degenerate_bars(client: Client):
    async with client.publish_quotes() as publisher:
        trade = pb.Quote(
            symbol="A", last=2.0, bid=1.0, ask=4.0, time=quotes("A", [2])[0].time
        )
        await publisher.send([*quotes("A", [1]), trade])
        await publisher.durable()
    first, second = await listed(client, "A")
    assert (first.open, first.high, first.low, first.close) == (1.25,) * 4
    assert not first.HasField("volume")
    assert (second.close, second.volume, second.bid, second.ask) == (2.0, 0, 1.0, 4.0)


NAN = float("nan")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (bar("A", 0, None), "close"),
        (bar("A", 0, NAN), "close"),
        (bar("A", 0, high=float("inf")), "high"),
        (bar("A", 0, volume=-1), "volume"),
        (bar("", 0), "symbol"),
        (pb.Bar(symbol="A", close=1.0), "time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_bar_refuses_its_batch_and_keeps_those_before_it(
    client: Client, bad: pb.Bar, field: str
):
    sender = Sender(client.market_data.PublishBars())
    await sender.send(pb.PublishBarsRequest(batch=1, bars=[bar("A", 1)]))
    await sender.send(pb.PublishBarsRequest(batch=2, bars=[bar("A", 2), bad]))
    await sender.next()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await sender.next()
    assert reason_of(raised.value) == "INVALID_FIELD"
    assert violations_of(raised.value)[0][0] == f"bars[1].{field}"
    assert await listed(client, "A") == [bar("A", 1)]


async def test_a_server_that_stops_ends_a_publisher_between_two_batches(
    settings: Settings,
):
    patient = settings.model_copy(update={"grace_s": 60})
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        async with serving(patient) as target:
            client = await stack.enter_async_context(Client(target))
            sender = Sender(client.market_data.PublishBars())
            await sender.send(pb.PublishBarsRequest(batch=1, bars=[bar("A", 1)]))
            assert (await sender.next()).durable_through == 1
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await sender.next()
    assert reason_of(raised.value) == "DRAINING"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"symbol": ""}, "symbol"),
        ({"symbol": "A" * 10_000}, "symbol"),
        ({"page_size": -1}, "page_size"),
        ({"page_size": 10_001}, "page_size"),
        ({"interval": {"seconds": 0}}, "interval"),
        ({"interval": {"seconds": 1, "nanos": 1}}, "interval"),
        ({"interval": {"seconds": 8 * 86_400}}, "interval"),
        ({"start_time": {"seconds": 1 << 40}}, "start_time"),
        ({"start_time": {"seconds": 2}, "end_time": {"seconds": 1}}, "end_time"),
    ],
    ids=str,
)
async def test_a_bad_query_is_refused(client: Client, fields: Any, field: str):
    request = pb.ListBarsRequest(**({"symbol": "A"} | fields))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await client.market_data.ListBars(request)
    assert violations_of(raised.value)[0][0] == field
