"""From the database to the live tail in one stream, without hole or duplicate."""

import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

from quantplane import Client
from quantplane import v1 as pb
from tests.acceptance import PATIENCE_S, stamp
from tests.faults import (
    EPOCH_US,
    SYMBOLS,
    Feed,
    Reader,
    difference,
    numbers_through,
    quote,
    stream,
    subscribe,
    until,
)

LATE = "LATE"
RECORDED = 20_000  # quotes before anyone subscribes: some ten pages of history


def time_of(number: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=EPOCH_US + number)


async def test_history_and_live_quotes_come_once_and_in_order(client: Client):
    start = stamp(time_of(0))
    async with (
        client.publish_quotes("feed") as publisher,
        AsyncExitStack() as readers,
    ):
        feed = Feed(publisher)
        await feed.send(RECORDED)
        await feed.all_durable()
        async with feed.running():
            by_stream, by_subscription = [
                await readers.enter_async_context(Reader(subscribed))
                for subscribed in (
                    stream(client, start_time=start),
                    subscribe(client, start_time=start),
                )
            ]
            await until(lambda: by_stream.count > RECORDED + 5_000, "live quotes")
        await by_stream.has_all(feed)
        await by_subscription.has_all(feed)


async def test_history_begins_at_the_start_time(client: Client):
    first = 5_001
    async with client.publish_quotes("feed") as publisher:
        feed = Feed(publisher)
        await feed.send(RECORDED)
        await feed.all_durable()
        follower = subscribe(client, start_time=stamp(time_of(first)))
        async with Reader(follower) as reader:
            await feed.send(1_000)
            wanted = feed.sent - first + 1
            await until(lambda: reader.count >= wanted, "recorded and live")
            expected = {
                symbol: [number for number in numbers if number >= first]
                for symbol, numbers in numbers_through(feed.sent).items()
            }
            assert difference(reader.numbers, expected) == []


async def test_a_stream_cut_in_history_goes_on_by_its_token(client: Client):
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    request = pb.SubscribeQuotesRequest(
        symbols=SYMBOLS, delivery=pb.DELIVERY_LOSSLESS, start_time=stamp(time_of(0))
    )
    async with client.publish_quotes("feed") as publisher:
        feed = Feed(publisher)
        await feed.send(RECORDED)
        await feed.all_durable()
        reader = Reader(subscribe(client))  # keeps what all the streams read
        cuts_in_history = 0
        async with feed.running():
            while reader.count < RECORDED + 5_000:
                await read_some(client, request, reader, rng.randint(2, 4))
                cuts_in_history += reader.count < RECORDED
        await feed.all_accepted()
        while reader.count < feed.sent:
            await read_some(client, request, reader, 3)
        assert cuts_in_history >= 3
        assert difference(reader.numbers, numbers_through(feed.sent)) == []


async def read_some(
    client: Client,
    request: pb.SubscribeQuotesRequest,
    reader: Reader,
    responses: int,
) -> None:
    """Read some responses from the request's token on, and move it."""
    call = client.market_data.SubscribeQuotes(request, timeout=PATIENCE_S)
    for _ in range(responses):
        response = await call.read()
        reader.take(response)
        request.resume_token = response.resume_token or request.resume_token
    call.cancel()


async def test_quotes_recorded_late_behind_a_reader_of_history_are_not_missed(
    client: Client,
):
    request = pb.StreamQuotesRequest(
        symbols=[*SYMBOLS, LATE],
        delivery=pb.DELIVERY_LOSSLESS,
        start_time=stamp(time_of(0)),
        max_unacknowledged=2,  # the server is in the first page and waits
    )
    async with (
        client.publish_quotes("feed") as publisher,
        client.publish_quotes("late") as late,
    ):
        feed = Feed(publisher)
        await feed.send(RECORDED)
        await feed.all_durable()
        call = client.market_data.StreamQuotes(timeout=PATIENCE_S)
        await call.write(request)
        reader = Reader(stream(client))  # keeps what is read
        for _ in range(2):
            response = await call.read()
            reader.take(response)
        assert 0 < reader.count < RECORDED
        await late.send([quote(number, (LATE,)) for number in range(1, 101)])
        await late.durable()
        while reader.count < RECORDED + 100:
            acknowledge = pb.StreamQuotesRequest(acknowledge=response.sequence)
            await call.write(acknowledge)
            response = await call.read()
            reader.take(response)
        expected = {LATE: [*range(1, 101)], **numbers_through(RECORDED)}
        assert difference(reader.numbers, expected) == []
        call.cancel()
