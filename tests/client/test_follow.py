import asyncio
import gc
import random
import socket
import time
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import Client
from quantplane import v1 as pb
from quantplane.follow import Backoff
from tests.client import ScriptedServer, refuse, seconds, serving, silence, until

Code = grpc.StatusCode
SUBSCRIBE = pb.SubscribeQuotesRequest(symbols=["ES"])
STREAM = pb.StreamQuotesRequest(symbols=["ES"])


def quote(last, token=b""):
    quotes = [pb.Quote(symbol="ES", last=last)]
    return pb.SubscribeQuotesResponse(quotes=quotes, resume_token=token)


def event(token=b"", **kind):
    return pb.SubscribeQuotesResponse(event=pb.StreamEvent(**kind), resume_token=token)


def numbered(sequence, response):
    """Return the response as StreamQuotes gives it."""
    numbered = pb.StreamQuotesResponse.FromString(response.SerializeToString())
    numbered.sequence = sequence
    return numbered


def heartbeat(token=b"", server_time=None):
    return event(token, heartbeat=pb.Heartbeat(server_time=server_time))


SUBSCRIBED = event(subscribed=pb.Subscribed())


async def lasts(follower, count):
    """Return the prices of the next `count` responses, which must be data."""
    return [(await anext(follower)).quotes[0].last for _ in range(count)]


def plays(*responses, then=silence):
    """Return the script that answers so, and then does `then`."""

    async def script(request, context):
        if hasattr(request, "__anext__"):
            await anext(request)
        for response in responses:
            yield response
        await then()

    return script


def refuses(code, reason="", **metadata):
    async def script(request, context):
        await refuse(context, code, reason, **metadata)
        yield

    return script


async def ends():
    pass


# Coming back.


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.UNAVAILABLE, "DRAINING"),
        (Code.CANCELLED, ""),
        (Code.DEADLINE_EXCEEDED, ""),
        (Code.INTERNAL, ""),
        (Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
    ],
)
async def test_a_broken_stream_is_resumed_behind_the_last_response(code, reason):
    async def breaks(request, context):
        yield quote(1, b"first")
        yield quote(2, b"second")
        await refuse(context, code, reason)

    async with serving(breaks, plays(quote(3))) as (client, server):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 3) == [1, 2, 3]
    assert [call[0].resume_token for call in server.requests] == [b"", b"second"]
    assert follower.reconnects == 1


async def test_a_clean_end_of_a_stream_is_a_reconnect_too():
    async with serving(plays(quote(1, b"t"), then=ends), plays(quote(2))) as (
        client,
        server,
    ):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 2) == [1, 2]
    assert server.requests[1][0].resume_token == b"t"


async def test_the_rest_of_the_request_is_the_same_after_a_reconnect():
    request = pb.SubscribeQuotesRequest(
        symbols=["ES", "NQ"], delivery=pb.DELIVERY_LOSSLESS, min_interval=seconds(1)
    )
    async with serving(plays(then=ends), plays(quote(1))) as (client, server):
        await anext(client.follow(client.market_data.SubscribeQuotes, request))
    assert server.requests == [[request], [request]]


async def test_a_token_of_the_application_is_where_the_stream_begins():
    request = pb.SubscribeQuotesRequest(symbols=["ES"], resume_token=b"kept")
    async with serving(plays(quote(1))) as (client, server):
        await anext(client.follow(client.market_data.SubscribeQuotes, request))
    assert server.requests[0][0].resume_token == b"kept"


async def test_the_request_of_the_application_is_left_alone():
    async with serving(plays(quote(1, b"t"), then=ends), plays(quote(2))) as (
        client,
        _,
    ):
        request = pb.StreamQuotesRequest(symbols=["ES"])
        follower = client.follow(client.market_data.StreamQuotes, request)
        await lasts(follower, 2)
    assert request == STREAM


async def test_a_goodbye_is_obeyed_after_its_time():
    goodbye = pb.Goodbye(retry_after=seconds(0.3))
    async with serving(plays(event(b"t", goodbye=goodbye)), plays(quote(1))) as (
        client,
        server,
    ):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 1) == [1]
    assert server.requests[1][0].resume_token == b"t"
    assert server.times[1] - server.times[0] >= 0.3


