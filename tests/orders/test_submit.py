"""Submitting: one order per name, whoever asks how often."""

import asyncio
from math import inf, nan

import asyncpg
import grpc
import pytest

from quantplane import Client, violations_of
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.main import serving
from tests.conftest import Server, both_editions
from tests.orders import (
    MARKET,
    SELL,
    STOP_LIMIT,
    UNKNOWN_ID,
    cancel,
    fill,
    get,
    new_order,
    open_order,
    refused,
    replace,
    report,
    submit,
)

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@both_editions
async def test_an_order_is_kept_as_it_was_submitted(client: Client):
    new = new_order(
        "BRK.B", 2.5, side=SELL, order_type=STOP_LIMIT, price=-3, stop_price=7,
        time_in_force=pb.TIME_IN_FORCE_GTC, strategy_id="mean reversion",
    )  # fmt: skip
    order = await submit(client, new)
    for field in new.DESCRIPTOR.fields_by_name:
        assert getattr(order, field) == getattr(new, field), field
    assert order.status == pb.ORDER_STATUS_PENDING
    assert order.ord_status == pb.ORD_STATUS_PENDING_NEW
    assert order.leaves_quantity == 2.5
    assert order.version == 1
    assert order.created_at == order.updated_at
    assert await get(client, order) == order


async def test_an_order_is_for_the_day_unless_told_else(client: Client):
    order = await submit(client)
    assert order.time_in_force == pb.TIME_IN_FORCE_DAY


async def test_submitting_again_returns_the_order_as_it_is_now(client: Client):
    new = new_order()
    order = await submit(client, new)
    await report(client, order, "ACKNOWLEDGED")
    request = pb.SubmitOrderRequest(order=new)
    again = await client.order.SubmitOrder(request)
    assert again.duplicate
    assert again.order == await get(client, order)
    assert again.order.status == pb.ORDER_STATUS_OPEN


async def test_a_name_with_another_body_is_refused_and_changes_nothing(client: Client):
    order = await submit(client, client_order_id="mine")
    other = submit(client, client_order_id="mine", quantity=11)
    code, reason, metadata = await refused(other)
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert reason == "IDEMPOTENCY_KEY_REUSED"
    assert metadata["key"] == "mine"
    assert await get(client, order) == order
    listed = await client.order.ListOrders(pb.ListOrdersRequest())
    assert list(listed.orders) == [order]


async def test_strategies_name_their_orders_by_themselves(client: Client):
    one = await submit(client, client_order_id="1", strategy_id="s")
    two = await submit(client, client_order_id="1", strategy_id="t")
    assert one.order_id != two.order_id


async def test_the_client_names_an_order_that_has_no_name(client: Client):
    first = await submit(client, client_order_id="")
    second = await submit(client, client_order_id="")
    assert first.client_order_id
    assert first.client_order_id != second.client_order_id


@both_editions
async def test_two_servers_make_one_order_of_one_name(
    server: Server, settings: Settings, client: Client
):
    orders = [new_order() for _ in range(25)]
    async with serving(settings) as target, Client(target) as other:
        clients = [client, other] * 2
        calls = [submit(each, order) for order in orders for each in clients]
        made = await asyncio.gather(*calls)
    ids = {}
    for order in made:
        ids.setdefault(order.client_order_id, set()).add(order.order_id)
    assert len(ids) == 25
    assert all(len(of_name) == 1 for of_name in ids.values())
    listed = await client.order.ListOrders(pb.ListOrdersRequest())
    assert len(listed.orders) == 25


async def test_a_batch_answers_each_order_for_itself(client: Client):
    known = new_order()
    await submit(client, known)
    reused = new_order(client_order_id=known.client_order_id, quantity=99)
    orders = [known, new_order(quantity=0), new_order(), reused]
    request = pb.SubmitOrdersRequest(orders=orders)
    results = (await client.order.SubmitOrders(request)).results
    assert [result.duplicate for result in results] == [True, False, False, False]
    assert [pb.ErrorReason.Name(r.reason)[13:] for r in results] == [
        *("UNSPECIFIED", "INVALID_FIELD", "UNSPECIFIED", "IDEMPOTENCY_KEY_REUSED")
    ]
    assert results[2].order.status == pb.ORDER_STATUS_PENDING
    assert "quantity" in results[1].message


