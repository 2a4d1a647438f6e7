"""What gateways report: facts are kept, once each; what is wrong changes nothing."""

import asyncio
from math import inf, nan

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from tests.conftest import both_editions
from tests.orders import (
    MARKET,
    SELL,
    UNKNOWN_ID,
    book,
    cancel,
    execution,
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


async def executions(client: Client, order: pb.Order) -> list[pb.Execution]:
    """Return the executions of an order, the latest first."""
    request = pb.ListExecutionsRequest(order_id=order.order_id)
    return list((await client.order.ListExecutions(request)).executions)


async def position(client: Client, symbol: str = "A") -> pb.Position:
    request = pb.ListPositionsRequest()
    found = (await client.portfolio.ListPositions(request)).positions
    return next((each for each in found if each.symbol == symbol), pb.Position())


@both_editions
async def test_fills_make_an_order_filled_at_their_mean(client: Client):
    order = await open_order(client)
    part = await fill(client, order, 4, 99)
    assert part.ord_status == pb.ORD_STATUS_PARTIALLY_FILLED
    assert (part.filled_quantity, part.leaves_quantity) == (4, 6)
    full = await fill(client, order, 6, 100)
    assert full.status == pb.ORDER_STATUS_FILLED
    assert (full.filled_quantity, full.leaves_quantity) == (10, 0)
    assert full.avg_fill_price == pytest.approx(99.6)
    assert await get(client, order) == full
    held = await position(client)
    assert held.quantity == 10
    assert held.average_cost == pytest.approx(99.6)


async def test_doubles_that_add_up_fill_an_order(client: Client):
    order = await open_order(client, quantity=0.3)
    await fill(client, order, 0.1)
    full = await fill(client, order, 0.2)
    assert full.status == pb.ORDER_STATUS_FILLED
    assert full.overfill_quantity == 0


async def test_a_fill_that_is_reported_twice_counts_once(client: Client):
    order = await open_order(client)
    fact = execution(order, 4)
    (first,) = await book(client, fact)
    (second,) = await book(client, fact)
    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.order == first.order
    assert len(await executions(client, order)) == 1
    assert (await position(client)).quantity == 4


async def test_a_fill_twice_in_a_batch_counts_once(client: Client):
    order = await open_order(client)
    fact = execution(order, 4)
    first, second = await book(client, fact, fact)
    assert second.duplicate
    assert second.order.filled_quantity == first.order.filled_quantity == 4


async def test_a_fill_reported_by_many_at_once_counts_once(client: Client):
    order = await open_order(client)
    fact = execution(order, 4)
    results = await asyncio.gather(*(book(client, fact) for _ in range(20)))
    assert sum(not result.duplicate for (result,) in results) == 1
    assert (await get(client, order)).filled_quantity == 4


async def test_an_execution_name_with_other_numbers_is_refused(client: Client):
    order = await open_order(client)
    await fill(client, order, 4, broker_exec_id="x")
    (result,) = await book(client, execution(order, 5, broker_exec_id="x"))
    assert result.reason == pb.ERROR_REASON_IDEMPOTENCY_KEY_REUSED
    assert (await get(client, order)).filled_quantity == 4


async def test_orders_name_their_executions_by_themselves(client: Client):
    one, two = await open_order(client), await open_order(client)
    await fill(client, one, 1, broker_exec_id="x")
    assert (await fill(client, two, 2, broker_exec_id="x")).filled_quantity == 2


async def test_a_fill_of_a_pending_order_acknowledges_it(client: Client):
    order = await submit(client)
    assert (await fill(client, order, 1)).status == pb.ORDER_STATUS_OPEN


async def test_a_fill_after_the_cancel_is_kept_and_marked_late(client: Client):
    order = await open_order(client)
    await report(client, order, "CANCELLED")
    after = await fill(client, order, 4)
    assert after.status == pb.ORDER_STATUS_CANCELLED
    assert after.filled_quantity == 4
    (late,) = await executions(client, order)
    assert late.late
    assert (await position(client)).quantity == 4


async def test_a_fill_beyond_the_quantity_is_kept_and_counted(client: Client):
    order = await open_order(client)
    await fill(client, order, 10)
    over = await fill(client, order, 3)
    assert over.status == pb.ORDER_STATUS_FILLED
    assert over.overfill_quantity == 3
    assert (await position(client)).quantity == 13


async def test_a_bust_takes_a_fill_back(client: Client):
    order = await open_order(client)
    await fill(client, order, 4, 90)
    await fill(client, order, 6, 100, broker_exec_id="wrong")
    bust = execution(
        order, 0, 0, type=pb.ORDER_EVENT_TYPE_TRADE_CANCEL, ref_broker_exec_id="wrong",
        leaves_quantity=6,
    )  # fmt: skip
    (result,) = await book(client, bust)
    assert result.order.status == pb.ORDER_STATUS_OPEN
    assert (result.order.filled_quantity, result.order.avg_fill_price) == (4, 90)
    held = await position(client)
    assert (held.quantity, held.average_cost) == (4, 90)
    (again,) = await book(client, bust)
    assert again.duplicate
    assert [each.quantity for each in await executions(client, order)] == [-6, 6, 4]


async def test_a_bust_of_all_leaves_the_order_as_if_nothing_was_filled(client: Client):
    order = await open_order(client)
    await fill(client, order, 10, 100, broker_exec_id="wrong")
    (result,) = await book(
        client,
        execution(
            order, 0, 0, type=pb.ORDER_EVENT_TYPE_TRADE_CANCEL,
            ref_broker_exec_id="wrong",
        ),
    )  # fmt: skip
    assert result.order.status == pb.ORDER_STATUS_CANCELLED
    assert result.order.filled_quantity == 0
    assert not result.order.HasField("avg_fill_price")
    assert (await position(client)).quantity == 0


async def test_fills_busted_in_their_own_batch_leave_nothing_filled(client: Client):
    """Also where adding and subtracting floats would leave something."""
    order = await open_order(client)
    fills = [execution(order, quantity) for quantity in (0.1, 0.2, 0.3)]
    busts = [
        execution(
            order, 0, 0, type=pb.ORDER_EVENT_TYPE_TRADE_CANCEL,
            ref_broker_exec_id=each.broker_exec_id,
        )
        for each in fills
    ]  # fmt: skip
    *_, result = await book(client, *fills, *busts)
    assert result.order.filled_quantity == 0
    assert not result.order.HasField("avg_fill_price")
    audit = await client.portfolio.AuditPositions(pb.AuditPositionsRequest())
    assert not audit.drifts


async def test_a_correction_stands_in_place_of_its_fill(client: Client):
    order = await open_order(client)
    await fill(client, order, 6, 100, broker_exec_id="wrong")
    await fill(client, order, 4, 90)
    correct = execution(
        order, 5, 99, type=pb.ORDER_EVENT_TYPE_TRADE_CORRECT,
        ref_broker_exec_id="wrong", leaves_quantity=1, broker_exec_id="right",
    )  # fmt: skip
    (result,) = await book(client, correct)
    assert result.order.filled_quantity == 9
    assert result.order.avg_fill_price == pytest.approx((5 * 99 + 4 * 90) / 9)
    assert result.order.status == pb.ORDER_STATUS_OPEN
    (again,) = await book(client, correct)
    assert again.duplicate
    (second,) = await book(
        client,
        execution(
            order, 0, 0, type=pb.ORDER_EVENT_TYPE_TRADE_CANCEL,
            ref_broker_exec_id="right",
        ),
    )  # fmt: skip
    assert second.order.filled_quantity == 4
    assert (await position(client)).quantity == 4


async def test_what_was_taken_back_is_not_taken_back_again(client: Client):
    order = await open_order(client)
    await fill(client, order, 6, broker_exec_id="wrong")
    kind = {"type": pb.ORDER_EVENT_TYPE_TRADE_CANCEL, "ref_broker_exec_id": "wrong"}
    await book(client, execution(order, 0, 0, **kind))
    (result,) = await book(client, execution(order, 0, 0, **kind))
    assert result.reason == pb.ERROR_REASON_ILLEGAL_TRANSITION
    assert (await position(client)).quantity == 0


async def test_a_bust_of_what_was_not_reported_is_refused(client: Client):
    order = await open_order(client)
    kind = {"type": pb.ORDER_EVENT_TYPE_TRADE_CANCEL, "ref_broker_exec_id": "?"}
    (result,) = await book(client, execution(order, 0, 0, **kind))
    assert result.reason == pb.ERROR_REASON_UNKNOWN_EXECUTION


async def test_a_batch_books_what_is_right_in_it(client: Client):
    order, other = await open_order(client), await open_order(client)
    facts = [
        execution(order, 1),
        execution(order, 2, symbol="B"),
        execution(order, 2, side=SELL),
        execution(pb.Order(order_id=UNKNOWN_ID, symbol="A", side=order.side), 1),
        execution(order, 1e308),
        execution(other, 3),
    ]
    results = await book(client, *facts)
    assert [pb.ErrorReason.Name(result.reason)[13:] for result in results] == [
        *("UNSPECIFIED", "EXECUTION_MISMATCH", "EXECUTION_MISMATCH"),
        *("UNKNOWN_ORDER", "INVALID_FIELD", "UNSPECIFIED"),
    ]
    assert (await get(client, order)).filled_quantity == 1
    assert (await get(client, other)).filled_quantity == 3


BAD = {
    "quantity 0": {"quantity": 0},
    "negative": {"quantity": -1},
    "NaN": {"quantity": nan},
    "infinite price": {"price": inf},
    "huge price": {"price": 1e308},
    "NaN commission": {"commission": nan},
    "no name": {"broker_exec_id": ""},
    "no order": {"order_id": "x"},
    "no fact": {"type": pb.ORDER_EVENT_TYPE_CANCELLED},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
async def test_a_bad_fill_is_refused_and_nothing_changes(
    client: Client, fields: dict[str, object]
):
    order = await open_order(client)
    fact = execution(order, 1)
    for name, value in fields.items():
        setattr(fact, name, value)
    (result,) = await book(client, fact)
    assert result.reason == pb.ERROR_REASON_INVALID_FIELD
    assert next(iter(fields)) in result.message
    assert await get(client, order) == order
    assert not await executions(client, order)


# --- Events -------------------------------------------------------------------------


@both_editions
async def test_an_order_goes_through_its_life(client: Client):
    order = await submit(client)
    submitted = (await report(client, order, "SUBMITTED")).order
    assert submitted.HasField("submitted_at")
    opened = (await report(client, order, "ACKNOWLEDGED", broker_order_id="7")).order
    assert (opened.status, opened.broker_order_id) == (pb.ORDER_STATUS_OPEN, "7")
    asked = await replace(client, order, quantity=8, price=101)
    assert asked.ord_status == pb.ORD_STATUS_PENDING_REPLACE
    assert asked.pending_terms == pb.Terms(quantity=8, price=101)
    assert asked.quantity == 10
    replaced = (await report(client, order, "REPLACED")).order
    assert (replaced.quantity, replaced.price) == (8, 101)
    assert replaced.ord_status == pb.ORD_STATUS_NEW
    asked = await cancel(client, order)
    assert asked.ord_status == pb.ORD_STATUS_PENDING_CANCEL
    cancelled = (await report(client, order, "CANCELLED", text="as asked")).order
    assert cancelled.ord_status == pb.ORD_STATUS_CANCELED
    assert cancelled.version == 7
    assert await get(client, order) == cancelled


async def test_reports_that_are_known_change_nothing(client: Client):
    order = await submit(client)
    for event in ("SUBMITTED", "ACKNOWLEDGED", "CANCELLED"):
        first = await report(client, order, event)
        again = await report(client, order, event)
        assert (first.duplicate, again.duplicate) == (False, True)
        assert again.order == first.order


async def test_an_event_of_an_order_that_is_not_there_is_refused(client: Client):
    result = await report(client, UNKNOWN_ID, "CANCELLED")
    assert result.reason == pb.ERROR_REASON_UNKNOWN_ORDER


async def test_a_rejection_keeps_its_reason(client: Client):
    order = await submit(client)
    result = await report(client, order, "REJECTED", code="99", text="no such venue")
    assert result.order.reject_code == "99"
    assert result.order.error_message == "no such venue"


async def test_cancelling_a_filled_order_is_refused(client: Client):
    order = await open_order(client)
    full = await fill(client, order, 10)
    code, reason, metadata = await refused(cancel(client, order))
    assert (code, reason) == (PRECONDITION, "ORDER_TERMINAL")
    assert metadata["status"] == "FILLED"
    assert await get(client, order) == full


async def test_cancelling_a_cancelled_order_returns_it(client: Client):
    order = await open_order(client)
    after = (await report(client, order, "CANCELLED")).order
    assert await cancel(client, order) == after


async def test_a_cancel_by_the_strategys_own_name(client: Client):
    order = await open_order(client, client_order_id="mine")
    name = pb.ClientOrderId(strategy_id="s", client_order_id="mine")
    request = pb.CancelOrderRequest(client_order_id=name)
    response = await client.order.CancelOrder(request)
    assert response.order.order_id == order.order_id
    name.client_order_id = "another"
    code, reason, _ = await refused(
        client.order.CancelOrder(pb.CancelOrderRequest(client_order_id=name))
    )
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ORDER")


async def test_replacing_below_what_is_filled_is_refused(client: Client):
    order = await open_order(client)
    part = await fill(client, order, 4)
    code, reason, _ = await refused(replace(client, order, quantity=3))
    assert (code, reason) == (PRECONDITION, "ILLEGAL_TRANSITION")
    assert await get(client, order) == part


@pytest.mark.parametrize(
    ("fields", "terms"),
    [({"order_type": MARKET}, {"price": 5}), ({}, {"stop_price": 5})],
    ids=["market with price", "limit with stop price"],
)
async def test_terms_that_the_type_does_not_have_are_refused(
    client: Client, fields: dict[str, object], terms: dict[str, float]
):
    order = await open_order(client, **fields)
    code, reason, _ = await refused(replace(client, order, **terms))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert await get(client, order) == order


async def test_a_request_for_another_version_is_refused(client: Client):
    order = await open_order(client)
    code, reason, metadata = await refused(cancel(client, order, version=1))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")
    assert metadata["version"] == "2"
    await cancel(client, order, version=2)
    await cancel(client, order, version=2)  # a retry of what was done


async def test_an_answer_to_an_earlier_command_changes_nothing(client: Client):
    order = await open_order(client)
    first = await replace(client, order, quantity=8)
    await report(client, order, "REPLACE_REJECTED")
    second = await replace(client, order, quantity=9)
    late = await report(client, order, "REPLACED", command_version=first.version)
    assert late.duplicate
    assert (await get(client, order)).quantity == 10
    await report(client, order, "REPLACED", command_version=second.version)
    assert (await get(client, order)).quantity == 9


async def test_an_unknown_outcome_is_a_flag_until_the_broker_speaks(client: Client):
    order = await submit(client)
    unknown = (await report(client, order, "OUTCOME_UNKNOWN")).order
    assert unknown.outcome_unknown
    assert unknown.status == pb.ORDER_STATUS_PENDING
    known = (await report(client, order, "ACKNOWLEDGED")).order
    assert not known.outcome_unknown


async def test_an_empty_batch_is_refused(client: Client):
    code, _, _ = await refused(book(client))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_name_that_breaks_a_constraint_holds_up_no_other(client: Client):
    # U+0000 passes no check, so nothing in a batch may come to depend on it.
    bad = new_order(symbol="A\0")
    request = pb.SubmitOrdersRequest(orders=[bad, new_order()])
    first, second = (await client.order.SubmitOrders(request)).results
    assert first.reason == pb.ERROR_REASON_INVALID_FIELD
    assert second.order.order_id
