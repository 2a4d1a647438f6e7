import asyncio
import json
from contextlib import asynccontextmanager

import grpc
import pytest

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane.client import service_config, services
from quantplane.testing import FaultInjector
from tests.client import refuse, serving, silence
from tests.market_data import numbers, quotes, read, until

Code = grpc.StatusCode
LATEST = pb.GetLatestQuotesRequest(symbols=["ES"])
SUBSCRIBE = pb.SubscribeQuotesRequest(symbols=["ES"])


def answer(number):
    return pb.GetLatestQuotesResponse(quotes=[pb.Quote(symbol="ES", last=number)])


def answers(number):
    async def script(request, context):
        yield answer(number)

    return script


def refuses(code, *before):
    """A script that sends responses, then refuses."""

    async def script(request, context):
        for response in before:
            yield response
        await refuse(context, code, "INVALID_FIELD", [("symbols", "bad")])

    return script


def quote(last):
    return pb.SubscribeQuotesResponse(quotes=[pb.Quote(symbol="ES", last=last)])


async def streams(request, context):
    """Yield quotes 1, 2, 3, ... for as long as they are read."""
    for last in range(1, 1_000_000):
        yield quote(last)


@asynccontextmanager
async def faulty(*scripts):
    """Serve scripts behind faults; give these, a client of them, and the server."""
    async with serving(*scripts) as (direct, server):
        with FaultInjector(direct.target) as faults:
            async with Client(faults.target) as client:
                yield faults, client, server


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


# The faults.


async def test_a_dropped_call_never_reaches_the_server_and_is_retried():
    async with faulty(answers(1)) as (faults, client, server):
        faults.drop("GetLatestQuotes")
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(1)
        assert faults.calls("GetLatestQuotes") == 2
        assert server.requests == [[LATEST]]


async def test_a_call_done_but_answered_unavailable_is_retried():
    async with faulty(answers(1), answers(2)) as (faults, client, server):
        faults.answer_unavailable("GetLatestQuotes")
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(2)
        assert server.requests == [[LATEST]] * 2


async def test_the_caller_of_a_duplicated_call_gets_the_second_answer():
    async with faulty(answers(1), answers(2)) as (faults, client, server):
        faults.duplicate("GetLatestQuotes")
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(2)
        assert faults.calls("GetLatestQuotes") == 1
        assert server.requests == [[LATEST]] * 2


async def test_a_delayed_call_is_not_yet_at_the_server():
    async with faulty(answers(1)) as (faults, client, server):
        faults.delay("GetLatestQuotes", seconds=60)
        call = client.market_data.GetLatestQuotes(LATEST, timeout=0.2)
        assert await code_of(call) is Code.DEADLINE_EXCEEDED
        assert faults.calls("GetLatestQuotes") == 1
        assert server.requests == []


async def test_a_delayed_call_reaches_the_server():
    async with faulty(answers(1)) as (faults, client, _):
        faults.delay("GetLatestQuotes", seconds=0.05)
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(1)


@pytest.mark.parametrize("after", [0, 3])
async def test_a_stream_is_cut_after_so_many_responses(after):
    async with faulty(streams) as (faults, client, _):
        faults.cut("SubscribeQuotes", after=after)
        call = client.market_data.SubscribeQuotes(SUBSCRIBE)
        received = [await call.read() for _ in range(after)]
        assert received == [quote(last + 1) for last in range(after)]
        assert await code_of(call.read()) is Code.UNAVAILABLE


async def test_running_and_new_calls_fail_in_a_partition_and_later_ones_do_not():
    async with faulty(streams, answers(1)) as (faults, client, server):
        running = client.market_data.SubscribeQuotes(SUBSCRIBE)
        assert await running.read() == quote(1)
        with faults.partition():
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await running.read():
                    pass
            assert raised.value.code() is Code.UNAVAILABLE
            new = client.market_data.SubscribeQuotes(SUBSCRIBE)
            assert await code_of(new.read()) is Code.UNAVAILABLE
            assert len(server.requests) == 1
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(1)


async def test_faults_of_one_method_follow_each_other():
    async with faulty(answers(1), answers(2), answers(3)) as (faults, client, server):
        faults.drop("GetLatestQuotes", times=2)
        faults.duplicate("GetLatestQuotes")
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(2)
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(3)
        assert faults.calls("GetLatestQuotes") == 4
        assert len(server.requests) == 3


async def test_a_fault_befalls_only_its_own_method():
    async with faulty(answers(1)) as (faults, client, _):
        faults.drop("/quantplane.v1.MarketDataService/ListBars")
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(1)
        assert faults.calls("ListBars") == 0


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no method GetLatestQuote;.*GetLatestQuotes"):
        FaultInjector("127.0.0.1:1").drop("GetLatestQuote")


def test_a_fault_that_can_not_befall_a_method_is_refused():
    faults = FaultInjector("127.0.0.1:1")
    with pytest.raises(ValueError, match="not a unary method"):
        faults.duplicate("StreamQuotes")
    with pytest.raises(ValueError, match="not a unary method"):
        faults.answer_unavailable("StreamQuotes")
    with pytest.raises(ValueError, match="not a stream"):
        faults.cut("GetLatestQuotes", after=1)


