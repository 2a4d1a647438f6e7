"""The stamps of quotes over the wire: who has them, who has not, and which."""

from typing import Any

import grpc
import pytest
import redis.asyncio as redis
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.bus import STAMP, START, Bus, shard_of
from quantplane_server.fanout import framed
from quantplane_server.stamps import stamped
from tests.market_data import quote, quotes, until
from tests.market_data.test_publish import accepted, opened, refused
from tests.market_data.test_stream import publish, stream, subscribe

LOSSLESS = pb.DELIVERY_LOSSLESS
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ONE, OTHER = [f"S{i}" for i in range(99) if shard_of(f"S{i}".encode()) == 0][:2]


def batch(number: int, *quotes: pb.Quote, **fields: Any) -> pb.PublishQuotesRequest:
    return pb.PublishQuotesRequest(batch=number, quotes=quotes, **fields)


async def until_quote(responses: Any, number: int) -> Any:
    """Return the response with this quote."""
    while True:
        response = await until(responses, "data")
        if any(int(each.bid) == number for each in response.quotes):
            return response


@pytest.mark.parametrize("delivery", [pb.DELIVERY_LATEST, LOSSLESS])
@pytest.mark.parametrize("method", ["SubscribeQuotes", "StreamQuotes"])
async def test_live_quotes_tell_when_they_passed_each_station(
    client: Client, method: str, delivery: pb.Delivery.ValueType
):
    if method == "StreamQuotes":
        responses = (await stream(client, "A", delivery=delivery)).responses
    else:
        responses = subscribe(client, "A", delivery=delivery)
    await until(responses, "snapshot_complete")
    began, ended = Timestamp(), Timestamp()
    began.GetCurrentTime()
    await publish(client, [quote("A", 1)])
    stamps = (await until(responses, "data")).stamps
    ended.GetCurrentTime()
    way = [began, stamps.publish_time, stamps.accept_time, stamps.send_time, ended]
    assert [t.ToNanoseconds() for t in way] == sorted(t.ToNanoseconds() for t in way)
    assert not stamps.traceparent


async def test_a_snapshot_and_events_have_no_stamps(client: Client):
    await publish(client, [quote("A", 1)])
    responses = subscribe(client, "A")
    for _ in range(3):
        assert not (await anext(responses)).HasField("stamps")


async def test_history_has_no_stamps_and_what_follows_it_has(client: Client):
    await publish(client, [quote("A", 1)])
    start = quote("A", 0).time
    responses = subscribe(client, "A", delivery=LOSSLESS, start_time=start)
    assert not (await until_quote(responses, 1)).HasField("stamps")
    await publish(client, [quote("A", 2)])
    assert (await until_quote(responses, 2)).HasField("stamps")


async def test_who_comes_back_sees_when_the_bus_got_what_was_missed(client: Client):
    responses = subscribe(client, "A", delivery=LOSSLESS)
    token = (await until(responses, "snapshot_complete")).resume_token
    await publish(client, [quote("A", 1)])
    live = (await until_quote(responses, 1)).stamps
    again = subscribe(client, "A", delivery=LOSSLESS, resume_token=token)
    late = (await until_quote(again, 1)).stamps
    assert late.publish_time == live.publish_time
    assert late.accept_time == live.accept_time
    assert late.send_time.ToNanoseconds() > live.send_time.ToNanoseconds()


