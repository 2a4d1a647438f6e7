"""The stream contract of StreamQuotes and SubscribeQuotes, over the wire."""

import asyncio
import copy
from typing import Any

import grpc
import pytest

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane_server.bus import shard_of
from quantplane_server.main import serving
from tests.conftest import Server
from tests.market_data import Sender, kind, numbers, quote, quotes, read, until

LOSSLESS = pb.DELIVERY_LOSSLESS


def subscribe(client: Client, *symbols: str, **fields: Any) -> Any:
    request = pb.SubscribeQuotesRequest(symbols=symbols, **fields)
    return aiter(client.market_data.SubscribeQuotes(request))


async def stream(client: Client, *symbols: str, **fields: Any) -> Sender:
    sender = Sender(client.market_data.StreamQuotes())
    await sender.send(pb.StreamQuotesRequest(symbols=symbols, **fields))
    return sender


async def publish(client: Client, *batches: list[pb.Quote]) -> None:
    async with client.publish_quotes() as publisher:
        for batch in batches:
            await publisher.send(batch)
        await publisher.durable()


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    return raised.value.code(), reason_of(raised.value)


async def test_a_subscriber_gets_a_snapshot_then_updates(client: Client):
    await publish(client, quotes("A", range(1, 4)))
    responses = subscribe(client, "A", "B")
    subscribed = await anext(responses)
    assert {k.key: k.state for k in subscribed.event.subscribed.keys} == {
        "A": pb.KEY_STATE_ACTIVE,
        "B": pb.KEY_STATE_NO_DATA,
    }
    snapshot = await anext(responses)
    assert list(snapshot.quotes) == [quote("A", 3)]
    assert kind(await anext(responses)) == "snapshot_complete"
    await publish(client, [quote("B", 1), quote("A", 4)])
    received = await read(responses, 2)
    assert sorted(q.symbol for q in received) == ["A", "B"]


async def test_only_subscribed_symbols_are_delivered(client: Client):
    # All of one shard, so that they share entries of the bus.
    symbols = [f"S{i}" for i in range(200) if shard_of(f"S{i}".encode()) == 0][:4]
    responses = subscribe(client, *symbols[:2], delivery=LOSSLESS)
    await until(responses, "snapshot_complete")
    for n in range(1, 6):
        await publish(client, [quote(symbol, n) for symbol in symbols])
    received = await read(responses, 10)
    assert {q.symbol for q in received} == set(symbols[:2])
    assert numbers(received, symbols[0]) == [1, 2, 3, 4, 5]


async def test_nanoseconds_and_absent_fields_reach_the_reader_as_published(
    client: Client,
):
    made = pb.Quote(symbol="A", last=1.25, volume=0)
    made.time.FromNanoseconds(1_700_000_000_123_456_789)
    responses = subscribe(client, "A")
    await until(responses, "snapshot_complete")
    await publish(client, [made])
    assert (await read(responses, 1)) == [made]


async def test_a_resumed_reader_gets_exactly_what_it_missed(client: Client):
    responses = subscribe(client, "A", "B", delivery=LOSSLESS)
    await until(responses, "snapshot_complete")
    await publish(client, quotes("A", range(1, 11)) + quotes("B", range(1, 11)))
    first, token = [], b""
    while len(first) < 20:
        response = await until(responses, "data")
        first += response.quotes
        token = response.resume_token
    await publish(client, quotes("A", range(11, 21)))
    again = subscribe(client, "A", "B", delivery=LOSSLESS, resume_token=token)
    assert kind(await anext(again)) == "subscribed"
    assert numbers(await read(again, 10), "A") == list(range(11, 21))


