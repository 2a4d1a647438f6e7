"""Spans of streams: short ones, along the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, pairwise
from typing import Any

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane.publish import QuotePublisher
from quantplane.tracing import caused_by, context_of
from tests.admin.test_subscriptions import becomes, states
from tests.market_data import quote, until
from tests.orders import cancel, events, fill, submit, watching
from tests.paper.test_broker import broking
from tests.signals import publish, signal
from tests.telemetry.conftest import SECOND
from tests.telemetry.receiver import Receiver

METHOD = "MarketDataService/StreamQuotes"
PUBLISH = "MarketDataService/PublishQuotes"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuotePublisher, "TRACE_S", SECOND)


@asynccontextmanager
async def publishing(client: Client) -> AsyncIterator[None]:
    """Publish a quote of A every few ms."""

    async def publish() -> None:
        async with client.publish_quotes() as feed:
            for number in count():
                await feed.send([quote("A", number)])
                await asyncio.sleep(0.02)

    task = asyncio.create_task(publish())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def following(client: Client) -> Any:
    request = pb.StreamQuotesRequest(symbols=["A"])
    return client.follow(client.market_data.StreamQuotes, request)


# --- Quotes -------------------------------------------------------------------------


async def test_a_stream_of_quotes_is_told_along_its_way(
    client: Client, receiver: Receiver, tracer: Any
):
    async with publishing(client):
        with tracer.start_as_current_span("follow"):
            stream = following(client)
            await until(stream, "data")
        subscribe = await receiver.one(f"{METHOD} subscribe")
        async with stream:

            async def read() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.create_task(read())
            delivers = await receiver.some(f"{METHOD} deliver", 4)
        reading.cancel()
    summary = await receiver.one(f"{METHOD} summary")
    follow = await receiver.one("follow")
    assert subscribe.parent == follow.id
    assert subscribe.attributes["quantplane.symbol"] == "A"
    assert subscribe.attributes["rpc.response.status_code"] == "OK"
    starts = [span.span.start_time_unix_nano for span in delivers]
    for deliver in delivers:
        assert subscribe.id in deliver.links
        assert (deliver.parent, deliver.kind) == ("", "PRODUCER")
    assert len({span.trace for span in delivers}) == len(delivers)
    assert min(b - a for a, b in pairwise(starts)) > SECOND * 0.9e9
    assert (summary.parent, summary.links) == ("", [subscribe.id])
    assert summary.attributes["quantplane.messages"] >= 4
    assert summary.attributes["quantplane.conflated"] == 0
    assert summary.attributes["quantplane.seconds"] > 3 * SECOND
    assert summary.attributes["rpc.response.status_code"] == "CANCELLED"
    # None is as long as the stream.
    told = [span for span in receiver.spans if "StreamQuotes" in span.name]
    assert max(span.seconds for span in told) < 3 * SECOND


async def test_a_delivery_is_linked_to_what_the_feed_published(
    client: Client, receiver: Receiver, tracer: Any
):
    async with publishing(client), following(client) as stream:
        await until(stream, "data")

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())

        def linked() -> bool:
            published = {s.id for s in receiver.named(f"{PUBLISH} publish")}
            delivered = receiver.named(f"{METHOD} deliver")
            return any(published & set(span.links) for span in delivered)

        await receiver.until(linked, "link")
        reading.cancel()
    publish = (await receiver.some(f"{PUBLISH} publish", 1))[0]
    assert (publish.kind, publish.service) == ("PRODUCER", "strategy")
    assert publish.attributes["quantplane.quotes"] == 1
    (append,) = receiver.children(publish)
    assert append.name == "append quotes"
    assert [one.name for one in receiver.children(append)] == [
        "FCALL quantplane_append"
    ]


async def test_a_stream_that_is_refused_has_one_span(
    client: Client, receiver: Receiver
):
    request = pb.StreamQuotesRequest(symbols=[""])
    with pytest.raises(Exception, match="symbols"):
        await anext(client.follow(client.market_data.StreamQuotes, request))
    (span,) = await receiver.some(f"{METHOD} subscribe", 1)
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    await client.auth.WhoAmI(pb.WhoAmIRequest())
    await receiver.one("AuthService/WhoAmI")
    assert not receiver.named(f"{METHOD} summary")


async def test_what_a_stream_does_later_belongs_to_no_call(
    client: Client, receiver: Receiver
):
    async with publishing(client), following(client) as stream:
        await until(stream, "data")
        subscribe = await receiver.one(f"{METHOD} subscribe")
        await receiver.some(f"{METHOD} deliver", 2)
        for _ in range(20):
            await anext(stream)
    await receiver.one(f"{METHOD} summary")
    end = subscribe.span.end_time_unix_nano
    below = receiver.children(subscribe)
    assert all(span.span.start_time_unix_nano <= end for span in below)
    assert not [span for span in receiver.spans if "XREAD" in span.name]


async def test_a_stream_of_state_is_told_along_its_way(
    client: Client, receiver: Receiver
):
    request = pb.WatchPortfolioRequest()
    name = "PortfolioService/WatchPortfolio"
    async with client.follow(client.portfolio.WatchPortfolio, request) as stream:
        await until(stream, "snapshot_complete")
        order = await submit(client)
        await fill(client, order, 1)
        await until(stream, "data")
    subscribe = await receiver.one(f"{name} subscribe")
    deliver = await receiver.one(f"{name} deliver")
    summary = await receiver.one(f"{name} summary")
    assert deliver.links == summary.links == [subscribe.id]


# --- Events -------------------------------------------------------------------------


async def traded(stream: Any) -> pb.OrderEvent:
    """Return the event of the next fill."""
    while True:
        for event in (await anext(stream)).events:
            if event.type == pb.ORDER_EVENT_TYPE_TRADE:
                return event


async def test_an_order_is_one_trace_from_the_decision_to_the_news_of_its_fill(
    client: Client, target: str, receiver: Receiver, tracer: Any
):
    async with broking(target), client.publish_quotes() as feed, watching(client) as w:
        # An order of its snapshot would be of no trace to the broker.
        await becomes(client, "WatchBrokerCommands", states("LIVE"))
        await feed.send([quote("A", 100, ask_size=50)])
        await feed.flush()
        with tracer.start_as_current_span("decide"):
            order = await submit(client, quantity=1, price=1_000)
        event = await traded(w)
    decide = await receiver.one("decide")
    trace = decide.trace
    assert (order.trace_id, event.trace_id) == (trace, trace)
    served = await receiver.one("OrderService/SubmitOrder", kind="SERVER", trace=trace)
    booked = await receiver.one(
        "BrokerService/ReportExecutions", kind="SERVER", trace=trace
    )
    # The order goes to the broker,
    command = await receiver.one("WatchBrokerCommands deliver", trace=trace)
    assert command.parent == served.id
    # whose report of the fill is made in the trace of the order,
    report = await receiver.one(
        "BrokerService/ReportExecutions", kind="CLIENT", trace=trace
    )
    assert (booked.parent, report.parent) == (report.id, served.id)
    assert "write orders" in [one.name for one in receiver.children(booked)]
    # and so is its way to whoever watches.
    assert event.span_id == booked.id
    delivered = await receiver.one("WatchOrders deliver", parent=booked.id)
    assert (delivered.trace, delivered.kind) == (trace, "PRODUCER")
    assert 0 <= delivered.attributes["quantplane.age_ms"] < 60_000


async def test_what_is_done_about_an_event_can_be_in_its_trace(
    client: Client, receiver: Receiver, tracer: Any
):
    async with watching(client) as stream:
        order = await submit(client)
        (event,) = await events(stream, 1)
        with caused_by([event]):
            await cancel(client, order)
        with tracer.start_as_current_span("note", context_of(event)):
            pass
    note = await receiver.one("note", parent=event.span_id)
    called = await receiver.one("OrderService/CancelOrder", kind="CLIENT")
    assert called.trace == note.trace == event.trace_id
    assert called.parent == event.span_id


async def test_a_call_about_several_traces_is_linked_to_them(
    client: Client, receiver: Receiver, tracer: Any
):
    async with watching(client) as stream:
        orders = [await submit(client) for _ in range(3)]
        told = await events(stream, 3)
        with caused_by(told):
            await cancel(client, orders[0])
    together = await receiver.one("caused by several")
    called = await receiver.one("OrderService/CancelOrder", kind="CLIENT")
    assert together.links == [event.span_id for event in told]
    assert (called.parent, together.parent) == (together.id, "")


async def test_an_event_of_a_call_that_is_not_sampled_has_no_span(
    client: Client, receiver: Receiver
):
    trace = "0af7651916cd43dd8448eb211c80319c"
    header = ("traceparent", f"00-{trace}-b7ad6b7169203331-00")
    async with watching(client) as stream:
        order = await submit(client)
        request = pb.CancelOrderRequest(order_id=order.order_id)
        await client.order.CancelOrder(request, metadata=(header,))
        _, event = await events(stream, 2)
    assert (event.trace_id, event.span_id) == (trace, "")
    await receiver.one("OrderService/WatchOrders summary")
    assert len(receiver.named("WatchOrders deliver")) == 1


async def test_signals_are_delivered_in_the_trace_of_their_publication(
    client: Client, receiver: Receiver
):
    request = pb.WatchSignalsRequest()
    async with client.follow(client.signal.WatchSignals, request) as stream:
        await until(stream, "snapshot_complete")
        await publish(client, signal())
        await until(stream, "data")
    served = await receiver.one("SignalService/PublishSignals")
    delivered = await receiver.one("WatchSignals deliver")
    assert (delivered.trace, delivered.parent) == (served.trace, served.id)


async def test_a_signal_is_executed_in_the_trace_of_the_fill(
    client: Client, receiver: Receiver
):
    (made,) = await publish(client, signal())
    order = await submit(client, signal_id=made.signal_id)
    request = pb.WatchSignalsRequest()
    async with client.follow(client.signal.WatchSignals, request) as stream:
        await until(stream, "snapshot_complete")
        await fill(client, order, 1)
        (event,) = (await until(stream, "data")).events
    booked = await receiver.one("BrokerService/ReportExecutions")
    assert event.type == pb.SIGNAL_EVENT_TYPE_EXECUTED
    assert (event.trace_id, event.span_id) == (booked.trace, booked.id)
    assert event.actor == "server"  # and in no user's name


async def test_a_stream_without_a_response_has_a_short_span_too(
    client: Client, receiver: Receiver
):
    call = client.market_data.PublishBars()
    name = "MarketDataService/PublishBars"
    subscribe = await receiver.one(f"{name} subscribe")
    assert SECOND * 0.9 < subscribe.seconds
    assert "rpc.response.status_code" not in subscribe.attributes
    call.cancel()
    summary = await receiver.one(f"{name} summary")
    assert summary.links == [subscribe.id]