async def test_a_silent_stream_is_resumed():
    request = pb.SubscribeQuotesRequest(
        symbols=["ES"], heartbeat_interval=seconds(0.02)
    )
    async with serving(plays(quote(1, b"t")), plays(quote(2))) as (client, server):
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        assert await lasts(follower, 2) == [1, 2]
    assert server.requests[1][0].resume_token == b"t"
    assert server.times[1] - server.times[0] >= 2.5 * 0.02


async def test_a_server_that_never_answers_is_called_again():
    request = pb.StreamQuotesRequest(symbols=["ES"], heartbeat_interval=seconds(0.02))
    async with serving(plays(), plays(numbered(1, quote(1)))) as (client, _):
        follower = client.follow(client.market_data.StreamQuotes, request)
        assert await lasts(follower, 1) == [1]


@pytest.mark.parametrize("method", ["StreamQuotes", "SubscribeQuotes"])
async def test_a_server_that_can_t_be_reached_is_called_again_and_again(method: str):
    request = getattr(pb, f"{method}Request")(symbols=["ES"])
    request.heartbeat_interval.CopyFrom(seconds(0.02))
    with socket.socket() as nobody:  # takes the port, and does not listen
        nobody.bind(("127.0.0.1", 0))
        async with Client(f"127.0.0.1:{nobody.getsockname()[1]}") as client:
            follower = client.follow(getattr(client.market_data, method), request)
            waiting = asyncio.create_task(anext(follower))
            async with asyncio.timeout(20):
                while follower.reconnects < 3:
                    await asyncio.sleep(0.01)
            waiting.cancel()


async def test_heartbeats_keep_a_stream_without_data_alive():
    async def beats(request, context):
        for _ in range(20):
            yield heartbeat()
            await asyncio.sleep(0.02)
        yield quote(1)
        await silence()

    request = pb.SubscribeQuotesRequest(symbols=["ES"], heartbeat_interval=seconds(0.1))
    async with serving(beats) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        assert await lasts(follower, 1) == [1]
    assert follower.reconnects == 0


async def test_time_that_the_application_takes_is_not_silence():
    request = pb.SubscribeQuotesRequest(
        symbols=["ES"], heartbeat_interval=seconds(0.02)
    )
    asked = asyncio.Event()

    async def script(request, context):
        yield quote(1)
        await asked.wait()
        yield quote(2)

    async with serving(script) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        await anext(follower)
        await asyncio.sleep(0.2)  # at work on it
        asked.set()
        assert await lasts(follower, 1) == [2]
    assert follower.reconnects == 0


async def test_a_server_that_starts_late_is_waited_for():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    async with Client(f"127.0.0.1:{port}") as client:
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        first = asyncio.create_task(lasts(follower, 1))
        await asyncio.wait([first], timeout=0.1)
        server = grpc.aio.server()
        scripted = ScriptedServer([plays(quote(1))])
        pb.add_MarketDataServiceServicer_to_server(scripted, server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            assert await first == [1]
        finally:
            await server.stop(None)


def test_delays_double_up_to_ten_seconds_and_may_be_anything_below(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: (low, high))
    backoff = Backoff()
    assert [backoff.next() for _ in range(9)] == [
        (0, limit) for limit in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10)
    ]


def test_delays_are_short_again_after_success(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff()
    backoff.next()
    backoff.next()
    backoff.reset()
    assert backoff.next() == 0.1


@pytest.mark.parametrize(
    ("response", "grows"),
    [(quote(1, b"t"), False), (heartbeat(), False), (SUBSCRIBED, True)],
)
async def test_only_data_and_heartbeats_make_delays_short_again(
    monkeypatch, response, grows
):
    limits = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append(high) or 0)
    script = plays(response, then=ends)
    async with serving(script, script, script, plays(quote(2))) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        while (response := await anext(follower)).quotes[:1] != quote(2).quotes:
            pass
    assert limits == ([0.1, 0.2, 0.4] if grows else [0.1] * 3)


# What the application gets.


async def test_heartbeats_are_kept_from_the_application_but_their_token_counts():
    async with serving(
        plays(heartbeat(b"beat"), then=ends), plays(heartbeat(), quote(1))
    ) as (client, server):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 1) == [1]
    assert server.requests[1][0].resume_token == b"beat"


