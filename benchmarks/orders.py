"""What an order costs: one alone, in milliseconds; many at once, in orders a second."""

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import asyncpg
import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from benchmarks import bare
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Sample
from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import OPTIONS
from quantplane.ids import new_id
from quantplane_server import log as logs
from quantplane_server.orders import lifecycle, queries
from quantplane_server.orders.queries import Key

ORDERS = 400  # one at a time
WARM_UP = 50  # that are not counted
MANY = 4_000  # in flight at once, as many as IN_FLIGHT
IN_FLIGHT = 32


# --- One alone ----------------------------------------------------------------------


async def vs_floor(bench: Bench) -> Figure:
    """Compare a durable SubmitOrder with a call of a bare server and an INSERT."""
    return await _compare(bench, submit_one_by_one)


async def report_vs_floor(bench: Bench) -> Figure:
    """Compare a fill's way, from its report to a watcher, with the same floor."""
    return await _compare(bench, report_one_by_one)


async def _compare(bench: Bench, ours: Any) -> Figure:
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "ms",
            lambda: _timed(bench, ours, target=target),
            lambda: _floor(bench),
            rounds=5,
        )


async def _timed(bench: Bench, function: Any, **arguments: Any) -> Sample:
    async with bench.child(function, **arguments) as child:
        ms = (await child.hear())["ms"]
    return {"value": median(ms), "p99": quantiles(ms, n=100)[98]}


async def _floor(bench: Bench) -> Sample:
    async with bench.child(bare.serve) as server:
        target = (await server.hear())["target"]
        return await _timed(bench, call_and_insert, target=target, dsn=bench.dsn)


async def submit_one_by_one(parent: Parent, target: str) -> None:
    ms = []
    async with Client(target) as client:
        for _ in range(ORDERS + WARM_UP):
            request = pb.SubmitOrderRequest(order=new_order())
            began = perf_counter()
            await client.order.SubmitOrder(request)
            ms.append((perf_counter() - began) * 1e3)
    parent.say(ms=ms[WARM_UP:])


async def report_one_by_one(parent: Parent, target: str) -> None:
    ms = []
    request = pb.WatchOrdersRequest()
    async with (
        Client(target) as client,
        client.follow(client.order.WatchOrders, request) as watched,
    ):
        async for response in watched:
            if response.event.HasField("snapshot_complete"):
                break
        for _ in range(ORDERS + WARM_UP):
            submit = pb.SubmitOrderRequest(order=new_order())
            order = (await client.order.SubmitOrder(submit)).order
            await anext(watched)
            fill = pb.ExecutionReport(
                order_id=order.order_id, broker_exec_id="1", symbol=order.symbol,
                side=order.side, quantity=order.quantity, price=order.price,
            )  # fmt: skip
            fill.time.GetCurrentTime()
            report = pb.ReportExecutionsRequest(reports=[fill])
            began = perf_counter()
            call = asyncio.ensure_future(client.broker.ReportExecutions(report))
            await anext(watched)
            ms.append((perf_counter() - began) * 1e3)
            await call
    parent.say(ms=ms[WARM_UP:])


async def call_and_insert(parent: Parent, target: str, dsn: str) -> None:
    """Call the bare server, then INSERT an order and commit; say the ms of both."""
    body = new_order().SerializeToString()
    ms = []
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS floor_orders (LIKE orders INCLUDING ALL)"
    )
    async with grpc.aio.insecure_channel(target, OPTIONS) as channel:
        call = channel.unary_unary(bare.ECHO)
        for _ in range(ORDERS + WARM_UP):
            began = perf_counter()
            await call(body)
            await connection.execute(
                "INSERT INTO floor_orders (strategy_id, client_order_id, symbol, side,"
                " order_type, quantity, price)"
                " VALUES ('s', $1, 'SPY', 'buy', 'limit', 100, 500)",
                new_id(),
            )
            ms.append((perf_counter() - began) * 1e3)
    await connection.close()
    parent.say(ms=ms[WARM_UP:])


def new_order() -> pb.NewOrder:
    return pb.NewOrder(
        client_order_id=new_id(), strategy_id="s", symbol="SPY", side=pb.SIDE_BUY,
        order_type=pb.ORDER_TYPE_LIMIT, quantity=100, price=500,
    )  # fmt: skip


# --- Many at once -------------------------------------------------------------------


async def vs_transaction(bench: Bench) -> Figure:
    """Compare orders in flight at once with bare transactions that do the same."""
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "orders/s",
            lambda: _rate(bench, submit_many, target=target, in_flight=IN_FLIGHT),
            lambda: _rate(bench, transact, dsn=bench.dsn),
        )


async def coalesced_vs_single(bench: Bench) -> Figure:
    """Compare orders in flight at once with one at a time."""
    async with bench.server() as (target, _):
        return await bench.in_turns(
            "orders/s",
            lambda: _rate(bench, submit_many, target=target, in_flight=IN_FLIGHT),
            lambda: _rate(bench, submit_many, target=target, in_flight=1),
        )


async def _rate(bench: Bench, function: Any, **arguments: Any) -> Sample:
    async with bench.child(function, **arguments) as child:
        return {"value": (await child.hear())["per_s"]}


async def submit_many(parent: Parent, target: str, in_flight: int) -> None:
    count = MANY if in_flight > 1 else ORDERS
    left = [pb.SubmitOrderRequest(order=new_order()) for _ in range(count)]

    async def submit() -> None:
        while left:
            await client.order.SubmitOrder(left.pop())

    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(target))
        await client.order.SubmitOrder(left[0])  # connected
        began = perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(submit())
        parent.say(per_s=count / (perf_counter() - began))


async def transact(parent: Parent, dsn: str) -> None:
    """Do what a new order needs of the database, one order a transaction."""
    connection = await asyncpg.connect(dsn)
    at = Timestamp()
    at.GetCurrentTime()
    began = perf_counter()
    for _ in range(ORDERS):
        new = new_order()
        now = datetime.now(UTC)
        order = lifecycle.created(new, new_id(), at, "")
        order.created_at.FromDatetime(now)
        key = Key("s", new.client_order_id, order.order_id, now, b"hash")
        event = pb.OrderEvent(type=pb.ORDER_EVENT_TYPE_CREATED, order=order)
        payload = event.SerializeToString()
        async with connection.transaction():
            entry = logs.Event("CREATED", order.order_id, payload)
            await queries.store(connection, [key], [order], [entry])
    parent.say(per_s=ORDERS / (perf_counter() - began))
    await connection.close()
