import asyncio
import time

import grpc
import pytest

from quantplane import reason_of
from quantplane import v1 as pb
from quantplane.publish import QuotePublisher
from tests.client import refuse, serving, silence, until

Code = grpc.StatusCode
Response = pb.PublishQuotesResponse
WELCOME = Response(next_batch=1)


def quotes(count=1):
    return [pb.Quote(symbol="ES", last=price) for price in range(count)]


async def accepts_all(requests, context):
    """Accept every batch as it comes."""
    await anext(requests)
    yield WELCOME
    async for request in requests:
        yield Response(accepted_through=request.batch)


def takes(count, *, first=WELCOME, accepts=0, then=silence):
    """Return a script that reads `count` batches, accepts up to one, and ends."""

    async def script(requests, context):
        await anext(requests)
        yield first
        for _ in range(count):
            await anext(requests)
        if accepts:
            yield Response(accepted_through=accepts)
        await then()

    return script


async def ends():
    pass


def refuses(count, code, reason, **metadata):
    """Return a script that reads `count` batches and ends with an error."""

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        for _ in range(count):
            await anext(requests)
        await refuse(context, code, reason, **metadata)

    return script


def batches(requests):
    """Return the numbers of the batches of a call, whose first names the feed."""
    return [request.batch for request in requests[1:]]


async def waits(awaitable, reached):
    """Start `awaitable`; return its task once `reached()`, if it waits even then."""
    task = asyncio.create_task(awaitable)
    await until(reached)
    assert not task.done()
    return task


# Numbers.