@pytest.mark.parametrize(
    "response",
    [SUBSCRIBED, event(snapshot_complete=pb.SnapshotComplete()), event(gap=pb.Gap())],
)
async def test_other_events_are_given_to_the_application(response):
    async with serving(plays(response)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await anext(follower) == response


async def test_a_response_that_comes_again_after_a_reconnect_is_dropped():
    async with serving(
        plays(quote(1, b"t"), then=ends), plays(quote(1, b"t"), quote(2, b"u"))
    ) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 2) == [1, 2]


async def test_a_state_that_comes_back_after_another_is_given_again():
    async with serving(
        plays(quote(1, b"t"), then=ends), plays(quote(2, b"u"), quote(1, b"t"))
    ) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 3) == [1, 2, 1]


async def test_responses_of_one_connection_may_share_a_token():
    async with serving(plays(quote(1, b"t"), quote(2, b"t"))) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert await lasts(follower, 2) == [1, 2]


async def test_a_finite_stream_ends_with_complete():
    request = pb.StreamBarsRequest(symbols=["ES"])
    complete = pb.StreamEvent(complete=pb.Complete())
    bars = pb.StreamBarsResponse(columns=pb.BarColumns(symbol="ES"))
    async with serving(
        plays(bars, pb.StreamBarsResponse(event=complete), then=ends)
    ) as (client, server):
        follower = client.follow(client.market_data.StreamBars, request)
        assert [response async for response in follower] == [bars]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.INVALID_ARGUMENT, "INVALID_RESUME_TOKEN"),
        (Code.UNAUTHENTICATED, ""),
        (Code.PERMISSION_DENIED, ""),
        (Code.NOT_FOUND, "UNKNOWN_SYMBOL"),
        (Code.INTERNAL, "INTERNAL"),
        (Code.RESOURCE_EXHAUSTED, ""),
    ],
)
async def test_an_error_that_no_reconnect_cures_is_raised_and_ends_it(code, reason):
    async with serving(refuses(code, reason)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(follower)
        assert [response async for response in follower] == []
    assert caught.value.code() is code


# Gaps.


async def test_a_token_too_old_becomes_a_gap_and_a_fresh_snapshot():
    server_time = Timestamp(seconds=1_700_000_000)
    before = datetime.now(UTC)
    async with serving(
        plays(heartbeat(b"t", server_time), then=ends),
        refuses(Code.OUT_OF_RANGE, "COMPACTED"),
        plays(quote(1)),
    ) as (client, server):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        gap = (await anext(follower)).event.gap
        assert await lasts(follower, 1) == [1]
    assert [call[0].resume_token for call in server.requests] == [b"", b"t", b""]
    assert gap.start_time == server_time
    assert gap.end_time.ToDatetime(UTC) >= before
    assert gap.cause == pb.GAP_CAUSE_COMPACTED
    assert follower.gaps == 1


async def test_a_gap_without_heartbeat_begins_at_the_last_delivery():
    before = time.time_ns()
    async with serving(
        plays(quote(1, b"t"), then=ends), refuses(Code.OUT_OF_RANGE, "COMPACTED")
    ) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        after = time.time_ns()
        gap = (await anext(follower)).event.gap
    assert before <= gap.start_time.ToNanoseconds() <= after


async def test_a_gap_before_any_delivery_has_no_known_beginning():
    request = pb.SubscribeQuotesRequest(symbols=["ES"], resume_token=b"old")
    async with serving(refuses(Code.OUT_OF_RANGE, "COMPACTED")) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        gap = (await anext(follower)).event.gap
    assert not gap.HasField("start_time")


async def test_a_gap_tells_the_cause_that_the_server_gave():
    lost = refuses(Code.OUT_OF_RANGE, "COMPACTED", cause="BUS_REBUILT")
    async with serving(lost) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert (await anext(follower)).event.gap.cause == pb.GAP_CAUSE_BUS_REBUILT


async def test_history_is_not_delivered_again_after_a_gap():
    request = pb.SubscribeQuotesRequest(symbols=["ES"], start_time=Timestamp(seconds=1))
    lost = refuses(Code.OUT_OF_RANGE, "COMPACTED")
    async with serving(lost, plays(quote(1))) as (client, server):
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        await anext(follower)
        await anext(follower)
    assert server.requests[1] == [SUBSCRIBE]


async def test_gaps_of_the_server_count_as_well():
    async with serving(plays(event(gap=pb.Gap()))) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
    assert follower.gaps == 1


# Acknowledgements.


async def test_a_request_without_credit_gets_credit():
    async with serving(plays(numbered(1, quote(1)))) as (client, server):
        await anext(client.follow(client.market_data.StreamQuotes, STREAM))
    assert server.requests[0][0].max_unacknowledged == 16


async def test_half_the_credit_is_acknowledged_once_it_is_handled():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        yield numbered(2, quote(2))
        acknowledge = (await anext(requests)).acknowledge
        yield numbered(3, quote(acknowledge))
        await silence()

    request = pb.StreamQuotesRequest(symbols=["ES"], max_unacknowledged=4)
    async with serving(script) as (client, _):
        follower = client.follow(client.market_data.StreamQuotes, request)
        assert await lasts(follower, 3) == [1, 2, 2]


async def test_a_response_is_not_acknowledged_while_the_application_handles_it():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        await anext(requests)
        await silence()

    request = pb.StreamQuotesRequest(symbols=["ES"], max_unacknowledged=1)
    async with serving(script) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, request)
        await anext(follower)
        await follower.update(add_symbols=["NQ"])
        waiting = asyncio.create_task(lasts(follower, 1))
        await until(lambda: len(server.requests[0]) == 2)
        waiting.cancel()
    assert server.requests[0][1].add_symbols == ["NQ"]


