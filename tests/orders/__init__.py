"""Short ways to say what strategies and gateways do."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import grpc
import pytest

from quantplane import Client, metadata_of, reason_of
from quantplane import v1 as pb

ids = count(1)

BUY, SELL = pb.SIDE_BUY, pb.SIDE_SELL
MARKET, LIMIT = pb.ORDER_TYPE_MARKET, pb.ORDER_TYPE_LIMIT
STOP, STOP_LIMIT = pb.ORDER_TYPE_STOP, pb.ORDER_TYPE_STOP_LIMIT
UNKNOWN_ID = "00000000-0000-7000-8000-000000000000"


def new_order(symbol: str = "A", quantity: float = 10, **fields: Any) -> pb.NewOrder:
    """Return a limit order to buy at 100, unless told else."""
    fields = {
        "client_order_id": f"c{next(ids)}",
        "strategy_id": "s",
        "side": BUY,
        "order_type": LIMIT,
    } | fields
    if fields["order_type"] in (LIMIT, STOP_LIMIT):
        fields.setdefault("price", 100)
    return pb.NewOrder(symbol=symbol, quantity=quantity, **fields)


async def submit(
    client: Client, order: pb.NewOrder | None = None, **fields: Any
) -> Any:
    """Submit an order; return it."""
    request = pb.SubmitOrderRequest(order=order or new_order(**fields))
    return (await client.order.SubmitOrder(request)).order


async def get(client: Client, order: pb.Order) -> pb.Order:
    request = pb.GetOrderRequest(order_id=order.order_id)
    return (await client.order.GetOrder(request)).order


async def cancel(client: Client, order: pb.Order, **fields: Any) -> pb.Order:
    request = pb.CancelOrderRequest(order_id=order.order_id, **fields)
    return (await client.order.CancelOrder(request)).order


async def replace(client: Client, order: pb.Order, **fields: Any) -> pb.Order:
    request = pb.ReplaceOrderRequest(order_id=order.order_id, **fields)
    return (await client.order.ReplaceOrder(request)).order


async def report(
    client: Client, order: pb.Order | str, event: str, **fields: Any
) -> pb.OrderResult:
    """Report an event by its name: "ACKNOWLEDGED"."""
    kind = pb.OrderEventType.Value(f"ORDER_EVENT_TYPE_{event}")
    if event == "ACKNOWLEDGED":
        fields.setdefault("broker_order_id", "b")
    order_id = order if isinstance(order, str) else order.order_id
    message = pb.OrderReport(order_id=order_id, type=kind, **fields)
    request = pb.ReportOrderEventsRequest(reports=[message])
    (result,) = (await client.broker.ReportOrderEvents(request)).results
    return result


def execution(
    order: pb.Order, quantity: float, price: float = 100, **fields: Any
) -> pb.ExecutionReport:
    fields = {
        "order_id": order.order_id,
        "broker_exec_id": f"x{next(ids)}",
        "symbol": order.symbol,
        "side": order.side,
    } | fields
    message = pb.ExecutionReport(quantity=quantity, price=price, **fields)
    if not message.HasField("time"):
        message.time.GetCurrentTime()
    return message


async def book(client: Client, *reports: pb.ExecutionReport) -> list[pb.OrderResult]:
    request = pb.ReportExecutionsRequest(reports=reports)
    return list((await client.broker.ReportExecutions(request)).results)


async def fill(
    client: Client, order: pb.Order, quantity: float, price: float = 100, **fields: Any
) -> pb.Order:
    """Report a fill; return the order after it."""
    (result,) = await book(client, execution(order, quantity, price, **fields))
    assert not result.reason, result.message
    return result.order


async def open_order(client: Client, **fields: Any) -> pb.Order:
    """Submit an order that its broker acknowledges; return it."""
    order = await submit(client, **fields)
    return (await report(client, order, "ACKNOWLEDGED")).order


async def refused(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return how a call is refused: code, reason, metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(raised.value), metadata_of(raised.value)


@asynccontextmanager
async def watching(client: Client, **fields: Any) -> AsyncIterator[Any]:
    """Follow WatchOrders, from when its snapshot is complete."""
    request = pb.WatchOrdersRequest(**fields)
    async with client.follow(client.order.WatchOrders, request) as stream:
        async for response in stream:
            if response.event.HasField("snapshot_complete"):
                break
        yield stream


async def events(stream: Any, count: int) -> list[pb.OrderEvent]:
    """Return the next events of a stream, so many at least."""
    found: list[pb.OrderEvent] = []
    while len(found) < count:
        found += (await anext(stream)).events
    return found
