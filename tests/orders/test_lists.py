"""Reading orders, executions and where they came from."""

import uuid
from datetime import UTC, datetime

import asyncpg
import grpc

from quantplane import Client
from quantplane import v1 as pb
from tests.conftest import Server, both_editions
from tests.orders import (
    UNKNOWN_ID,
    book,
    execution,
    fill,
    get,
    open_order,
    refused,
    report,
    submit,
)
from tests.orders.test_submit import signal


async def listed(client: Client, **fields: object) -> list[pb.Order]:
    """Return the orders of all pages."""
    found: list[pb.Order] = []
    request = pb.ListOrdersRequest(page_size=2, **fields)  # type: ignore[arg-type]
    while True:
        page = await client.order.ListOrders(request)
        found += page.orders
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


@both_editions
async def test_orders_are_listed_the_latest_first_by_pages(client: Client):
    made = [await submit(client) for _ in range(5)]
    assert await listed(client) == made[::-1]


async def test_pages_do_not_shift_when_orders_are_added(client: Client):
    made = [await submit(client) for _ in range(4)]
    first = await client.order.ListOrders(pb.ListOrdersRequest(page_size=2))
    await submit(client)
    request = pb.ListOrdersRequest(page_size=2, page_token=first.next_page_token)
    second = await client.order.ListOrders(request)
    assert [*first.orders, *second.orders] == made[::-1]
    assert not second.next_page_token


async def test_orders_made_together_are_listed_once_each(client: Client):
    from tests.orders import new_order

    request = pb.SubmitOrdersRequest(orders=[new_order() for _ in range(7)])
    results = (await client.order.SubmitOrders(request)).results
    found = await listed(client)
    assert {order.order_id for order in found} == {r.order.order_id for r in results}
    assert len(found) == 7


async def test_orders_are_listed_by_what_they_are(client: Client):
    one = await submit(client, symbol="A", strategy_id="s")
    two = await open_order(client, symbol="B", strategy_id="t")
    three = await open_order(client, symbol="A", strategy_id="t")
    three = (await report(client, three, "CANCELLED")).order
    by = {
        "symbol": pb.OrderFilter(symbols=["A"]),
        "strategy": pb.OrderFilter(strategy_ids=["t"]),
        "both": pb.OrderFilter(strategy_ids=["t"], symbols=["A"]),
    }
    assert await listed(client, filter=by["symbol"]) == [three, one]
    assert await listed(client, filter=by["strategy"]) == [three, two]
    assert await listed(client, filter=by["both"]) == [three]
    open_ones = [pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN]
    assert await listed(client, statuses=open_ones) == [two, one]
    assert await listed(client, start_time=two.created_at) == [three, two]
    assert await listed(client, end_time=two.created_at) == [one]


async def test_orders_are_listed_by_their_signal(client: Client):
    made = await signal(client)
    await submit(client)
    mine = await submit(client, signal_id=made.signal_id)
    assert await listed(client, signal_id=made.signal_id) == [mine]


async def test_an_order_is_found_by_the_strategys_name_for_it(client: Client):
    order = await submit(client, client_order_id="mine")
    name = pb.ClientOrderId(strategy_id="s", client_order_id="mine")
    found = await client.order.GetOrder(pb.GetOrderRequest(client_order_id=name))
    assert found.order == order


async def test_an_order_that_is_not_there_is_told(client: Client):
    code, reason, metadata = await refused(get(client, pb.Order(order_id=UNKNOWN_ID)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ORDER")
    assert metadata["order_id"] == UNKNOWN_ID


@both_editions
async def test_an_order_stored_by_sql_is_an_order_like_others(
    server: Server, client: Client
):
    connection = await asyncpg.connect(server.settings.postgres_dsn)
    id = await connection.fetchval(
        "INSERT INTO orders (symbol, side, order_type, quantity, status)"
        " VALUES ('A', 'buy', 'market', 5, 'open') RETURNING order_id"
    )
    await connection.close()
    order = await get(client, pb.Order(order_id=str(id)))
    assert order.leaves_quantity == 5
    assert (await fill(client, order, 5)).status == pb.ORDER_STATUS_FILLED


async def test_executions_are_listed_the_latest_first_by_pages(client: Client):
    order = await open_order(client)
    times = [datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in (3, 1, 2)]
    for hour, time in enumerate(times):
        await fill(client, order, hour + 1, time=time)
    request = pb.ListExecutionsRequest(page_size=2)
    first = await client.order.ListExecutions(request)
    request.page_token = first.next_page_token
    second = await client.order.ListExecutions(request)
    found = [*first.executions, *second.executions]
    assert [each.quantity for each in found] == [1, 3, 2]
    assert not second.next_page_token


async def test_a_page_token_of_another_list_is_refused(client: Client):
    for _ in range(3):
        await submit(client)
    page = await client.order.ListOrders(pb.ListOrdersRequest(page_size=1))
    request = pb.ListExecutionsRequest(page_token=page.next_page_token)
    code, reason, _ = await refused(client.order.ListExecutions(request))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


async def test_lineage_goes_from_the_signal_to_the_position(client: Client):
    made = await signal(client)
    one = await open_order(client, signal_id=made.signal_id)
    two = await open_order(client, signal_id=made.signal_id, side=pb.SIDE_SELL)
    await fill(client, one, 10, 100, commission=1)
    await fill(client, two, 4, 103)
    by_signal = await client.order.GetLineage(
        pb.GetLineageRequest(signal_id=made.signal_id)
    )
    by_order = await client.order.GetLineage(
        pb.GetLineageRequest(order_id=two.order_id)
    )
    assert by_order == by_signal
    assert by_signal.signal.status == pb.SIGNAL_STATUS_EXECUTED
    ids = [order.order_id for order in by_signal.orders]
    assert ids == [one.order_id, two.order_id]
    bought, sold = by_signal.executions
    assert (bought.position_quantity, bought.realized_pnl) == (10, -1)
    assert (sold.position_quantity, sold.realized_pnl) == (6, 12)


async def test_lineage_of_an_order_without_a_signal(client: Client):
    order = await open_order(client)
    await book(client, execution(order, 1))
    request = pb.GetLineageRequest(order_id=order.order_id)
    lineage = await client.order.GetLineage(request)
    assert not lineage.HasField("signal")
    assert len(lineage.orders) == len(lineage.executions) == 1


async def test_lineage_of_what_is_not_there_is_refused(client: Client):
    unknown = str(uuid.uuid4())
    for field, reason in (
        ("signal_id", "UNKNOWN_SIGNAL"),
        ("order_id", "UNKNOWN_ORDER"),
    ):
        request = pb.GetLineageRequest(**{field: unknown})
        assert (await refused(client.order.GetLineage(request)))[1] == reason


async def test_the_state_machine_is_served(client: Client):
    response = await client.order.GetOrderLifecycle(pb.GetOrderLifecycleRequest())
    events = {row.event for row in response.transitions}
    assert events == set(pb.OrderEventType.values()) - {0}
