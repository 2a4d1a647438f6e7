"""GetLatestQuotes as of a time."""

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import Client, violations_of
from quantplane import v1 as pb
from tests.conftest import both_editions
from tests.market_data import quote


async def latest(
    client: Client, as_of: Timestamp, *symbols: str
) -> pb.GetLatestQuotesResponse:
    request = pb.GetLatestQuotesRequest(symbols=symbols, as_of=as_of)
    return await client.market_data.GetLatestQuotes(request)


@both_editions
async def test_the_latest_as_of_a_time_is_the_last_one_not_after_it(client: Client):
    quotes = [quote("A", number) for number in (1, 3, 5)]
    async with client.publish_quotes() as publisher:
        await publisher.send(quotes)
        await publisher.durable()
    for number, expected in {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}.items():
        response = await latest(client, quote("A", number).time, "A")
        assert list(response.quotes) == [quote("A", expected)]
        assert not response.unknown_symbols


async def test_symbols_that_came_after_the_time_are_unknown(client: Client):
    async with client.publish_quotes() as publisher:
        await publisher.send([quote("B", 2), quote("A", 1)])
        await publisher.durable()
    response = await latest(client, quote("A", 1).time, "B", "A", "C")
    assert list(response.quotes) == [quote("A", 1)]
    assert list(response.unknown_symbols) == ["B", "C"]


async def test_a_time_that_bounds_nothing_is_refused(client: Client):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await latest(client, Timestamp(seconds=1 << 40), "A")
    assert violations_of(raised.value)[0][0] == "as_of"
