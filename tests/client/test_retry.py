"""Calls that are made again until the server has answered."""

import grpc
import pytest

from quantplane import v1 as pb
from quantplane.retry import answered
from tests.client import refuse, serving

LATEST = pb.GetLatestQuotesRequest(symbols=["ES"])
FOUND = pb.GetLatestQuotesResponse(quotes=[pb.Quote(symbol="ES", last=1)])


async def answers(request, context):
    yield FOUND


async def is_cut_off(request, context):
    await refuse(context, grpc.StatusCode.INTERNAL)
    yield


async def refuses(request, context):
    await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    yield


async def test_a_call_is_made_again_until_it_is_answered():
    async with serving(is_cut_off, is_cut_off, answers) as (client, server):
        assert await answered(client.market_data.GetLatestQuotes, LATEST) == FOUND
    assert server.requests == [[LATEST]] * 3


async def test_a_refusal_is_raised():
    async with serving(refuses, answers) as (client, server):
        with pytest.raises(grpc.aio.AioRpcError):
            await answered(client.market_data.GetLatestQuotes, LATEST)
    assert server.requests == [[LATEST]]