async def test_without_a_server_calls_fail():
    with FaultInjector("127.0.0.1:1") as faults:
        async with Client(faults.target) as client:
            call = client.market_data.SubscribeQuotes(SUBSCRIBE)
            assert await code_of(call.read()) is Code.UNAVAILABLE


# What is not broken passes as it is.


async def test_an_error_passes_with_its_details():
    async with faulty(refuses(Code.INVALID_ARGUMENT)) as (_, client, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.market_data.GetLatestQuotes(LATEST)
    assert raised.value.code() is Code.INVALID_ARGUMENT
    assert raised.value.details() == "refused"
    assert reason_of(raised.value) == "INVALID_FIELD"


async def test_an_error_behind_responses_passes():
    async with faulty(refuses(Code.OUT_OF_RANGE, quote(1))) as (_, client, _):
        call = client.market_data.SubscribeQuotes(SUBSCRIBE)
        assert await call.read() == quote(1)
        assert await code_of(call.read()) is Code.OUT_OF_RANGE


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.UNKNOWN])
async def test_whatever_code_the_server_ends_with_passes(code):
    async with faulty(refuses(code)) as (_, client, _):
        call = client.market_data.GetLatestQuotes(LATEST)
        assert await call.code() is code


async def test_metadata_pass_both_ways():
    async def script(request, context):
        seen = dict(context.invocation_metadata())
        await context.send_initial_metadata((("initial", seen["asked"]),))
        context.set_trailing_metadata((("trailing-bin", b"\0\xff"),))
        yield answer(1)

    async with faulty(script) as (_, client, _):
        call = client.market_data.GetLatestQuotes(LATEST, metadata=(("asked", "x"),))
        await call
        assert ("initial", "x") in tuple(await call.initial_metadata())
        assert ("trailing-bin", b"\0\xff") in tuple(await call.trailing_metadata())


async def test_a_refusal_without_metadata_before_it_is_retried_through_the_proxy():
    async with faulty(refuses(Code.UNAVAILABLE), answers(1)) as (faults, client, _):
        assert await client.market_data.GetLatestQuotes(LATEST) == answer(1)
        assert faults.calls("GetLatestQuotes") == 2


async def test_a_refusal_behind_metadata_is_not_retried():
    told = asyncio.Event()

    async def script(request, context):
        await context.send_initial_metadata((("initial", "x"),))
        await told.wait()
        await refuse(context, Code.UNAVAILABLE)
        yield

    config = json.dumps(service_config(service for service, _ in services()))
    options = [("grpc.service_config", config)]
    async with faulty(script, answers(1)) as (faults, _, _):
        async with grpc.aio.insecure_channel(faults.target, options) as channel:
            latest = "/quantplane.v1.MarketDataService/GetLatestQuotes"
            call = channel.unary_stream(latest)(LATEST.SerializeToString())
            await call.initial_metadata()  # which a unary call tells only at its end
            told.set()
            assert await code_of(call.read()) is Code.UNAVAILABLE
        assert faults.calls("GetLatestQuotes") == 1


async def test_the_server_knows_the_deadline_of_the_client():
    remaining = []

    async def script(request, context):
        remaining.append(context.time_remaining())
        yield answer(1)

    async with faulty(script, script) as (_, client, _):
        await client.market_data.GetLatestQuotes(LATEST, timeout=3600)
        await client.market_data.SubscribeQuotes(SUBSCRIBE).read()
    assert 10 < remaining[0] < 4000  # on the wire it is rounded
    assert remaining[1] is None


async def test_the_server_learns_that_the_client_has_cancelled():
    cancelled = asyncio.Event()

    async def script(request, context):
        try:
            yield quote(1)
            await silence()
        finally:
            cancelled.set()

    async with faulty(script) as (_, client, _):
        call = client.market_data.SubscribeQuotes(SUBSCRIBE)
        await call.read()
        call.cancel()
        await cancelled.wait()


async def test_a_large_response_passes():
    large = pb.GetLatestQuotesResponse(unknown_symbols=["S" * 5_000_000])

    async def script(request, context):
        yield large

    async with faulty(script) as (_, client, _):
        assert await client.market_data.GetLatestQuotes(LATEST) == large


# With a real server.


async def test_quotes_published_and_followed_through_cuts_come_once_each(server):
    with FaultInjector(server.target) as faults:
        faults.cut("PublishQuotes", after=3, times=3)
        faults.cut("StreamQuotes", after=4, times=5)
        async with Client(faults.target) as client:
            request = pb.StreamQuotesRequest(
                symbols=["ES"], delivery=pb.DELIVERY_LOSSLESS
            )
            stream = client.follow(client.market_data.StreamQuotes, request)
            await until(stream, "subscribed")
            received = []
            async with client.publish_quotes("feed") as publisher:
                for number in range(30):
                    await publisher.send(quotes("ES", [number]))
                    received += await read(stream, 1)
        assert numbers(received, "ES") == list(range(30))
        assert faults.calls("PublishQuotes") == 4
        assert faults.calls("StreamQuotes") == 6
