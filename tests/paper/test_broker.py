"""The paper broker at a real server."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from quantplane_server.paper import broker
from quantplane_server.paper.book import Commission, Report
from quantplane_server.paper.broker import Session, Terms
from quantplane_server.paper.outbox import Outbox, sendable
from tests.conftest import Server
from tests.paper import START_NS, SYMBOL, quote

FREE = Terms(Commission())
GTC = pb.TIME_IN_FORCE_GTC


@asynccontextmanager
async def broking(target: str, terms: Terms = FREE) -> AsyncIterator[None]:
    task = asyncio.create_task(broker.run(target, terms))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Orders:
    """Submits orders, and reads what becomes of them."""

    def __init__(self, client: Client, events: AsyncIterator[pb.OrderEvent]) -> None:
        self._client = client
        self._events = events

    async def submit(self, **fields: Any) -> pb.Order:
        """Submit a market order to buy 10, or what the fields say."""
        given = {
            "client_order_id": str(uuid4()),
            "strategy_id": "test",
            "symbol": SYMBOL,
            "side": pb.SIDE_BUY,
            "order_type": pb.ORDER_TYPE_MARKET,
            "quantity": 10.0,
        }
        request = pb.SubmitOrderRequest(order=pb.NewOrder(**given | fields))
        return (await self._client.order.SubmitOrder(request)).order

    async def until(self, kind: str) -> pb.OrderEvent:
        """Return the next event of a kind."""
        async for event in self._events:
            if name(event) == kind:
                return event
        raise AssertionError(f"the stream ended before {kind}")

    async def kinds(self, last: str) -> list[str]:
        """Return the kinds of the next events, through `last`."""
        found: list[str] = []
        async for event in self._events:
            found.append(name(event))
            if found[-1] == last:
                break
        return found


def name(event: pb.OrderEvent) -> str:
    return pb.OrderEventType.Name(event.type).removeprefix("ORDER_EVENT_TYPE_")


@asynccontextmanager
async def watching(client: Client) -> AsyncIterator[Orders]:
    """Follow all orders from here on."""
    request = pb.WatchOrdersRequest()
    async with client.follow(client.order.WatchOrders, request) as responses:
        async for response in responses:
            if response.event.HasField("snapshot_complete"):
                break

        async def events() -> AsyncIterator[pb.OrderEvent]:
            async for response in responses:
                for event in response.events:
                    yield event

        async with aclosing(events()) as following:
            yield Orders(client, following)


@pytest.fixture
async def orders(client: Client) -> AsyncIterator[Orders]:
    async with asyncio.timeout(60), watching(client) as orders:
        yield orders


async def show(client: Client, *quotes: pb.Quote) -> None:
    async with client.publish_quotes() as publisher:
        await publisher.send(quotes)


async def test_an_order_is_submitted_acknowledged_and_filled_at_the_latest_quote(
    server: Server, client: Client, orders: Orders
):
    await show(client, quote(1, 99, 101))
    async with broking(server.target, Terms(Commission(bps=5), latency_s=0.01)):
        order = await orders.submit()
        told = await orders.kinds("ACKNOWLEDGED")
        fill = await orders.until("TRADE")
    assert told == ["CREATED", "SUBMITTED", "ACKNOWLEDGED"]
    assert fill.order.order_id == order.order_id
    assert fill.order.status == pb.ORDER_STATUS_FILLED
    assert fill.execution.broker_exec_id == f"1@{START_NS + 1_000}"
    assert (fill.execution.price, fill.execution.commission) == (101, 10 * 101 * 5e-4)


async def test_an_order_fills_once_there_is_a_quote(
    server: Server, client: Client, orders: Orders
):
    async with broking(server.target):
        await orders.submit(side=pb.SIDE_SELL)
        await orders.until("ACKNOWLEDGED")
        await show(client, quote(1, 99, 101))
        fill = await orders.until("TRADE")
    assert (fill.execution.price, fill.execution.quantity) == (99, 10)


async def test_orders_in_several_symbols_fill_at_their_own_quotes(
    server: Server, client: Client, orders: Orders
):
    other = quote(1, 9, 11)
    other.symbol = "B"
    async with broking(server.target):
        await orders.submit()
        await orders.until("ACKNOWLEDGED")
        await show(client, quote(1, 99, 101))
        first = await orders.until("TRADE")
        await show(client, other)
        await orders.submit(symbol="B")
        second = await orders.until("TRADE")
    assert (first.execution.price, second.execution.price) == (101, 11)


async def test_a_broker_that_starts_works_what_was_submitted_before(
    server: Server, client: Client, orders: Orders
):
    await show(client, quote(1, 99, 101))
    await orders.submit()
    async with broking(server.target):
        told = await orders.kinds("TRADE")
    assert told == ["CREATED", "SUBMITTED", "ACKNOWLEDGED", "TRADE"]


async def test_a_broker_that_is_started_again_goes_on_with_what_is_left(
    server: Server, client: Client, orders: Orders
):
    async with broking(server.target):
        await show(client, quote(1, 99, 101, ask_size=4))
        await orders.submit()
        assert (await orders.until("TRADE")).execution.quantity == 4
    await show(client, quote(2, 99, 102, ask_size=40))
    async with broking(server.target):
        event = await orders.until("TRADE")
    assert event.order.status == pb.ORDER_STATUS_FILLED
    assert event.execution.quantity == 6
    assert event.execution.broker_exec_id == f"2@{START_NS + 2_000}"


async def test_an_order_can_be_replaced_and_cancelled(
    server: Server, client: Client, orders: Orders
):
    limit = {"order_type": pb.ORDER_TYPE_LIMIT, "price": 90.0, "time_in_force": GTC}
    await show(client, quote(1, 99, 101))
    async with broking(server.target):
        order = await orders.submit(**limit)
        await orders.until("ACKNOWLEDGED")
        replace = pb.ReplaceOrderRequest(order_id=order.order_id, price=95.0)
        await client.order.ReplaceOrder(replace)
        replaced = await orders.until("REPLACED")
        cancel = pb.CancelOrderRequest(order_id=order.order_id)
        await client.order.CancelOrder(cancel)
        cancelled = await orders.until("CANCELLED")
    assert replaced.order.price == 95
    assert not replaced.order.pending_request
    assert cancelled.order.status == pb.ORDER_STATUS_CANCELLED


async def test_a_broker_of_some_symbols_leaves_the_others_alone(
    server: Server, client: Client, orders: Orders
):
    async with broking(server.target, FREE._replace(symbols=["B"])):
        await orders.submit(symbol="A")
        order = await orders.submit(symbol="B")
        taken = await orders.until("SUBMITTED")
    assert taken.order.order_id == order.order_id


async def test_beyond_the_bound_only_symbols_with_orders_are_followed(
    server: Server,
    client: Client,
    orders: Orders,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(broker, "MAX_SYMBOLS", 1)
    async with broking(server.target):
        first = await orders.submit(symbol="B")
        await orders.until("ACKNOWLEDGED")
        await orders.submit(symbol="A")
        rejected = await orders.until("REJECTED")
        await client.order.CancelOrder(pb.CancelOrderRequest(order_id=first.order_id))
        await orders.until("CANCELLED")
        await orders.submit(symbol="A")
        await orders.until("ACKNOWLEDGED")
        await show(client, quote(1, 99, 101))
        await orders.until("TRADE")
    assert rejected.order.reject_code == "TOO_MANY_SYMBOLS"


async def test_reports_wait_for_a_server_that_is_away(settings: Settings):
    async with recording(settings), AsyncExitStack() as stack:
        async with serving(settings) as target:
            client = await stack.enter_async_context(Client(target))
            orders = await stack.enter_async_context(watching(client))
            await stack.enter_async_context(broking(target))
            await orders.submit()
            await orders.until("ACKNOWLEDGED")
        async with serving(settings.model_copy(update={"listen": target})):
            await show(client, quote(1, 99, 101))
            fill = await orders.until("TRADE")
            await orders.submit()
            again = await orders.until("TRADE")
    assert fill.order.order_id != again.order.order_id


async def test_a_broker_that_missed_commands_begins_anew(settings: Settings):
    async with recording(settings), AsyncExitStack() as stack:
        async with serving(settings) as target:
            async with Client(target) as client, watching(client) as orders:
                await show(client, quote(1, 99, 101))
                await stack.enter_async_context(broking(target))
                await orders.submit()
                await orders.until("TRADE")
        async with serving(settings) as elsewhere, Client(elsewhere) as client:
            async with watching(client) as orders:
                missed = await orders.submit(quantity=3)
                await orders.until("CREATED")
        await trimmed(settings)
        async with serving(settings.model_copy(update={"listen": target})):
            async with Client(target) as client, asyncio.timeout(60):
                request = pb.WatchPortfolioRequest()
                watch = client.portfolio.WatchPortfolio
                async for response in client.follow(watch, request):
                    if response.positions and response.positions[0].quantity == 13:
                        break
                get = pb.GetOrderRequest(order_id=missed.order_id)
                found = (await client.order.GetOrder(get)).order
    assert found.status == pb.ORDER_STATUS_FILLED


async def test_a_session_ends_where_commands_were_missed(settings: Settings):
    async with recording(settings), AsyncExitStack() as stack:
        async with serving(settings) as target:
            client = await stack.enter_async_context(Client(target))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            outbox = Outbox(client)
            reporting = group.create_task(outbox.run())
            session = group.create_task(Session(client, outbox, group, FREE).run())
            async with watching(client) as orders:
                await orders.submit()
                await orders.until("ACKNOWLEDGED")
        async with serving(settings) as elsewhere, Client(elsewhere) as other:
            async with watching(other) as orders:
                await orders.submit()
                await orders.until("CREATED")
        await trimmed(settings)
        async with serving(settings.model_copy(update={"listen": target})):
            async with asyncio.timeout(30):
                await session
            reporting.cancel()


async def trimmed(settings: Settings) -> None:
    """Delete all of the log of orders."""
    conn = await asyncpg.connect(settings.postgres_dsn)
    await conn.execute("DELETE FROM event_log WHERE log = 'orders'")
    await conn.close()


async def test_a_report_that_is_refused_is_one_line_of_the_log(
    client: Client, caplog: pytest.LogCaptureFixture
):
    outbox = Outbox(client)
    task = asyncio.create_task(outbox.run())
    unknown = str(uuid4())
    with caplog.at_level(logging.WARNING):
        outbox.add([pb.OrderReport(order_id=unknown, type=SUBMITTED)])
        await outbox.empty()
    task.cancel()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"SUBMITTED of {unknown} was refused: ")


# --- the order of reports -----------------------------------------------------

SUBMITTED = pb.ORDER_EVENT_TYPE_SUBMITTED


def numbers(text: str, kind: type[Report]) -> list[int]:
    """Return what is sendable of "o1 x1 o2": a report of order 1, a fill of it, ..."""
    kinds = {"o": pb.OrderReport, "x": pb.ExecutionReport}
    reports = [kinds[word[0]](order_id=word[1:]) for word in text.split()]
    return sendable(dict(enumerate(reports)), kind)


def test_an_orders_reports_stay_in_order():
    assert numbers("o1 x1 o1 o2", pb.OrderReport) == [0, 3]
    assert numbers("x1 o1 x2", pb.ExecutionReport) == [0, 2]


def test_no_fill_overtakes_another():
    assert numbers("x1 o2 x2 x3", pb.ExecutionReport) == [0]


def test_a_call_takes_a_thousand_reports():
    assert len(numbers("x1 " * 1_001, pb.ExecutionReport)) == 1_000