async def test_a_name_twice_in_a_batch_is_one_order(client: Client):
    new = new_order()
    other = new_order(client_order_id=new.client_order_id, quantity=99)
    request = pb.SubmitOrdersRequest(orders=[new, new, other])
    first, second, third = (await client.order.SubmitOrders(request)).results
    assert first.order == second.order
    assert (first.duplicate, second.duplicate) == (False, True)
    assert third.reason == pb.ERROR_REASON_IDEMPOTENCY_KEY_REUSED


BAD = {
    "quantity 0": ({"quantity": 0}, "order.quantity"),
    "negative": ({"quantity": -1}, "order.quantity"),
    "NaN": ({"quantity": nan}, "order.quantity"),
    "infinite": ({"quantity": inf}, "order.quantity"),
    "huge": ({"quantity": 1e308}, "order.quantity"),
    "limit without price": ({"price": None}, "order.price"),
    "market with price": ({"order_type": MARKET, "price": 1}, "order.price"),
    "stop without stop price": (
        {"order_type": pb.ORDER_TYPE_STOP}, "order.stop_price"
    ),
    "NaN price": ({"price": nan}, "order.price"),
    "no side": ({"side": 0}, "order.side"),
    "unknown side": ({"side": 9}, "order.side"),
    "no type": ({"order_type": 0}, "order.order_type"),
    "unknown tif": ({"time_in_force": 9}, "order.time_in_force"),
    "no strategy": ({"strategy_id": ""}, "order.strategy_id"),
    "no symbol": ({"symbol": ""}, "order.symbol"),
    "signal that is no id": ({"signal_id": "x"}, "order.signal_id"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "field"), BAD.values(), ids=BAD.keys())
async def test_a_bad_order_is_refused_and_nothing_is_kept(
    client: Client, fields: dict[str, object], field: str
):
    new = new_order()
    for name, value in fields.items():
        new.ClearField(name) if value is None else setattr(new, name, value)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await submit(client, new)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in [name for name, _ in violations_of(raised.value)]
    listed = await client.order.ListOrders(pb.ListOrdersRequest())
    assert not listed.orders


async def test_all_that_is_wrong_is_told_at_once(client: Client):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await submit(client, pb.NewOrder(client_order_id="x", price=nan))
    fields = {name for name, _ in violations_of(raised.value)}
    assert {"order.strategy_id", "order.symbol", "order.side", "order.order_type",
            "order.quantity", "order.price"} <= fields  # fmt: skip


# --- Signals ------------------------------------------------------------------------


async def signal(client: Client, **fields: object) -> pb.Signal:
    fields = {
        "strategy_id": "s", "symbol": "A", "signal_type": pb.SIGNAL_TYPE_LONG,
        "strength": 1.0, "confidence": 1.0,
    } | fields  # fmt: skip
    made = pb.Signal(**fields)  # type: ignore[arg-type]
    made.time.GetCurrentTime()
    request = pb.PublishSignalsRequest(signals=[made])
    return (await client.signal.PublishSignals(request)).signals[0]


async def test_an_order_names_its_signal(client: Client):
    active = await signal(client)
    order = await submit(client, signal_id=active.signal_id)
    assert (await get(client, order)).signal_id == active.signal_id


@pytest.mark.parametrize("fields", [{"strategy_id": "t"}, {"symbol": "B"}])
async def test_an_order_of_another_signal_is_refused(
    client: Client, fields: dict[str, object]
):
    other = await signal(client, **fields)
    new = new_order(signal_id=other.signal_id)
    code, reason, _ = await refused(submit(client, new))
    assert (code, reason) == (PRECONDITION, "SIGNAL_MISMATCH")
    new.signal_id = ""  # the name was not taken by what was refused
    assert (await submit(client, new)).client_order_id == new.client_order_id