async def test_a_heartbeat_has_everything_before_it_acknowledged():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        yield numbered(2, heartbeat())
        yield numbered(3, quote((await anext(requests)).acknowledge))
        await silence()

    async with serving(script) as (client, _):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        assert await lasts(follower, 2) == [1, 2]


async def test_acknowledgements_begin_anew_on_each_connection():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        yield numbered(2, quote((await anext(requests)).acknowledge))

    request = pb.StreamQuotesRequest(symbols=["ES"], max_unacknowledged=1)
    async with serving(script, script) as (client, _):
        follower = client.follow(client.market_data.StreamQuotes, request)
        assert await lasts(follower, 4) == [1, 1, 1, 1]


# Changes of symbols.


def changed(*requests):
    """Return what each says about symbols, adding and removing some."""
    return [
        (list(r.symbols), list(r.add_symbols), list(r.remove_symbols)) for r in requests
    ]


async def test_an_update_reaches_the_server():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        await anext(requests)
        yield numbered(2, quote(2))
        await silence()

    async with serving(script) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await anext(follower)
        await follower.update(add_symbols=["NQ"], remove_symbols=["ES"])
        assert await lasts(follower, 1) == [2]
    assert changed(server.requests[0][1]) == [([], ["NQ"], ["ES"])]


async def updated_and_cut(*answers, requests):
    """Return the first requests of the stream after one that was updated and cut.

    Its server has sent the token "old" before the update, and `answers` after it.
    """

    async def cut(requests, context):
        await anext(requests)
        yield numbered(1, SUBSCRIBED)
        yield numbered(2, quote(1, b"old"))
        await anext(requests)
        for sequence, answer in enumerate(answers, 3):
            yield numbered(sequence, answer)
        await refuse(context, Code.UNAVAILABLE)

    async def listens(requests, context):
        async for _ in requests:
            pass
        yield

    async with serving(cut, listens) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await anext(follower)
        await anext(follower)
        await follower.update(add_symbols=["NQ"])
        reading = asyncio.create_task(rest(follower))
        await until(lambda: [len(call) for call in server.requests[1:]] == [requests])
        await follower.aclose()
        await reading
    return server.requests[1]


async def rest(follower):
    return [response async for response in follower]


async def test_an_update_without_a_newer_token_is_sent_again_with_the_old_symbols():
    first, second = await updated_and_cut(SUBSCRIBED, requests=2)
    assert first.resume_token == b"old"
    assert changed(first, second) == [(["ES"], [], []), ([], ["NQ"], [])]


async def test_a_token_sent_before_the_update_was_in_force_does_not_cover_it():
    first, second = await updated_and_cut(quote(2, b"on its way"), requests=2)
    assert first.resume_token == b"on its way"
    assert changed(first, second) == [(["ES"], [], []), ([], ["NQ"], [])]


async def test_a_snapshot_after_a_gap_does_not_put_the_update_in_force():
    gap = event(gap=pb.Gap())
    first, second = await updated_and_cut(gap, SUBSCRIBED, quote(2, b"g"), requests=2)
    assert first.resume_token == b"g"
    assert changed(first, second) == [(["ES"], [], []), ([], ["NQ"], [])]


