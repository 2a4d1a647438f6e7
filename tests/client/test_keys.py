import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from uuid import RFC_4122, UUID

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from quantplane import Client, ids
from quantplane import v1 as pb
from quantplane.client import services
from quantplane.ids import new_id
from quantplane.keys import with_keys
from quantplane.sync import Client as SyncClient
from tests.client import refuse

ORDER = pb.NewOrder(strategy_id="s", symbol="ES", quantity=1)


class Orders(pb.OrderServiceServicer):
    """Is away for the first calls, then answers; `requests` are all that came in."""

    def __init__(self, away: int) -> None:
        self._away = away
        self.requests = []

    async def SubmitOrder(self, request, context):
        self.requests.append(request)
        if len(self.requests) <= self._away:
            await refuse(context, grpc.StatusCode.UNAVAILABLE)
        return pb.SubmitOrderResponse(
            order=pb.Order(client_order_id=request.order.client_order_id)
        )

    async def CancelOrder(self, request, context):
        self.requests.append(request)
        return pb.CancelOrderResponse()


@pytest.fixture
async def orders(request):
    server = grpc.aio.server()
    orders = Orders(away=getattr(request, "param", 0))
    pb.add_OrderServiceServicer_to_server(orders, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}") as orders.client:
        yield orders
    await server.stop(None)


@pytest.mark.parametrize("orders", [2], indirect=True)
async def test_every_try_of_a_call_carries_the_same_new_key(orders):
    response = await orders.client.order.SubmitOrder(pb.SubmitOrderRequest(order=ORDER))
    first, second, third = (r.order.client_order_id for r in orders.requests)
    assert first == second == third == response.order.client_order_id
    assert UUID(first).version == 7


async def test_two_calls_have_two_keys_and_leave_the_request_as_it_is(orders):
    request = pb.SubmitOrderRequest(order=ORDER)
    await orders.client.order.SubmitOrder(request)
    await orders.client.order.SubmitOrder(request)
    first, second = (r.order.client_order_id for r in orders.requests)
    assert first < second
    assert request == pb.SubmitOrderRequest(order=ORDER)


async def test_a_key_of_the_caller_stays(orders):
    request = pb.SubmitOrderRequest(order=ORDER)
    request.order.client_order_id = "mine"
    await orders.client.order.SubmitOrder(request)
    assert orders.requests == [request]


async def test_a_request_without_keys_is_sent_as_it_is(orders):
    order_id = pb.ClientOrderId(strategy_id="s")  # which is nothing new
    request = pb.CancelOrderRequest(client_order_id=order_id)
    await orders.client.order.CancelOrder(request)
    assert orders.requests == [request]


async def test_the_synchronous_client_fills_keys_too(orders):
    def submit():
        with SyncClient(orders.client.target) as client:
            client.order.SubmitOrder(pb.SubmitOrderRequest(order=ORDER))

    await asyncio.to_thread(submit)
    assert orders.requests[0].order.client_order_id


def test_each_of_several_orders_gets_a_key_of_its_own():
    named = pb.NewOrder(client_order_id="mine")
    filled = with_keys(pb.SubmitOrdersRequest(orders=[ORDER, named, ORDER]))
    first, second, third = (order.client_order_id for order in filled.orders)
    assert second == "mine"
    assert len({first, third, ""}) == 3


def test_signals_get_keys():
    filled = with_keys(pb.PublishSignalsRequest(signals=[pb.Signal(symbol="ES")]))
    assert UUID(filled.signals[0].signal_id).version == 7


def test_what_is_absent_stays_absent():
    assert with_keys(pb.SubmitOrderRequest()) == pb.SubmitOrderRequest()


def test_a_request_of_a_type_without_keys_is_not_even_copied():
    request = pb.GetLatestQuotesRequest(symbols=["ES"])
    assert with_keys(request) is request


def test_a_request_of_a_type_with_keys_is_one_that_creates():
    methods = [method for service, _ in services() for method in service.methods]
    requests = {m.name: GetMessageClass(m.input_type)() for m in methods}
    keyed = {name for name, found in requests.items() if with_keys(found) is not found}
    assert keyed == {"SubmitOrder", "SubmitOrders", "ValidateOrder", "PublishSignals"}


def tree():
    """Return the class of a message with a key, that may hold others of its kind."""
    file = FileDescriptorProto(name="tree.proto", package="tree", syntax="proto3")
    branch = file.message_type.add(name="Branch")
    of_branch = {"number": 1, "type": 11, "type_name": ".tree.Tree"}
    branch.field.add(name="tree", label=1, **of_branch)
    tree = file.message_type.add(name="Tree")
    key = tree.field.add(name="key", number=2, type=9, label=1)
    key.options.Extensions[pb.idempotency_key] = True
    branches = {"number": 1, "type": 11, "type_name": ".tree.Branch"}
    tree.field.add(name="branches", label=3, **branches)
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("tree.Tree"))


def test_keys_are_found_at_any_depth_also_in_types_that_hold_themselves():
    Tree = tree()
    request = Tree(branches=[{"tree": {"branches": [{"tree": {}}]}}, {}])
    filled = with_keys(request)
    inner = filled.branches[0].tree
    keys = {filled.key, inner.key, inner.branches[0].tree.key}
    assert len(keys - {""}) == 3
    assert not filled.branches[1].HasField("tree")


@given(st.lists(st.integers(0, 2**40), min_size=1))
def test_ids_sort_as_they_are_made_whatever_the_clock_says(instants):
    clock = iter(instants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "_last", 0)
        patch.setattr(ids, "time", SimpleNamespace(time_ns=lambda: next(clock)))
        made = [new_id() for _ in instants]
    assert made == sorted(set(made))
    assert {(UUID(id).version, UUID(id).variant) for id in made} == {(7, RFC_4122)}


def test_an_id_begins_with_the_time_in_milliseconds():
    before = time.time_ns() // 1_000_000
    made = UUID(new_id()).int >> 80
    assert before <= made <= time.time_ns() // 1_000_000


def test_threads_make_different_ids():
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: new_id(), range(10_000)))
    assert len(set(made)) == 10_000