async def test_a_token_outlives_the_server(client: Client, server: Server):
    responses = subscribe(client, "A", delivery=LOSSLESS)
    token = (await until(responses, "snapshot_complete")).resume_token
    await publish(client, quotes("A", range(1, 4)))
    async with serving(server.settings) as other, Client(other) as successor:
        again = subscribe(successor, "A", delivery=LOSSLESS, resume_token=token)
        assert numbers(await read(again, 3), "A") == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"symbols": ["A", "B"]},
        {"delivery": pb.DELIVERY_LATEST},
        {"resume_token": b"nonsense"},
        {"resume_token": b""} | {"start_time": quote("A", 1).time},
    ],
    ids=["other symbols", "other delivery", "no token at all", "other start"],
)
async def test_a_token_of_another_request_is_refused(client: Client, change: Any):
    request = pb.SubscribeQuotesRequest(symbols=["A"], delivery=LOSSLESS)
    responses = aiter(client.market_data.SubscribeQuotes(request))
    request.resume_token = (await until(responses, "snapshot_complete")).resume_token
    token = request.resume_token
    for field, value in change.items():
        request.ClearField(field)
        request.MergeFrom(pb.SubscribeQuotesRequest(**{field: value}))
    request.resume_token = request.resume_token or token
    assert await code_of(client.market_data.SubscribeQuotes(request)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_RESUME_TOKEN",
    )


async def test_a_token_with_any_byte_changed_is_refused(client: Client):
    responses = subscribe(client, "A")
    token = (await until(responses, "snapshot_complete")).resume_token
    for i in range(len(token)):
        forged = bytearray(token)
        forged[i] ^= 1
        call = subscribe(client, "A", resume_token=bytes(forged))
        assert (await code_of(call))[1] == "INVALID_RESUME_TOKEN"


async def test_a_token_older_than_the_bus_is_compacted(client: Client, redis_url: str):
    responses = subscribe(client, "A", delivery=LOSSLESS)
    token = (await until(responses, "snapshot_complete")).resume_token
    await publish(client, *[quotes("A", [n]) for n in range(1, 6)])
    await trim(redis_url, "A")
    call = subscribe(client, "A", delivery=LOSSLESS, resume_token=token)
    assert await code_of(call) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")


async def trim(redis_url: str, symbol: str) -> None:
    """Drop all that is on the bus of a symbol's shard but the last entry."""
    import redis.asyncio as redis

    async with redis.Redis.from_url(redis_url) as valkey:
        key = f"quantplane:{{q{shard_of(symbol.encode())}}}:stream"
        await valkey.xtrim(key, maxlen=1, approximate=False)


async def test_a_lossless_reader_without_credit_gets_all_once_it_acknowledges(
    client: Client,
):
    sender = await stream(client, "A", delivery=LOSSLESS, max_unacknowledged=4)
    await until(sender.responses, "snapshot_complete")
    await publish(client, *[quotes("A", [n]) for n in range(1, 101)])
    received: list[pb.Quote] = []
    while len(received) < 100:
        response = await sender.next()
        received += response.quotes
        await sender.send(pb.StreamQuotesRequest(acknowledge=response.sequence))
    assert numbers(received, "A") == list(range(1, 101))


async def test_no_response_is_written_beyond_the_credit(client: Client):
    sender = await stream(client, "A", delivery=LOSSLESS, max_unacknowledged=3)
    first = [await sender.next() for _ in range(2)]
    assert [kind(r) for r in first] == ["subscribed", "snapshot_complete"]
    await publish(client, quotes("A", [1]))
    assert numbers((await sender.next()).quotes, "A") == [1]
    await publish(client, quotes("A", [2]))
    fourth = asyncio.ensure_future(sender.next())
    await publish(client, quotes("A", [3]))  # a round trip in which it could come
    assert not fourth.done()
    await sender.send(pb.StreamQuotesRequest(acknowledge=3))
    assert numbers((await fourth).quotes, "A") == [2, 3]


