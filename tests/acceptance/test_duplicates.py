"""Whatever is sent twice, or answered in vain, happens once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane.testing import FaultInjector
from quantplane_server.config import Settings
from quantplane_server.main import serving
from tests.conftest import Server
from tests.orders import (
    book,
    cancel,
    events,
    execution,
    fill,
    get,
    new_order,
    open_order,
    refused,
    submit,
    watching,
)

TRIES = 5  # of the client


@pytest.fixture
def faults(server: Server) -> Iterator[FaultInjector]:
    with FaultInjector(server.target) as injector:
        yield injector


@pytest.fixture
async def faulty(faults: FaultInjector) -> AsyncIterator[Client]:
    async with Client(faults.target) as client:
        yield client


async def orders(client: Client) -> list[pb.Order]:
    return list((await client.order.ListOrders(pb.ListOrdersRequest())).orders)


async def position(client: Client, symbol: str) -> float:
    listed = await client.portfolio.ListPositions(pb.ListPositionsRequest())
    return sum(p.quantity for p in listed.positions if p.symbol == symbol)


async def test_an_order_whose_answer_is_lost_is_made_once_and_its_caller_has_it(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.answer_unavailable("SubmitOrder", times=2)
    order = await submit(faulty, client_order_id="")
    assert faults.calls("SubmitOrder") == 3
    assert await orders(client) == [order]


async def test_an_order_that_is_delivered_twice_is_made_once(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.duplicate("SubmitOrder")
    order = await submit(faulty, client_order_id="")
    assert await orders(client) == [order]


async def test_a_strategy_that_has_given_up_finds_its_order_under_its_own_key(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.answer_unavailable("SubmitOrder", times=TRIES)
    new = new_order()
    code, _, _ = await refused(submit(faulty, new))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert await orders(client) == [await submit(faulty, new)]


async def test_the_key_of_an_order_whose_answer_is_lost_is_not_for_another_order(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.answer_unavailable("SubmitOrder", times=TRIES)
    await refused(submit(faulty, new_order(client_order_id="mine")))
    other = new_order(client_order_id="mine", quantity=11)
    code, reason, _ = await refused(submit(faulty, other))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert reason == "IDEMPOTENCY_KEY_REUSED"
    assert [order.quantity for order in await orders(client)] == [10]


async def test_a_batch_whose_answer_is_lost_is_made_once(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.answer_unavailable("SubmitOrders")
    new = [new_order(client_order_id="") for _ in range(3)]
    request = pb.SubmitOrdersRequest(orders=new)
    results = (await faulty.order.SubmitOrders(request)).results
    made = {order.order_id for order in await orders(client)}
    assert {result.order.order_id for result in results} == made
    assert len(made) == 3


async def test_a_signal_whose_answer_is_lost_is_published_once(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.answer_unavailable("PublishSignals")
    signal = pb.Signal(strategy_id="s", symbol="A", signal_type=pb.SIGNAL_TYPE_LONG)
    signal.time.GetCurrentTime()
    request = pb.PublishSignalsRequest(signals=[signal])
    published = (await faulty.signal.PublishSignals(request)).signals
    listed = await client.signal.ListSignals(pb.ListSignalsRequest())
    assert list(listed.signals) == list(published)


async def test_a_cancel_whose_answer_is_lost_is_asked_once(
    faults: FaultInjector, faulty: Client, client: Client
):
    order = await open_order(client)
    faults.answer_unavailable("CancelOrder", times=2)
    cancelled = await cancel(faulty, order)
    assert cancelled.version == order.version + 1
    assert await get(client, order) == cancelled


@pytest.mark.parametrize("fault", ["duplicate", "answer_unavailable"])
async def test_a_fill_that_is_reported_twice_counts_once(
    faults: FaultInjector, faulty: Client, client: Client, fault: str
):
    order = await open_order(client, quantity=10)
    getattr(faults, fault)("ReportExecutions")
    assert (await fill(faulty, order, 4)).filled_quantity == 4
    assert (await get(client, order)).filled_quantity == 4
    assert await position(client, order.symbol) == 4


async def test_fills_reported_at_once_to_two_servers_count_once(
    client: Client, settings: Settings
):
    order = await open_order(client, quantity=1_000)
    reports = [execution(order, 1) for _ in range(25)]
    async with serving(settings) as target, Client(target) as other:
        pairs = [(each, report) for report in reports for each in (client, other)]
        await asyncio.gather(*(book(each, report) for each, report in pairs))
    assert (await get(client, order)).filled_quantity == 25
    assert await position(client, order.symbol) == 25


async def test_of_two_orders_at_once_under_one_key_two_servers_make_one(
    client: Client, settings: Settings
):
    async with serving(settings) as target, Client(target) as other:

        async def race(key: str) -> list[str]:
            calls = [
                submit(each, client_order_id=key, quantity=quantity)
                for each, quantity in ((client, 1), (other, 2))
            ]
            made = await asyncio.gather(*calls, return_exceptions=True)
            return [reason_of(e) for e in made if isinstance(e, grpc.RpcError)]

        keys = [f"race {number}" for number in range(50)]
        refusals = await asyncio.gather(*map(race, keys))
    assert refusals == [["IDEMPOTENCY_KEY_REUSED"]] * 50
    made = Counter(order.client_order_id for order in await orders(client))
    assert made == Counter(keys)


async def test_events_watched_through_cuts_come_once_each_and_in_order(
    faults: FaultInjector, faulty: Client, client: Client
):
    faults.cut("WatchOrders", after=4, times=5)
    async with watching(faulty) as stream:
        seen = []
        for _ in range(20):
            order = await submit(client)
            seen += await events(stream, 1)
            assert seen[-1].order == order
    first = seen[0].revision
    assert [event.revision for event in seen] == list(range(first, first + 20))
    assert faults.calls("WatchOrders") == 6