async def test_the_first_message_names_the_feed_and_nothing_else():
    async with serving(accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
    assert server.requests[0][0] == pb.PublishQuotesRequest(feed="nyse")


async def test_batches_are_numbered_from_the_one_that_the_server_names():
    async with serving(takes(2, first=Response(next_batch=7), accepts=8)) as (
        client,
        server,
    ):
        async with client.publish_quotes("nyse") as publisher:
            assert await publisher.send(quotes()) == 7
            assert await publisher.send(quotes(2)) == 8
    sent = [(each.batch, list(each.quotes)) for each in server.requests[0][1:]]
    assert sent == [(7, quotes()), (8, quotes(2))]


async def test_a_batch_says_when_it_was_published_also_when_it_is_sent_again():
    began = time.time_ns()
    async with serving(takes(1, then=ends), accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            await until(lambda: len(server.requests) == 2)
            ended = time.time_ns()
    first, again = (requests[1].publish_time for requests in server.requests)
    assert began <= first.ToNanoseconds() <= ended
    assert again == first


async def test_more_than_2000_quotes_become_several_batches():
    async with serving(accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            assert await publisher.send(quotes(4_001)) == 3
    sizes = [len(request.quotes) for request in server.requests[0][1:]]
    assert sizes == [2_000, 2_000, 1]


async def test_no_quotes_are_no_batch():
    async with serving(accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            assert await publisher.send([]) == 1
    assert batches(server.requests[0]) == [1]


async def test_feeds_without_a_name_get_different_ones():
    async with serving() as (client, _):
        names = {client.publish_quotes().feed for _ in range(10)}
    assert len(names) == 10
    assert all(1 <= len(name) <= 64 for name in names)


async def test_a_publisher_that_is_not_entered_refuses_quotes():
    async with serving() as (client, _):
        with pytest.raises(RuntimeError, match="async with"):
            await client.publish_quotes("nyse").send(quotes())


# Coming back.


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.CANCELLED, Code.INTERNAL])
async def test_what_is_not_accepted_is_sent_again_in_order_and_nothing_else(code):
    async def cut(requests, context):
        await anext(requests)
        yield WELCOME
        for _ in range(4):
            await anext(requests)
        yield Response(accepted_through=2)
        await context.abort(code)

    again = takes(2, first=Response(accepted_through=2, next_batch=3), accepts=4)
    async with serving(cut, again) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            for count in (1, 2, 3, 4):
                await publisher.send(quotes(count))
    assert server.requests[1][0] == pb.PublishQuotesRequest(feed="nyse")
    assert server.requests[1][1:] == server.requests[0][3:]
    assert batches(server.requests[1]) == [3, 4]
    assert publisher.reconnects == 1


async def test_what_was_accepted_unheard_is_not_sent_again():
    again = takes(1, first=Response(accepted_through=2, next_batch=3), accepts=3)
    async with serving(takes(3, then=ends), again) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            for _ in range(3):
                await publisher.send(quotes())
    assert batches(server.requests[1]) == [3]


async def test_numbers_go_on_after_a_reconnect():
    again = takes(1, first=Response(accepted_through=1, next_batch=2), accepts=2)
    async with serving(takes(1, accepts=1, then=ends), again) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            await until(lambda: publisher.reconnects)
            assert await publisher.send(quotes()) == 2
    assert batches(server.requests[1]) == [2]


async def test_quotes_sent_while_disconnected_follow_those_sent_again():
    async with serving(takes(1, then=ends), takes(3, accepts=3)) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            await until(lambda: publisher.reconnects)
            assert await publisher.send(quotes()) == 2
            await until(lambda: batches(server.requests[-1]) == [1, 2])
            assert await publisher.send(quotes()) == 3
    assert batches(server.requests[1]) == [1, 2, 3]


# A bus that has lost what it had accepted.


def told(count, **progress):
    """Return a script that reads `count` batches, tells a progress, and ends."""

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        for _ in range(count):
            await anext(requests)
        yield Response(**progress)

    return script


async def published_over(*scripts):
    """Publish 4 batches over several connections; return it, and what each was sent."""
    async with serving(*scripts) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            for _ in range(4):
                await publisher.send(quotes())
            await until(lambda: len(server.requests) == len(scripts))
            await until(lambda: batches(server.requests[-1])[-1:] == [4])
    return publisher, [batches(requests) for requests in server.requests]


async def test_what_the_bus_has_lost_is_sent_again_unless_it_is_durable():
    again = takes(2, first=Response(accepted_through=1, next_batch=2), accepts=4)
    publisher, sent = await published_over(
        told(4, accepted_through=4, durable_through=2), again
    )
    assert sent == [[1, 2, 3, 4], [3, 4]]
    assert publisher.lost == 0


async def test_what_the_bus_has_lost_is_not_accepted_until_it_is_again():
    go_on = asyncio.Event()

    async def again(requests, context):
        await anext(requests)
        yield Response(accepted_through=1, next_batch=2)
        await go_on.wait()
        yield Response(accepted_through=4)
        await silence()

    async with serving(told(4, accepted_through=4), again) as (client, _):
        async with client.publish_quotes("nyse") as publisher:
            for _ in range(4):
                await publisher.send(quotes())
            await publisher.flush()
            await until(lambda: publisher.accepted_through == 1)
            assert publisher.unaccepted == [2, 3, 4]
            flush = await waits(publisher.flush(), lambda: True)
            go_on.set()
            await flush


@pytest.mark.parametrize("bound", [{"MAX_KEPT_BATCHES": 1}, {"MAX_KEPT_BYTES": 40}])
async def test_what_the_bus_has_lost_and_is_not_kept_is_told_once(
    monkeypatch, caplog, bound
):
    for name, value in bound.items():
        monkeypatch.setattr(QuotePublisher, name, value)
    publisher, sent = await published_over(
        told(4, accepted_through=4),
        takes(1, first=Response(accepted_through=1, next_batch=2), then=ends),
        takes(1, first=Response(accepted_through=1, next_batch=2), accepts=4),
    )
    assert sent == [[1, 2, 3, 4], [4], [4]]
    assert publisher.lost == 2
    (warning,) = [text for text in caplog.messages if "lost" in text]
    assert "batches 2 to 3" in warning


async def test_what_is_not_kept_and_not_lost_is_not_told(monkeypatch):
    monkeypatch.setattr(QuotePublisher, "MAX_KEPT_BATCHES", 0)
    publisher, sent = await published_over(
        told(4, accepted_through=3, durable_through=1),
        takes(1, first=Response(accepted_through=3, next_batch=5), accepts=4),
    )
    assert sent == [[1, 2, 3, 4], [4]]
    assert publisher.lost == 0


async def test_send_does_not_wait_for_what_is_accepted_and_not_durable(monkeypatch):
    monkeypatch.setattr(QuotePublisher, "MAX_KEPT_BATCHES", 2)
    async with serving(accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            for _ in range(20):
                await publisher.send(quotes())
    assert batches(server.requests[0]) == list(range(1, 21))


# Progress.


async def test_flush_waits_until_everything_is_accepted():
    accept = asyncio.Event()

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        await anext(requests)
        await anext(requests)
        yield Response(accepted_through=1)
        await accept.wait()
        yield Response(accepted_through=2)
        await silence()

    async with serving(script) as (client, _):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            await publisher.send(quotes())
            flush = await waits(
                publisher.flush(), lambda: publisher.accepted_through == 1
            )
            accept.set()
            await flush
            assert publisher.accepted_through == 2


async def test_durable_waits_until_everything_is_committed():
    commit = asyncio.Event()

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        await anext(requests)
        yield Response(accepted_through=1)
        await commit.wait()
        yield Response(accepted_through=1, durable_through=1)
        await silence()

    async with serving(script) as (client, _):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            durable = await waits(
                publisher.durable(), lambda: publisher.accepted_through == 1
            )
            commit.set()
            await durable
            assert publisher.durable_through == 1


async def test_why_the_server_holds_the_feed_back_is_told():
    go_on = asyncio.Event()

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        await anext(requests)
        yield Response(hold=pb.HOLD_REASON_BUS_FULL)
        await go_on.wait()
        yield Response(accepted_through=1)
        await silence()

    async with serving(script) as (client, _):
        async with client.publish_quotes("nyse") as publisher:
            assert publisher.hold == pb.HOLD_REASON_UNSPECIFIED
            await publisher.send(quotes())
            await until(lambda: publisher.hold == pb.HOLD_REASON_BUS_FULL)
            go_on.set()
            await publisher.flush()
            assert publisher.hold == pb.HOLD_REASON_UNSPECIFIED


@pytest.mark.parametrize("bound", [{"MAX_BATCHES": 2}, {"MAX_BYTES": 40}])
async def test_send_waits_while_too_much_is_not_accepted(monkeypatch, bound):
    for name, value in bound.items():
        monkeypatch.setattr(QuotePublisher, name, value)
    accept = asyncio.Event()

    async def script(requests, context):
        await anext(requests)
        yield WELCOME
        await anext(requests)
        await anext(requests)
        await accept.wait()
        yield Response(accepted_through=1)
        await anext(requests)
        yield Response(accepted_through=3)

    async with serving(script) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
            await publisher.send(quotes())
            third = await waits(
                publisher.send(quotes()), lambda: len(server.requests[0]) == 3
            )
            accept.set()
            assert await third == 3


async def test_batches_beyond_the_bound_all_arrive(monkeypatch):
    monkeypatch.setattr(QuotePublisher, "MAX_BATCHES", 3)
    async with serving(accepts_all) as (client, server):
        async with client.publish_quotes("nyse") as publisher:
            for _ in range(100):
                await publisher.send(quotes())
    assert batches(server.requests[0]) == list(range(1, 101))


# Errors and the end.


@pytest.mark.parametrize(
    ("method", "arguments"), [("send", [quotes()]), ("flush", []), ("durable", [])]
)
async def test_an_error_is_raised_from_every_later_call(method, arguments):
    async with serving(refuses(1, Code.ABORTED, "FEED_REPLACED")) as (client, _):
        publisher = client.publish_quotes("nyse")
        with pytest.raises(grpc.RpcError) as caught:
            async with publisher:
                await publisher.send(quotes())
                with pytest.raises(grpc.RpcError):
                    await publisher.flush()
                await getattr(publisher, method)(*arguments)
    assert reason_of(caught.value) == "FEED_REPLACED"


async def test_an_error_is_raised_at_the_end_of_the_block():
    async with serving(refuses(1, Code.ABORTED, "FEED_REPLACED")) as (client, _):
        with pytest.raises(grpc.RpcError) as caught:
            async with client.publish_quotes("nyse") as publisher:
                await publisher.send(quotes())
    assert reason_of(caught.value) == "FEED_REPLACED"


async def test_an_error_names_the_batches_that_may_be_lost():
    async with serving(refuses(3, Code.ABORTED, "FEED_REPLACED")) as (client, _):
        with pytest.raises(grpc.RpcError) as caught:
            async with client.publish_quotes("nyse") as publisher:
                for _ in range(3):
                    await publisher.send(quotes())
    assert caught.value.__notes__ == [
        "batches 1 to 3 of feed nyse are not known to be accepted"
    ]
    assert publisher.unaccepted == [1, 2, 3]


async def test_a_refused_batch_tells_that_those_before_it_are_accepted():
    script = refuses(3, Code.INVALID_ARGUMENT, "INVALID_FIELD", batch="2")
    async with serving(script) as (client, _):
        with pytest.raises(grpc.RpcError):
            async with client.publish_quotes("nyse") as publisher:
                for _ in range(3):
                    await publisher.send(quotes())
    assert publisher.accepted_through == 1
    assert publisher.unaccepted == [2, 3]


async def test_a_publisher_that_waits_for_room_gets_the_error(monkeypatch):
    monkeypatch.setattr(QuotePublisher, "MAX_BATCHES", 1)
    async with serving(refuses(1, Code.ABORTED, "FEED_REPLACED")) as (client, _):
        with pytest.raises(grpc.RpcError):
            async with client.publish_quotes("nyse") as publisher:
                await publisher.send(quotes())
                await publisher.send(quotes())


async def test_the_end_of_the_block_waits_until_everything_is_accepted():
    async with serving(accepts_all) as (client, _):
        async with client.publish_quotes("nyse") as publisher:
            await publisher.send(quotes())
        assert publisher.accepted_through == 1


async def test_an_exception_in_the_block_does_not_wait():
    async with serving(takes(1)) as (client, _):
        with pytest.raises(KeyError):
            async with client.publish_quotes("nyse") as publisher:
                await publisher.send(quotes())
                raise KeyError


async def test_closing_the_client_ends_waiting():
    async with serving(takes(1)) as (client, _):
        with pytest.raises(RuntimeError, match="not open"):
            async with client.publish_quotes("nyse") as publisher:
                await publisher.send(quotes())
                waiting = asyncio.create_task(publisher.flush())
                await asyncio.sleep(0)
                await client.close()
                await asyncio.wait_for(waiting, 5)


async def test_no_task_outlives_the_block():
    async with serving(takes(1)) as (client, _):
        with pytest.raises(KeyError):
            async with client.publish_quotes("nyse") as publisher:
                await publisher.send(quotes())
                raise KeyError
        names = [repr(task.get_coro()) for task in asyncio.all_tasks()]
    assert not [name for name in names if "QuotePublisher" in name]