async def test_a_latest_reader_under_pressure_gets_the_last_and_an_honest_count(
    client: Client,
):
    sender = await stream(client, "A", "B", max_unacknowledged=2)
    await until(sender.responses, "snapshot_complete")
    total = 12_000
    for start in range(0, total, 1_000):  # far more than the server keeps pending
        await publish(client, quotes("A", range(start, start + 1_000)))
    await publish(client, quotes("B", [7]))
    received, conflated = [], 0
    await sender.send(pb.StreamQuotesRequest(acknowledge=2))
    while total + 1 > len(received) + conflated:
        response = await sender.next()
        received += response.quotes
        conflated += response.conflated_count
        await sender.send(pb.StreamQuotesRequest(acknowledge=response.sequence))
    assert len(received) + conflated == total + 1
    assert conflated > 0
    assert numbers(received, "A")[-1] == total - 1
    assert numbers(received, "A") == sorted(numbers(received, "A"))
    assert numbers(received, "B") == [7]


async def test_min_interval_conflates_and_keeps_the_last(client: Client):
    interval = {"nanos": 300_000_000}
    responses = subscribe(client, "A", min_interval=interval)
    await until(responses, "snapshot_complete")
    loop = asyncio.get_running_loop()
    await publish(client, quotes("A", [1]))
    await read(responses, 1)
    began = loop.time()
    await publish(client, *[quotes("A", [n]) for n in range(2, 50)])
    received, conflated = [], 0
    while not received or received[-1] != quote("A", 49):
        response = await until(responses, "data")
        received += response.quotes
        conflated += response.conflated_count
    assert len(received) + conflated == 48
    assert len(received) <= 1 + (loop.time() - began) / 0.3


async def test_heartbeats_come_at_their_interval_also_under_traffic(client: Client):
    responses = subscribe(
        client, "A", delivery=LOSSLESS, heartbeat_interval={"seconds": 1}
    )
    await until(responses, "snapshot_complete")
    done = asyncio.Event()

    async def traffic() -> None:
        async with client.publish_quotes() as publisher:
            n = 0
            while not done.is_set():
                n += 1
                await publisher.send(quotes("A", [n]))
                await publisher.flush()

    feed = asyncio.create_task(traffic())
    beats = [(await until(responses, "heartbeat")).event.heartbeat for _ in range(3)]
    done.set()
    await feed
    times = [beat.server_time.ToNanoseconds() / 1e9 for beat in beats]
    assert 0.8 < times[1] - times[0] < 1.6
    assert 0.8 < times[2] - times[1] < 1.6


async def test_a_heartbeat_of_a_quiet_symbol_moves_its_token_on(
    client: Client, redis_url: str
):
    one, other = [f"S{i}" for i in range(99) if shard_of(f"S{i}".encode()) == 0][:2]
    responses = subscribe(
        client, one, delivery=LOSSLESS, heartbeat_interval={"seconds": 1}
    )
    await until(responses, "snapshot_complete")
    await publish(client, *[quotes(other, [n]) for n in range(5)])
    await until(responses, "heartbeat")
    token = (await until(responses, "heartbeat")).resume_token
    await trim(redis_url, one)
    again = subscribe(client, one, delivery=LOSSLESS, resume_token=token)
    await until(again, "subscribed")
    await publish(client, quotes(one, [9]))
    assert numbers(await read(again, 1), one) == [9]


async def test_added_symbols_come_with_their_snapshot_and_no_seam(client: Client):
    await publish(client, quotes("B", [1]))
    sender = await stream(client, "A", delivery=LOSSLESS)
    await until(sender.responses, "snapshot_complete")
    await sender.send(pb.StreamQuotesRequest(add_symbols=["B"]))
    changed = await until(sender.responses, "subscribed")
    assert [k.key for k in changed.event.subscribed.keys] == ["B"]
    assert not changed.resume_token  # the snapshot is still to come
    assert numbers((await sender.next()).quotes, "B") == [1]
    assert (await sender.next()).resume_token
    await publish(client, [quote("A", 1), quote("B", 2)])
    received = await read(sender.responses, 2)
    assert (numbers(received, "A"), numbers(received, "B")) == ([1], [2])