async def test_an_order_of_a_signal_that_is_not_there_is_refused(client: Client):
    code, reason, metadata = await refused(submit(client, signal_id=UNKNOWN_ID))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SIGNAL")
    assert metadata["signal_id"] == UNKNOWN_ID


async def test_an_order_of_a_cancelled_signal_is_refused(client: Client):
    made = await signal(client)
    await client.signal.CancelSignal(pb.CancelSignalRequest(signal_id=made.signal_id))
    _, reason, _ = await refused(submit(client, signal_id=made.signal_id))
    assert reason == "SIGNAL_MISMATCH"


async def test_a_retry_finds_its_order_though_the_signal_is_over(client: Client):
    made = await signal(client)
    new = new_order(signal_id=made.signal_id)
    order = await submit(client, new)
    await client.signal.CancelSignal(pb.CancelSignalRequest(signal_id=made.signal_id))
    assert (await submit(client, new)).order_id == order.order_id


async def test_the_first_fill_executes_the_signal_and_not_the_order(client: Client):
    async def status() -> int:
        request = pb.GetSignalRequest(signal_id=made.signal_id)
        return (await client.signal.GetSignal(request)).signal.status

    made = await signal(client)
    order = await open_order(client, signal_id=made.signal_id)
    assert await status() == pb.SIGNAL_STATUS_ACTIVE
    await fill(client, order, 1)
    assert await status() == pb.SIGNAL_STATUS_EXECUTED
    await fill(client, order, 1)
    assert await status() == pb.SIGNAL_STATUS_EXECUTED


# --- Risk ---------------------------------------------------------------------------


async def limit(server: Server, limits: str, strategy_id: str = "s") -> None:
    """Set the risk limits of a strategy."""
    connection = await asyncpg.connect(server.settings.postgres_dsn)
    await connection.execute(
        """
        INSERT INTO strategies (strategy_id, name, type, risk_limits, created_by)
        VALUES ($1, $1, 'test', $2, 'test')
        ON CONFLICT (strategy_id) DO UPDATE SET risk_limits = excluded.risk_limits
        """,
        strategy_id,
        limits,
    )
    await connection.close()


BREACHES = {
    "quantity": ('{"max_order_quantity": 9}', {}, "max_order_quantity"),
    "notional": ('{"max_order_notional": 999}', {}, "max_order_notional"),
    "position": ('{"max_position": 9}', {}, "max_position"),
    "orders": ('{"max_open_orders": 0}', {}, "max_open_orders"),
    "symbol": ('{"allowed_symbols": ["B"]}', {}, "allowed_symbols"),
    "no price": (
        '{"max_order_notional": 999}', {"order_type": MARKET}, "max_order_notional"
    ),
    "no number": ('{"max_position": "9"}', {}, "max_position"),
    "no list": ('{"allowed_symbols": "A"}', {}, "allowed_symbols"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "fields", "broken"), BREACHES.values(), ids=BREACHES
)
async def test_an_order_beyond_a_limit_is_denied_and_kept_for_audit(
    server: Server, client: Client, limits: str, fields: dict[str, object], broken: str
):
    await limit(server, limits)
    new = new_order(**fields)
    code, reason, metadata = await refused(submit(client, new))
    assert (code, reason) == (PRECONDITION, "RISK_LIMIT")
    assert metadata["limit"] == broken
    kept = await get(client, pb.Order(order_id=metadata["order_id"]))
    assert kept.status == pb.ORDER_STATUS_REJECTED
    assert kept.reject_code == f"RISK_{broken.upper()}"
    await limit(server, "{}")
    assert await refused(submit(client, new)) == (code, reason, metadata)