async def test_the_start_of_a_stream_does_not_put_the_update_in_force():
    async def script(requests, context):
        await anext(requests)
        yield numbered(1, SUBSCRIBED)
        yield numbered(2, quote(1, b"t"))
        await anext(requests)

    async with serving(script, script, plays()) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await anext(follower)
        await anext(follower)
        await follower.update(add_symbols=["NQ"])
        reading = asyncio.create_task(rest(follower))
        await until(lambda: [len(call) for call in server.requests[2:]] == [1])
        await follower.aclose()
        await reading
    assert changed(server.requests[2][0]) == [(["ES"], [], [])]


async def test_a_newer_token_makes_the_update_part_of_the_request():
    (first,) = await updated_and_cut(SUBSCRIBED, quote(2, b"new"), requests=1)
    assert first.resume_token == b"new"
    assert changed(first) == [(["ES", "NQ"], [], [])]


async def test_updates_without_any_token_are_part_of_the_next_request():
    async def cut(requests, context):
        await anext(requests)
        yield numbered(1, quote(1))
        for _ in range(3):
            await anext(requests)

    async with serving(cut, plays(numbered(1, quote(2)))) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await anext(follower)
        await follower.update(symbols=["NQ", "YM"])
        await follower.update(add_symbols=["CL", "NQ"])
        await follower.update(remove_symbols=["YM"])
        await anext(follower)
        await follower.update(add_symbols=["GC"])
        await follower.aclose()
    assert changed(server.requests[1][0]) == [(["NQ", "CL"], [], [])]


async def test_an_update_before_the_first_response_is_part_of_the_request():
    async with serving(plays(numbered(1, quote(1)))) as (client, server):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await follower.update(add_symbols=["NQ"])
        await anext(follower)
    assert changed(server.requests[0][0]) == [(["ES", "NQ"], [], [])]


async def test_a_stream_with_fixed_symbols_refuses_an_update():
    async with serving() as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        with pytest.raises(TypeError, match="SubscribeQuotes"):
            await follower.update(add_symbols=["NQ"])


# Ending.


def watched(ended):
    """Return a script that sets `ended` when the client has left."""

    async def script(request, context):
        try:
            yield quote(1, b"t")
            await silence()
        finally:
            ended.set()

    return script


async def test_closing_ends_the_iteration_of_another_task():
    ended = asyncio.Event()
    async with serving(watched(ended)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        waiting = asyncio.create_task(lasts(follower, 1))
        await asyncio.sleep(0)
        await follower.aclose()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await ended.wait()


async def test_closing_does_not_wait_for_the_next_try():
    goodbye = event(goodbye=pb.Goodbye(retry_after=seconds(100)))
    async with serving(plays(quote(1), goodbye)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        waiting = asyncio.create_task(lasts(follower, 1))
        await asyncio.wait([waiting], timeout=0.05)
        await follower.aclose()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, 5)


async def test_leaving_the_block_ends_the_call():
    ended = asyncio.Event()
    async with serving(watched(ended)) as (client, _):
        method = client.market_data.SubscribeQuotes
        async with client.follow(method, SUBSCRIBE) as follower:
            await anext(follower)
        await ended.wait()


async def test_closing_the_client_ends_iterations():
    async with serving(watched(asyncio.Event())) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        await client.close()
        assert [response async for response in follower] == []


async def test_a_follower_that_is_dropped_ends_its_call():
    ended = asyncio.Event()
    async with serving(watched(ended)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        del follower
        gc.collect()
        await asyncio.wait_for(ended.wait(), 5)


async def test_a_timeout_of_the_application_loses_nothing():
    async with serving(plays(quote(1, b"t")), plays(quote(2, b"u"))) as (
        client,
        server,
    ):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(follower), 0.05)
        assert await lasts(follower, 1) == [2]
    assert server.requests[1][0].resume_token == b"t"


async def test_cancelling_the_consumer_ends_the_call():
    ended = asyncio.Event()
    async with serving(watched(ended)) as (client, _):
        follower = client.follow(client.market_data.StreamQuotes, STREAM)
        await anext(follower)
        consumer = asyncio.create_task(rest(follower))
        await asyncio.sleep(0)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        await ended.wait()