async def test_changes_under_load_lose_and_double_nothing(client: Client):
    """A is read all the time while others of its shard come and go."""
    shard = shard_of(b"A")
    others = [f"S{i}" for i in range(300) if shard_of(f"S{i}".encode()) == shard][:5]
    sender = await stream(client, "A", delivery=LOSSLESS)
    await until(sender.responses, "snapshot_complete")

    async def feed() -> None:
        async with client.publish_quotes() as publisher:
            for n in range(1, 401):
                await publisher.send([quote(s, n) for s in ("A", *others)])
                if n % 10 == 0:
                    await publisher.flush()

    async def change() -> None:
        for other in others:
            await sender.send(pb.StreamQuotesRequest(add_symbols=[other]))
            await sender.send(pb.StreamQuotesRequest(remove_symbols=[other]))

    feeding = asyncio.create_task(feed())
    changing = asyncio.create_task(change())
    received = []
    while len(numbers(received, "A")) < 400:
        received += (await sender.next()).quotes
    await asyncio.gather(feeding, changing)
    assert numbers(received, "A") == list(range(1, 401))
    for other in others:
        seen = numbers(received, other)
        assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else True


async def test_removing_the_last_symbol_is_refused(client: Client):
    sender = await stream(client, "A")
    await until(sender.responses, "snapshot_complete")
    await sender.send(pb.StreamQuotesRequest(remove_symbols=["A"]))
    code, reason = await code_of(sender.responses)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_draining_says_goodbye_with_a_token_that_goes_on(
    server: Server, client: Client
):
    async with serving(server.settings) as other:
        leaving = Client(other)
        responses = subscribe(leaving, "A", delivery=LOSSLESS)
        await until(responses, "snapshot_complete")
        await publish(client, quotes("A", [1]))
        received = await read(responses, 1)
        goodbye = asyncio.ensure_future(until(responses, "goodbye"))
    said = await goodbye
    assert said.event.goodbye.reason == pb.GOODBYE_REASON_DRAINING
    await leaving.close()
    await publish(client, quotes("A", [2]))
    token = said.resume_token
    again = subscribe(client, "A", delivery=LOSSLESS, resume_token=token)
    assert numbers(received + await read(again, 1), "A") == [1, 2]


async def test_streams_beyond_the_limit_are_refused(server: Server):
    few = server.settings.model_copy(update={"max_streams": 2})
    async with serving(few) as target, Client(target) as client:
        held = [subscribe(client, "A") for _ in range(2)]
        for responses in held:
            await until(responses, "snapshot_complete")
        code, reason = await code_of(subscribe(client, "A"))
        assert (code, reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_STREAMS",
        )


# --- History, then live -----------------------------------------------------------


async def test_history_is_followed_by_live_without_hole_or_duplicate(client: Client):
    await publish(client, quotes("A", range(1, 5_001)))
    since = quote("A", 101).time
    responses = subscribe(client, "A", delivery=LOSSLESS, start_time=since)
    await publish(client, quotes("A", range(5_001, 6_001)))
    received = await read(responses, 5_900)
    assert numbers(received, "A") == list(range(101, 6_001))


async def test_history_resumes_in_its_middle(client: Client):
    await publish(
        client, *[quotes("A", range(n, n + 1_000)) for n in range(1, 5_000, 1_000)]
    )
    fields = {"delivery": LOSSLESS, "start_time": quote("A", 1).time}
    responses = subscribe(client, "A", **fields)
    page = await until(responses, "data")
    # What is recorded meanwhile: behind the place in history, and before it.
    await publish(client, quotes("A", range(5_001, 5_011)), [quote("A", 0)])
    again = subscribe(client, "A", **fields, resume_token=page.resume_token)
    received = list(page.quotes) + await read(again, 5_011 - len(page.quotes))
    assert sorted(numbers(received, "A")) == list(range(5_011))
    assert len(received) == 5_011


async def test_requests_are_left_as_they_were_given(client: Client):
    request = pb.StreamQuotesRequest(symbols=["A"])
    given = copy.deepcopy(request)
    async with client.follow(client.market_data.StreamQuotes, request) as follower:
        await anext(aiter(follower))
    assert request == given