async def test_a_response_tells_the_times_of_the_newest_of_its_quotes(client: Client):
    sender = await stream(client, "A", delivery=LOSSLESS, max_unacknowledged=2)
    await until(sender.responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    for second in (1, 2, 3):
        time = Timestamp(seconds=second)
        await feed.send(batch(second, quote("A", second), publish_time=time))
        await accepted(feed, second)
    await sender.send(pb.StreamQuotesRequest(acknowledge=2))
    response = await until_quote(sender.responses, 3)
    assert response.stamps.publish_time.seconds == 3


async def test_a_conflated_response_tells_the_times_of_the_newest(client: Client):
    interval = {"nanos": 200_000_000}
    responses = subscribe(client, "A", min_interval=interval)
    await until(responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    for second in range(1, 20):
        time = Timestamp(seconds=second)
        await feed.send(batch(second, quote("A", second), publish_time=time))
    response = await until_quote(responses, 19)
    assert response.stamps.publish_time.seconds == 19


async def test_a_feed_that_tells_no_time_leaves_the_others(client: Client):
    responses = subscribe(client, "A")
    await until(responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    await feed.send(batch(1, quote("A", 1)))
    stamps = (await until_quote(responses, 1)).stamps
    assert not stamps.HasField("publish_time")
    assert stamps.HasField("accept_time") and stamps.HasField("send_time")


async def test_a_clock_that_is_wrong_by_decades_is_no_reason_to_refuse(client: Client):
    responses = subscribe(client, "A")
    await until(responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    wrong = Timestamp(seconds=-3, nanos=5)
    await feed.send(batch(1, quote("A", 1), publish_time=wrong))
    assert (await until_quote(responses, 1)).stamps.publish_time == wrong


@pytest.mark.parametrize(
    "time", [{"nanos": -1}, {"nanos": 10**9}, {"seconds": 10**12}], ids=str
)
async def test_what_is_no_time_is_refused(client: Client, time: dict[str, int]):
    feed, _ = await opened(client, "f")
    await feed.send(batch(1, quote("A", 1), publish_time=Timestamp(**time)))
    code, reason, violations = await refused(feed)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert [field for field, _ in violations] == ["publish_time"]


async def test_the_trace_of_a_sampled_batch_reaches_its_readers_and_no_further(
    client: Client,
):
    responses = subscribe(client, "A", delivery=LOSSLESS)
    await until(responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    await feed.send(batch(1, quote("A", 1), traceparent=TRACE))
    assert (await until_quote(responses, 1)).stamps.traceparent == TRACE
    await feed.send(batch(2, quote("A", 2)))
    assert not (await until_quote(responses, 2)).stamps.traceparent


async def test_a_trace_that_is_none_is_left_out(client: Client):
    responses = subscribe(client, "A")
    await until(responses, "snapshot_complete")
    feed, _ = await opened(client, "f")
    await feed.send(batch(1, quote("A", 1), traceparent="not a trace"))
    assert not (await until_quote(responses, 1)).stamps.traceparent


async def test_quotes_that_a_change_of_symbols_brings_up_to_date_have_stamps(
    client: Client, redis_url: str
):
    sender = await stream(client, ONE, delivery=LOSSLESS)
    await until(sender.responses, "snapshot_complete")
    async with redis.Redis.from_url(redis_url) as valkey:
        for each in await valkey.client_list():
            if each["cmd"] == "xread":  # who follows the bus needs a while to come back
                await valkey.client_kill_filter(_id=each["id"])
        await append(valkey, quote(ONE, 1), stamped(None, ""))
    await sender.send(pb.StreamQuotesRequest(add_symbols=[OTHER]))
    assert (await until_quote(sender.responses, 1)).HasField("stamps")


async def test_an_entry_holds_its_stamp_beside_its_quotes(
    client: Client, redis_url: str
):
    await publish(client, [quote("A", 1)])
    bus = Bus(redis_url, cap_bytes=1)
    (entry,) = await bus.read(shard_of(b"A"), START)
    await bus.close()
    assert set(entry.parts) == {b"A"}
    assert entry.stamp


async def test_a_stamp_is_no_ones_latest_quote(client: Client, redis_url: str):
    await publish(client, quotes("A", range(3)))
    async with redis.Redis.from_url(redis_url) as valkey:
        latest = await valkey.hkeys(f"quantplane:{{q{shard_of(b'A')}}}:latest")
    assert latest == [b"A"]


async def test_entries_of_a_server_that_stamps_nothing_are_read_without(
    client: Client, redis_url: str
):
    responses = subscribe(client, "A", delivery=LOSSLESS)
    await until(responses, "snapshot_complete")
    async with redis.Redis.from_url(redis_url) as valkey:
        await append(valkey, quote("A", 1))
    response = await until_quote(responses, 1)
    assert list(response.quotes) == [quote("A", 1)]
    assert not response.HasField("stamps")


async def append(valkey: Any, made: pb.Quote, *stamp: bytes) -> None:
    """Put a quote on the bus, as a server does; without a stamp, as older ones did."""
    symbol = made.symbol.encode()
    shard = f"quantplane:{{q{shard_of(symbol)}}}:"
    keys = [shard + name for name in ("meta", "stream", "latest", "feed:own")]
    library = Bus("unix:///", cap_bytes=1).library
    opened = await valkey.fcall(f"{library}_open_feed", 2, keys[0], keys[3], "0-0")
    session = opened[0]
    fields = [symbol, b"", framed(made.SerializeToString())]
    for each in stamp:
        fields += [STAMP, b"", each]
    terms = (1, 0, 1 << 20)
    await valkey.fcall(
        *(f"{library}_append", 4, *keys, *terms),
        *(session, 1, len(fields) // 3, *fields),
    )
