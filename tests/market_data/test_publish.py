"""PublishQuotes over the wire: accepted once, refused whole, held back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
import redis.asyncio as redis

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server.bus import Bus, shard_of
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.main import serving
from quantplane_server.market_data.durability import Durability
from quantplane_server.market_data.feed import Feed
from tests.conftest import Server
from tests.market_data import Sender, numbers, quote, quotes, read, until

Refused = tuple[grpc.StatusCode, str, list[tuple[str, str]]]


async def opened(client: Client, feed: str) -> tuple[Sender, pb.PublishQuotesResponse]:
    sender = Sender(client.market_data.PublishQuotes())
    await sender.send(pb.PublishQuotesRequest(feed=feed))
    return sender, await sender.next()


def batch(number: int, *quotes: pb.Quote) -> pb.PublishQuotesRequest:
    return pb.PublishQuotesRequest(batch=number, quotes=quotes)


async def accepted(sender: Sender, number: int) -> pb.PublishQuotesResponse:
    return await reached(sender, lambda r: r.accepted_through >= number)


async def reached(sender: Sender, condition: Any) -> pb.PublishQuotesResponse:
    async for response in sender.responses:
        if condition(response):
            return response
    raise AssertionError("the stream ended first")


async def refused(sender: Sender) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in sender.responses:
            pass
    error = raised.value
    return error.code(), reason_of(error), violations_of(error)


async def lossless(client: Client, *symbols: str) -> Any:
    request = pb.SubscribeQuotesRequest(symbols=symbols, delivery=pb.DELIVERY_LOSSLESS)
    responses = aiter(client.market_data.SubscribeQuotes(request))
    await until(responses, "snapshot_complete")
    return responses


async def rows(dsn: str) -> list[tuple[str, float]]:
    conn = await asyncpg.connect(dsn)
    try:
        found = await conn.fetch(
            "SELECT symbol, bid FROM market_data ORDER BY symbol, time"
        )
    finally:
        await conn.close()
    return [(row["symbol"], row["bid"]) for row in found]


async def test_a_new_feed_begins_at_one_and_goes_on_where_it_was(client: Client):
    sender, first = await opened(client, "f")
    assert (first.accepted_through, first.next_batch) == (0, 1)
    await sender.send(batch(1, quote("A", 1)), batch(2, quote("B", 2)))
    await accepted(sender, 2)
    sender.call.cancel()
    _, again = await opened(client, "f")
    assert again.next_batch == 3
    assert again.accepted_through <= 2


async def test_batches_sent_again_are_neither_lost_nor_doubled(
    client: Client, dsn: str
):
    responses = await lossless(client, "A", "B")
    sender, _ = await opened(client, "f")
    sent = [batch(n, quote("A", n), quote("B", n)) for n in range(1, 6)]
    await sender.send(*sent[:3])
    await accepted(sender, 3)
    again, _ = await opened(client, "f")
    await again.send(*sent)  # from the first on, as after a cut with no answer
    await reached(again, lambda r: r.durable_through == 5)
    received = await read(responses, 10)
    for symbol in ("A", "B"):
        assert numbers(received, symbol) == [1, 2, 3, 4, 5]
    assert len(await rows(dsn)) == 10
    await again.send(batch(6, quote("A", 6)))
    assert numbers(await read(responses, 1), "A") == [6]  # and nothing before it


async def test_a_batch_that_only_some_shards_have_is_completed(
    client: Client, redis_url: str
):
    """As after a server that died between the shards of one batch."""
    one, other = (
        "A",
        next(s for s in "BCDEFG" if shard_of(s.encode()) != shard_of(b"A")),
    )
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote(one, 1), quote(other, 1)))
    await accepted(sender, 1)
    sender.call.cancel()
    async with redis.Redis.from_url(redis_url) as valkey:  # the other never had it
        for symbol, state in ((one, {}), (other, {"last": 0})):
            key = f"quantplane:{{q{shard_of(symbol.encode())}}}:feed:f"
            await valkey.hset(key, mapping={"through": 0} | state)
    responses = await lossless(client, one, other)
    again, told = await opened(client, "f")
    assert told.accepted_through == 0
    await again.send(batch(1, quote(one, 1), quote(other, 1)))
    await accepted(again, 1)
    await again.send(batch(2, quote(one, 2), quote(other, 2)))
    received = await read(responses, 3)
    assert numbers(received, one) == [2]
    assert numbers(received, other) == [1, 2]


async def test_a_feed_that_comes_back_is_told_what_is_durable(client: Client):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote("A", 1)), batch(2, quote("B", 2)))
    await reached(sender, lambda r: r.durable_through == 2)
    sender.call.cancel()
    _, again = await opened(client, "f")
    assert (again.accepted_through, again.durable_through) == (2, 2)


async def test_a_publisher_that_sends_nothing_waits_for_nothing(
    client: Client, redis_url: str
):
    """Also where its predecessor died in the middle of a batch."""
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote("A", 1)))
    await accepted(sender, 1)
    sender.call.cancel()
    async with redis.Redis.from_url(redis_url) as valkey:
        key = f"quantplane:{{q{shard_of(b'A')}}}:feed:f"
        await valkey.hset(key, "through", 0)
    async with client.publish_quotes(feed="f") as publisher:
        await publisher.flush()
        await publisher.durable()


async def test_the_newest_connection_keeps_the_feed(client: Client):
    old, _ = await opened(client, "f")
    new, _ = await opened(client, "f")
    await old.send(batch(1, quote("A", 1)))
    assert (await refused(old))[:2] == (grpc.StatusCode.ABORTED, "FEED_REPLACED")
    await new.send(batch(1, quote("A", 1)))
    await accepted(new, 1)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([2, 4], "3"),
        ([3, 3], "4"),
        ([0], "1"),
    ],
    ids=["a hole", "a repetition", "zero"],
)
async def test_batches_out_of_order_are_refused(
    client: Client, requests: list[int], expected: str
):
    sender, _ = await opened(client, "f")
    for number in requests:
        await sender.send(batch(number, quote("A", 1)))
    code, reason, _ = await refused(sender)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "OUT_OF_ORDER")


NAN, INF = float("nan"), float("inf")


def timed(**fields: Any) -> pb.Quote:
    made = quote("A", 1)
    made.time.CopyFrom(pb.Quote(time=fields).time)
    return made


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (quote("", 1), "symbol"),
        (quote(" A", 1), "symbol"),
        (quote("A\n", 1), "symbol"),
        (quote("A\0", 1), "symbol"),
        (quote("A" * 65, 1), "symbol"),
        (quote("A", 1, bid=NAN), "bid"),
        (quote("A", 1, ask=INF), "ask"),
        (quote("A", 1, last=-INF), "last"),
        (quote("A", 1, bid=0.0, ask=NAN), "ask"),
        (quote("A", 1, bid_size=-1), "bid_size"),
        (quote("A", 1, volume=-1), "volume"),
        (pb.Quote(symbol="A", bid=1.0), "time"),
        (timed(seconds=1 << 40), "time"),
        (timed(seconds=-(1 << 40)), "time"),
        (timed(seconds=1_700_000_000, nanos=-1), "time"),
        (pb.Quote(symbol="A", time=quote("A", 1).time), ""),
    ],
    ids=lambda value: "" if isinstance(value, pb.Quote) else value,
)
async def test_a_bad_quote_refuses_its_batch_and_changes_nothing(
    client: Client, dsn: str, bad: pb.Quote, field: str
):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote("A", 1)), batch(2, quote("A", 2), bad))
    code, reason, violations = await refused(sender)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert violations[0][0] == f"quotes[1].{field}".rstrip(".")
    again, told = await opened(client, "f")
    assert told.next_batch == 2
    await again.send(batch(2, quote("A", 3)))
    await reached(again, lambda r: r.durable_through == 2)
    assert await rows(dsn) == [("A", 1.0), ("A", 3.0)]


async def test_all_violations_of_a_batch_are_told_at_once(client: Client):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote("", 1, bid=NAN), quote("A", 1, ask=INF)))
    _, _, violations = await refused(sender)
    assert [field for field, _ in violations] == [
        "quotes[0].symbol",
        "quotes[0].bid",
        "quotes[1].ask",
    ]


@pytest.mark.parametrize("count", [0, 2_001])
async def test_a_batch_of_a_wrong_size_is_refused(client: Client, count: int):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, *quotes("A", range(count))))
    _, reason, violations = await refused(sender)
    assert (reason, violations[0][0]) == ("INVALID_FIELD", "quotes")


async def test_a_message_over_the_size_limit_is_refused(client: Client):
    sender, _ = await opened(client, "f")
    many = [quote(f"{n:064d}", n) for n in range(60_000)]
    await sender.send(batch(1, *many))
    code, _, _ = await refused(sender)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("name", ["", " f", "f" * 65, "f\n"])
async def test_a_feed_needs_a_name(client: Client, name: str):
    sender = Sender(client.market_data.PublishQuotes())
    await sender.send(pb.PublishQuotesRequest(feed=name))
    _, reason, violations = await refused(sender)
    assert (reason, violations[0][0]) == ("INVALID_FIELD", "feed")


@pytest.mark.parametrize(
    "legal",
    [
        quote("A", 1, bid=-5.0, ask=-4.0),
        quote("A", 1, bid=3.0, ask=2.0),
        quote("A", 1, bid=0.0, ask=0.0),
        quote("A", 1, bid=1e308, ask=1.7e308),
        quote("A", 1, bid=5e-324, ask=5e-324),
        pb.Quote(symbol="A", time=quote("A", 1).time, ask=2.0),
        pb.Quote(symbol="A", time=quote("A", 1).time, last=2.0, volume=2**63 - 1),
        quote("TSLA  221028C00100000", 1),
        quote("日経225", 1),
    ],
    ids=[
        "negative",
        "crossed",
        "zero",
        "huge",
        "tiny",
        "one side",
        "trade",
        "OCC",
        "日",
    ],
)
async def test_odd_but_legal_quotes_are_recorded(
    client: Client, dsn: str, legal: pb.Quote
):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, legal))
    await reached(sender, lambda r: r.durable_through == 1)
    request = pb.SubscribeQuotesRequest(
        symbols=[legal.symbol], start_time={"seconds": 1}
    )
    history = aiter(client.market_data.SubscribeQuotes(request))
    (back,) = await read(history, 1)
    if legal.HasField("last"):
        legal.volume = legal.volume
    assert back == legal


async def test_a_feed_is_held_back_while_the_bus_is_full_and_told_why(
    server: Server, settings: Any, dsn: str
):
    """Nothing records here, so that the bus fills."""
    small = settings.model_copy(update={"cap_mb": 1})  # 256 KiB per shard
    async with serving(small) as target, Client(target) as client:
        responses = await lossless(client, "A")
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool:
            async with pool.acquire() as conn, conn.transaction():
                sender, _ = await opened(client, "f")
                await conn.execute("LOCK TABLE bus_positions")  # the recorder waits
                sent = 100
                for n in range(sent):
                    many = quotes("A", range(n * 100, n * 100 + 100))
                    await sender.send(batch(n + 1, *many))
                held = await reached(sender, lambda r: r.hold)
                assert held.hold == pb.HOLD_REASON_BUS_FULL
                assert held.accepted_through < sent
        freed = await reached(sender, lambda r: r.durable_through == sent)
        assert not freed.hold
        assert numbers(await read(responses, 10_000), "A") == list(range(10_000))


async def test_draining_ends_a_feed_after_what_it_sent_is_accepted(
    server: Server, client: Client
):
    async with serving(server.settings) as target:
        leaving = Client(target)
        sender, _ = await opened(leaving, "f")
        await sender.send(batch(1, quote("A", 1)))
        await accepted(sender, 1)
        end = asyncio.ensure_future(refused(sender))
    assert (await end)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await leaving.close()


async def test_of_quotes_with_one_stamp_all_are_streamed_and_the_last_is_kept(
    client: Client, dsn: str
):
    responses = await lossless(client, "A")
    twins = [quote("A", 1, bid=1.0), quote("A", 1, bid=2.0)]
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, *twins))
    await reached(sender, lambda r: r.durable_through == 1)
    assert (await read(responses, 2)) == twins
    assert await rows(dsn) == [("A", 2.0)]


async def test_latest_quotes_come_from_the_bus_and_else_from_the_database(
    client: Client, redis_url: str
):
    sender, _ = await opened(client, "f")
    await sender.send(batch(1, quote("A", 1), quote("A", 2), quote("B", 1)))
    await reached(sender, lambda r: r.durable_through == 1)
    request = pb.GetLatestQuotesRequest(symbols=["B", "NONE", "A"])
    for _ in range(2):
        response = await client.market_data.GetLatestQuotes(request)
        assert list(response.quotes) == [quote("B", 1), quote("A", 2)]
        assert list(response.unknown_symbols) == ["NONE"]
        async with redis.Redis.from_url(redis_url) as valkey:
            await valkey.flushall()


@pytest.mark.parametrize(
    "symbols",
    [[], [""], ["A" * 10_000], ["A"] * 10_001],
    ids=["0", "empty", "long", "10,001"],
)
async def test_bad_symbols_are_refused_wherever_they_are_asked_for(
    client: Client, symbols: list[str]
):
    calls = [
        client.market_data.GetLatestQuotes(pb.GetLatestQuotesRequest(symbols=symbols)),
        anext(aiter(client.market_data.SubscribeQuotes(
            pb.SubscribeQuotesRequest(symbols=symbols)))),
        anext(aiter(client.market_data.StreamBars(
            pb.StreamBarsRequest(symbols=symbols)))),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert reason_of(raised.value) == "INVALID_FIELD"
        assert violations_of(raised.value)[0][0].startswith("symbols")


async def test_the_last_answer_says_that_all_is_accepted(settings: Settings):
    """Also where the end comes while an answer is on its way."""
    told = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PublishQuotesRequest]:
        yield pb.PublishQuotesRequest(feed="feed")
        yield batch(1, quote("A", 1))
        await told.wait()
        yield batch(2, quote("A", 2))

    postgres_dsn, redis_url = settings.backends()
    db = await Database.open(postgres_dsn, pool_size=1)
    bus = Bus(redis_url, 1 << 20)
    await bus.open()
    shard = shard_of(b"A")
    answers = Feed(bus, db, Durability(bus)).run(requests())
    try:
        while (await anext(answers)).accepted_through < 1:
            pass
        told.set()
        while (await bus.heads([shard]))[shard].number < 2:
            pass
        await bus.ping()  # by then the feed has its answer
        assert [answer.accepted_through async for answer in answers][-1] == 2
    finally:
        await bus.close()
        await db.close()
