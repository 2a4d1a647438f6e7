"""WatchOrders and WatchBrokerCommands: what is, then everything that happens."""

import asyncio

from quantplane import Client
from quantplane import v1 as pb
from tests.orders import (
    book,
    cancel,
    events,
    execution,
    fill,
    open_order,
    replace,
    report,
    submit,
    watching,
)


async def snapshot(client: Client, **fields: object) -> list[pb.Order]:
    """Return the live orders that a new watcher is told."""
    found: list[pb.Order] = []
    request = pb.WatchOrdersRequest(**fields)  # type: ignore[arg-type]
    async with client.follow(client.order.WatchOrders, request) as stream:
        async for response in stream:
            found += response.orders
            if response.event.HasField("snapshot_complete"):
                return found
    raise AssertionError


async def commands(
    client: Client, count: int, **fields: object
) -> list[pb.BrokerCommand]:
    """Return the first commands that a new gateway gets."""
    found: list[pb.BrokerCommand] = []
    request = pb.WatchBrokerCommandsRequest(**fields)  # type: ignore[arg-type]
    async with client.follow(client.broker.WatchBrokerCommands, request) as stream:
        async for response in stream:
            found += response.commands
            if len(found) >= count:
                return found
    raise AssertionError


def kinds(found: list[pb.BrokerCommand]) -> list[str]:
    prefix = "BROKER_COMMAND_TYPE_"
    return [pb.BrokerCommandType.Name(each.type).removeprefix(prefix) for each in found]


async def test_a_watcher_is_told_the_live_orders_and_then_each_event(client: Client):
    live = await open_order(client)
    over = await open_order(client)
    await report(client, over, "CANCELLED")
    assert await snapshot(client) == [live]
    async with watching(client) as stream:
        full = await fill(client, live, 10)
        new = await submit(client)
        first, second = await events(stream, 2)
    assert first.type == pb.ORDER_EVENT_TYPE_TRADE
    assert first.order == full
    assert first.execution.quantity == 10
    assert second.type == pb.ORDER_EVENT_TYPE_CREATED
    assert second.order == new
    assert second.revision == first.revision + 1


async def test_events_are_filtered_by_strategy_and_symbol(client: Client):
    filter = pb.OrderFilter(strategy_ids=["s", "t"], symbols=["A"])
    async with watching(client, filter=filter) as stream:
        await submit(client, symbol="B")
        await submit(client, strategy_id="u")
        wanted = [await submit(client, strategy_id=s) for s in ("s", "t")]
        found = await events(stream, 2)
    assert [event.order for event in found] == wanted
    assert await snapshot(client, filter=filter) == wanted


async def test_an_event_tells_what_it_changed(client: Client):
    async with watching(client) as stream:
        order = await open_order(client)
        await replace(client, order, quantity=8)
        await report(client, order, "REPLACED")
        await fill(client, order, 3, broker_exec_id="wrong")
        kind = {
            "type": pb.ORDER_EVENT_TYPE_TRADE_CORRECT,
            "ref_broker_exec_id": "wrong",
        }
        await book(client, execution(order, 2, 99, **kind))
        *_, asked, replaced, _, corrected = await events(stream, 6)
    assert asked.order.pending_terms.quantity == 8
    assert not asked.HasField("previous_terms")
    assert replaced.previous_terms == pb.Terms(quantity=10, price=100)
    assert corrected.execution.quantity == 2
    assert corrected.reversal.quantity == -3
    assert corrected.reversal.ref_execution_id == corrected.execution.ref_execution_id


async def test_a_denied_order_is_an_event(client: Client, server):
    from tests.orders.test_submit import limit

    await limit(server, '{"max_order_quantity": 1}')
    async with watching(client) as stream:
        await asyncio.gather(submit(client), return_exceptions=True)
        (event,) = await events(stream, 1)
    assert event.type == pb.ORDER_EVENT_TYPE_DENIED
    assert event.code == "RISK_MAX_ORDER_QUANTITY"


async def test_the_trace_of_a_call_is_on_the_order_and_its_event(client: Client):
    trace = "0af7651916cd43dd8448eb211c80319c"
    parent = f"00-{trace}-b7ad6b7169203331-01"
    async with watching(client) as stream:
        order = await submit(client)
        request = pb.CancelOrderRequest(order_id=order.order_id)
        await client.order.CancelOrder(request, metadata=(("traceparent", parent),))
        first, second = await events(stream, 2)
    assert (first.trace_id, second.trace_id) == ("", trace)


async def test_a_gateway_gets_what_is_to_be_done_and_then_each_command(client: Client):
    pending = await submit(client)
    working = await open_order(client)
    cancelling = await open_order(client)
    await cancel(client, cancelling)
    request = pb.WatchBrokerCommandsRequest()
    found: list[pb.BrokerCommand] = []
    async with client.follow(client.broker.WatchBrokerCommands, request) as stream:
        async for response in stream:
            found += response.commands
            if response.event.HasField("snapshot_complete"):
                await fill(client, working, 1)
                await replace(client, working, quantity=9)
                await cancel(client, working)
                await submit(client)
            if len(found) == 6:
                break
    assert kinds(found) == ["NEW", "WORKING", "CANCEL", "REPLACE", "CANCEL", "NEW"]
    assert [each.order.order_id for each in found[:3]] == [
        *(pending.order_id, working.order_id, cancelling.order_id)
    ]
    assert found[3].order.pending_terms.quantity == 9
    assert found[3].order.version == found[3].order.pending_version


async def test_commands_are_routed_by_symbol(client: Client):
    await submit(client, symbol="A")
    mine = await submit(client, symbol="B")
    (only,) = await commands(client, 1, filter=pb.OrderFilter(symbols=["B"]))
    assert only.order == mine


async def test_a_watcher_goes_on_from_every_token_it_was_given(client: Client):
    seen: list[tuple[bytes, int]] = []  # a token, and the events before it
    found: list[pb.OrderEvent] = []
    request = pb.WatchOrdersRequest()
    async with client.follow(client.order.WatchOrders, request) as stream:
        async for response in stream:
            found += response.events
            if response.resume_token:
                seen.append((response.resume_token, len(found)))
            if response.event.HasField("snapshot_complete"):
                for _ in range(3):
                    order = await open_order(client)
                    await fill(client, order, 10)
            if len(found) == 9:
                break
    for token, count in seen:
        rest: list[pb.OrderEvent] = []
        request = pb.WatchOrdersRequest(resume_token=token)
        async with client.follow(client.order.WatchOrders, request) as stream:
            while len(rest) < 9 - count:
                response = await anext(stream)
                assert not response.orders
                rest += response.events
        assert rest == found[count:]