async def test_orders_within_their_limits_are_accepted(server: Server, client: Client):
    everything = (
        '{"max_order_quantity": 10, "max_order_notional": 1000, "max_position": 20,'
        ' "max_open_orders": 2, "allowed_symbols": ["A"]}'
    )
    await limit(server, everything)
    await submit(client)
    await submit(client)
    _, reason, metadata = await refused(submit(client))
    assert (reason, metadata["limit"]) == ("RISK_LIMIT", "max_position")
    _, _, metadata = await refused(submit(client, quantity=1, side=SELL))
    assert metadata["limit"] == "max_open_orders"
    await submit(client, strategy_id="unlimited", quantity=1_000)


async def test_a_position_counts_with_what_may_still_be_filled(
    server: Server, client: Client
):
    await limit(server, '{"max_position": 10}')
    order = await open_order(client, quantity=6)
    await fill(client, order, 4)
    _, reason, _ = await refused(submit(client, quantity=5))
    assert reason == "RISK_LIMIT"
    await submit(client, quantity=4)
    await submit(client, quantity=14, side=SELL)  # from long 4 to short 10
    _, reason, _ = await refused(submit(client, quantity=1, side=SELL))
    assert reason == "RISK_LIMIT"


async def test_many_at_once_keep_a_limit_on_two_servers(
    server: Server, settings: Settings, client: Client
):
    await limit(server, '{"max_open_orders": 7}')
    async with serving(settings) as target, Client(target) as other:
        calls = [submit(each) for _ in range(15) for each in (client, other)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(each, pb.Order) for each in outcomes) == 7


async def test_a_market_order_is_valued_at_the_market(server: Server, client: Client):
    await limit(server, '{"max_order_notional": 1005}')
    async with client.publish_quotes() as feed:
        quote = pb.Quote(symbol="A", bid=100, ask=101)
        quote.time.GetCurrentTime()
        await feed.send([quote])
        await feed.flush()
    _, reason, _ = await refused(submit(client, order_type=MARKET))
    assert reason == "RISK_LIMIT"
    await submit(client, order_type=MARKET, side=SELL)


async def test_a_replacement_beyond_a_limit_is_refused(server: Server, client: Client):
    await limit(server, '{"max_position": 12}')
    order = await open_order(client)
    code, reason, metadata = await refused(replace(client, order, quantity=13))
    assert (code, reason) == (PRECONDITION, "RISK_LIMIT")
    assert metadata["limit"] == "max_position"
    assert await get(client, order) == order
    await replace(client, order, quantity=12)
    _, reason, _ = await refused(submit(client, quantity=1))
    assert reason == "RISK_LIMIT"


# --- Trying -------------------------------------------------------------------------


async def validate(client: Client, new: pb.NewOrder) -> pb.ValidateOrderResponse:
    return await client.order.ValidateOrder(pb.ValidateOrderRequest(order=new))


async def test_validating_says_what_an_order_would_be_worth_and_keeps_nothing(
    client: Client,
):
    new = new_order()
    assert (await validate(client, new)).notional == 1_000
    assert not (await validate(client, new_order(order_type=MARKET))).HasField(
        "notional"
    )
    assert not (await client.order.ListOrders(pb.ListOrdersRequest())).orders
    await submit(client, new)
    await validate(client, new)


async def test_validating_refuses_what_submitting_would(server: Server, client: Client):
    await limit(server, '{"max_position": 9}')
    new = new_order()
    code, reason, _ = await refused(validate(client, new))
    assert (code, reason) == (PRECONDITION, "RISK_LIMIT")
    _, reason, _ = await refused(validate(client, new_order(signal_id=UNKNOWN_ID)))
    assert reason == "UNKNOWN_SIGNAL"
    _, reason, _ = await refused(validate(client, new_order(quantity=0)))
    assert reason == "INVALID_FIELD"
    assert not (await client.order.ListOrders(pb.ListOrdersRequest())).orders
    known = await submit(client, quantity=1)
    reused = new_order(client_order_id=known.client_order_id)
    _, reason, _ = await refused(validate(client, reused))
    assert reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_cancelled_order_frees_its_part_of_a_limit(
    server: Server, client: Client
):
    await limit(server, '{"max_open_orders": 1}')
    order = await open_order(client)
    await cancel(client, order)
    await report(client, order, "CANCELLED")
    await submit(client)
