"""What an order becomes, by every event in every status."""

from itertools import product
from math import fsum, isclose, isfinite
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from quantplane import v1 as pb
from quantplane_server.errors import IllegalTransition, OrderTerminal
from quantplane_server.orders import lifecycle, lifecycle_page
from quantplane_server.orders.lifecycle import LEGAL, TRANSITIONS, Filled

PAGE = Path(__file__).parents[2] / "docs" / "order-lifecycle.md"
AT = Timestamp(seconds=1_700_000_000)
LATER = Timestamp(seconds=1_700_000_060, nanos=5_000)
LIVE = (pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN)
OVER = tuple(status for status in pb.OrderStatus.values()[1:] if status not in LIVE)
LIVE_NAMES = ("PENDING", "OPEN")
FACTS = ("TRADE", "TRADE_CANCEL", "TRADE_CORRECT")
EVENTS = [name.removeprefix("ORDER_EVENT_TYPE_") for name in pb.OrderEventType.keys()]
CHANGES = [name for name in EVENTS if name not in ("UNSPECIFIED", "CREATED", "DENIED")]


def new(**fields: Any) -> pb.NewOrder:
    """Return a limit order for 10 at 100, or another."""
    given = {
        "client_order_id": "c1",
        "strategy_id": "s1",
        "symbol": "AAPL",
        "side": pb.SIDE_BUY,
        "order_type": pb.ORDER_TYPE_LIMIT,
        "quantity": 10.0,
        "price": 100.0,
    }
    return pb.NewOrder(**(given | fields))


def stop(**fields: Any) -> pb.NewOrder:
    return new(
        order_type=pb.ORDER_TYPE_STOP, price=None, **({"stop_price": 95.0} | fields)
    )


def market() -> pb.NewOrder:
    return new(order_type=pb.ORDER_TYPE_MARKET, price=None)


def change(name: str, **fields: Any) -> pb.OrderReport:
    number = pb.OrderEventType.Value(f"ORDER_EVENT_TYPE_{name}")
    return pb.OrderReport(order_id="o1", type=number, **fields)


def terms(quantity: float = 10.0, price: float | None = 100.0) -> pb.Terms:
    return pb.Terms(quantity=quantity, price=price)


ACKNOWLEDGED = change("ACKNOWLEDGED", broker_order_id="b1")
CANCEL = change("CANCEL_REQUESTED")
REPLACE = change("REPLACE_REQUESTED", terms=terms(20.0, 101.0))


def fill(quantity: float, price: float = 100.0) -> tuple[pb.OrderReport, Filled]:
    """Return a trade after which this much is filled."""
    return change("TRADE"), Filled(quantity, quantity * price)


def bust(quantity: float, leaves: float = 0.0) -> tuple[pb.OrderReport, Filled]:
    """Return a bust after which this much is filled."""
    return change("TRADE_CANCEL"), Filled(quantity, quantity * 100.0, leaves)


Step = pb.OrderReport | tuple[pb.OrderReport, Filled]


def step(order: pb.Order, taken: Step) -> pb.Order | None:
    report, filled = taken if isinstance(taken, tuple) else (taken, None)
    return lifecycle.apply(order, report, LATER, filled)


def after(*steps: Step, of: pb.NewOrder | None = None) -> pb.Order:
    """Return an order after steps each of which changes it."""
    order = lifecycle.created(of or new(), "o1", AT, "t1")
    for taken in steps:
        changed = step(order, taken)
        assert changed is not None, taken
        order = changed
    return order


def refusal(order: pb.Order, taken: Step) -> IllegalTransition:
    with pytest.raises(IllegalTransition) as caught:
        step(order, taken)
    return caught.value


def status_of(order: pb.Order | None) -> str:
    assert order is not None
    return pb.OrderStatus.Name(order.status).removeprefix("ORDER_STATUS_")


def ord_status_of(order: pb.Order) -> str:
    return pb.OrdStatus.Name(order.ord_status).removeprefix("ORD_STATUS_")


# --- The table ---

# Ways to each status. Those over a fill leave the broker's name unknown.
WAYS: dict[str, tuple[Step, ...]] = {
    "PENDING": (),
    "OPEN": (fill(1.0), bust(0.0)),
    "FILLED": (fill(10.0),),
    "CANCELLED": (change("CANCELLED"),),
    "REJECTED": (change("REJECTED"),),
    "EXPIRED": (change("EXPIRED"),),
}
# What a change needs before it, so that it keeps its guard.
BEFORE = {
    "CANCEL_REJECTED": CANCEL,
    "REPLACED": REPLACE,
    "REPLACE_REJECTED": REPLACE,
    "OUTCOME_UNKNOWN": CANCEL,
}
NEWS: dict[str, Step] = {name: change(name) for name in CHANGES} | {
    "ACKNOWLEDGED": ACKNOWLEDGED,
    "REPLACE_REQUESTED": REPLACE,
    "REPLACED": change("REPLACED", terms=terms(30.0)),
    "RESTATED": change("RESTATED", terms=terms(30.0)),
    "TRADE": fill(1.0),
    "TRADE_CANCEL": bust(1.0),
    "TRADE_CORRECT": (change("TRADE_CORRECT"), Filled(1.0, 100.0)),
}
# Without a row, and yet no error: that is known, or too late to matter.
KNOWN = {
    ("SUBMITTED", "OPEN"),
    ("CANCELLED", "CANCELLED"),
    ("REJECTED", "REJECTED"),
    ("EXPIRED", "EXPIRED"),
    ("CANCEL_REQUESTED", "CANCELLED"),
    *product(("CANCEL_REJECTED",), WAYS),
    *product(("REPLACE_REJECTED",), WAYS),
}


@pytest.mark.parametrize("status", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_every_event_in_every_status_does_what_the_table_says(name: str, status: str):
    kind = stop() if name == "TRIGGERED" else new()
    order = after(*WAYS[status], of=kind)
    assert status_of(order) == status
    row = LEGAL.get((pb.OrderEventType.Value(f"ORDER_EVENT_TYPE_{name}"), order.status))
    if row is None and (name, status) in KNOWN:
        assert step(order, NEWS[name]) is None
    elif row is None:
        with pytest.raises(
            IllegalTransition if status in LIVE_NAMES else OrderTerminal
        ):
            step(order, NEWS[name])
    else:
        if name in BEFORE:
            order = after(*WAYS[status], BEFORE[name], of=kind)
        news = fill(11.0) if (name, status) == ("TRADE", "FILLED") else NEWS[name]
        changed = step(order, news)
        assert changed is not None
        assert changed.status in (row.to or [order.status])
        assert changed.version == order.version + 1


def test_the_table_has_one_row_for_each_event_and_status():
    pairs = [(row.event, s) for row in TRANSITIONS for s in getattr(row, "from")]
    assert len(pairs) == len(set(pairs)) == len(LEGAL)


def test_the_table_has_every_event():
    assert {row.event for row in TRANSITIONS} == set(pb.OrderEventType.values()[1:])


def test_every_fact_is_legal_in_every_status():
    events = [pb.OrderEventType.Value(f"ORDER_EVENT_TYPE_{name}") for name in FACTS]
    assert set(product(events, pb.OrderStatus.values()[1:])) <= LEGAL.keys()


def test_the_page_is_what_the_table_renders():
    assert PAGE.read_text() == lifecycle_page.render()


# --- The beginning ---


def test_a_new_order_is_pending_in_full():
    order = lifecycle.created(new(signal_id="g1"), "o1", AT, "t1")
    assert order == pb.Order(
        order_id="o1",
        client_order_id="c1",
        strategy_id="s1",
        signal_id="g1",
        symbol="AAPL",
        side=pb.SIDE_BUY,
        order_type=pb.ORDER_TYPE_LIMIT,
        quantity=10.0,
        price=100.0,
        time_in_force=pb.TIME_IN_FORCE_DAY,
        status=pb.ORDER_STATUS_PENDING,
        ord_status=pb.ORD_STATUS_PENDING_NEW,
        leaves_quantity=10.0,
        version=1,
        created_at=AT,
        updated_at=AT,
        trace_id="t1",
    )


def test_a_denied_order_is_rejected_with_its_reason():
    order = lifecycle.denied(after(), "RISK_MAX_POSITION", "over 100")
    assert (status_of(order), ord_status_of(order)) == ("REJECTED", "REJECTED")
    assert (order.reject_code, order.error_message) == ("RISK_MAX_POSITION", "over 100")
    assert (order.version, order.leaves_quantity) == (1, 0.0)


# --- The broker takes it ---


def test_submitted_says_when():
    order = after(change("SUBMITTED"))
    assert (status_of(order), order.submitted_at) == ("PENDING", LATER)


def test_submitted_twice_is_known():
    assert step(after(change("SUBMITTED")), change("SUBMITTED")) is None


def test_submitted_again_of_an_order_that_is_over_is_known():
    order = after(change("SUBMITTED"), change("EXPIRED"))
    assert step(order, change("SUBMITTED")) is None


def test_an_order_that_is_over_is_not_sent_for_the_first_time():
    with pytest.raises(OrderTerminal):
        step(after(change("EXPIRED")), change("SUBMITTED"))


def test_acknowledged_opens_under_the_brokers_name():
    order = after(ACKNOWLEDGED)
    assert (status_of(order), order.broker_order_id) == ("OPEN", "b1")
    assert (ord_status_of(order), order.leaves_quantity) == ("NEW", 10.0)


@pytest.mark.parametrize("last", [(), (change("CANCELLED"),), (fill(10.0),)])
def test_acknowledged_again_is_known(last: tuple[Step, ...]):
    assert step(after(ACKNOWLEDGED, *last), ACKNOWLEDGED) is None


@pytest.mark.parametrize("last", [(), (fill(10.0),)])
def test_acknowledged_under_another_name_is_refused(last: tuple[Step, ...]):
    other = change("ACKNOWLEDGED", broker_order_id="b2")
    assert "'b1'" in str(refusal(after(ACKNOWLEDGED, *last), other))


@pytest.mark.parametrize("quantity", [1.0, 10.0])
def test_an_acknowledgement_after_the_fill_brings_the_name(quantity: float):
    order = after(fill(quantity), ACKNOWLEDGED)
    assert order.broker_order_id == "b1"
    assert order.status == after(fill(quantity)).status


@pytest.mark.parametrize("before", [(), (ACKNOWLEDGED,)])
def test_the_broker_rejects_with_its_reason(before: tuple[Step, ...]):
    order = after(*before, change("REJECTED", code="99", text="no such symbol"))
    assert status_of(order) == "REJECTED"
    assert (order.reject_code, order.error_message) == ("99", "no such symbol")


def test_an_order_with_a_fill_is_not_rejected():
    assert "filled" in str(refusal(after(fill(1.0)), change("REJECTED")))


def test_triggered_says_when_by_the_brokers_clock():
    told = Timestamp(seconds=1_700_000_050, nanos=123_456_789)
    order = after(ACKNOWLEDGED, change("TRIGGERED", time=told), of=stop())
    assert order.triggered_at.ToNanoseconds() == 1_700_000_050_123_456_000


def test_triggered_says_when_by_ours_where_the_broker_does_not():
    assert after(ACKNOWLEDGED, change("TRIGGERED"), of=stop()).triggered_at == LATER


def test_triggered_twice_is_known():
    order = after(ACKNOWLEDGED, change("TRIGGERED"), of=stop())
    assert step(order, change("TRIGGERED")) is None


def test_a_limit_order_is_not_triggered():
    assert "STOP" in str(refusal(after(ACKNOWLEDGED), change("TRIGGERED")))


# --- Fills ---


def test_a_part_is_filled():
    order = after(ACKNOWLEDGED, fill(4.0, 99.5))
    assert (status_of(order), ord_status_of(order)) == ("OPEN", "PARTIALLY_FILLED")
    assert (order.filled_quantity, order.avg_fill_price) == (4.0, 99.5)
    assert order.leaves_quantity == 6.0


def test_all_is_filled():
    order = after(ACKNOWLEDGED, CANCEL, fill(10.0))
    assert (status_of(order), ord_status_of(order)) == ("FILLED", "FILLED")
    assert (order.leaves_quantity, order.overfill_quantity) == (0.0, 0.0)
    assert not order.pending_request


def test_what_sums_almost_to_the_quantity_fills_it():
    order = after(ACKNOWLEDGED, fill(0.1 + 0.2), of=new(quantity=0.3))
    assert (status_of(order), order.overfill_quantity) == ("FILLED", 0.0)
    assert status_of(after(fill(10.0 - 1e-9))) == "FILLED"
    assert status_of(after(fill(10.0 - 1e-7))) == "OPEN"


def test_a_fill_implies_the_acknowledgement():
    order = after(fill(4.0))
    assert (status_of(order), order.broker_order_id) == ("OPEN", "")


def test_a_fill_of_a_stop_order_triggers_nothing():
    order = after(ACKNOWLEDGED, fill(4.0), of=stop())
    assert not order.HasField("triggered_at")


def test_what_is_filled_beyond_the_quantity_is_told():
    order = after(fill(10.0), fill(13.0))
    assert (status_of(order), order.overfill_quantity) == ("FILLED", 3.0)
    assert (order.filled_quantity, order.leaves_quantity) == (13.0, 0.0)


@pytest.mark.parametrize("end", ["CANCELLED", "EXPIRED"])
def test_a_late_fill_leaves_the_status_until_it_is_all(end: str):
    part = after(change(end), fill(4.0))
    assert (status_of(part), part.leaves_quantity) == (end, 0.0)
    assert status_of(step(part, fill(10.0))) == "FILLED"


@pytest.mark.parametrize(("quantity", "end"), [(4.0, "CANCELLED"), (10.0, "FILLED")])
def test_a_fill_of_a_rejected_order_says_that_it_was_not(quantity: float, end: str):
    assert status_of(after(change("REJECTED"), fill(quantity))) == end


@pytest.mark.parametrize("status", WAYS)
def test_a_fill_is_late_once_the_order_is_over(status: str):
    assert lifecycle.is_late(after(*WAYS[status])) == (status not in LIVE_NAMES)


# --- Busts and corrections ---


@pytest.mark.parametrize(("leaves", "end"), [(6.0, "OPEN"), (0.0, "CANCELLED")])
def test_a_bust_of_a_filled_order_opens_it_where_the_broker_still_works(
    leaves: float, end: str
):
    order = after(fill(10.0), bust(4.0, leaves))
    assert status_of(order) == end
    assert order.leaves_quantity == leaves


def test_a_bust_of_an_overfill_leaves_the_order_filled():
    order = after(fill(13.0), bust(10.0))
    assert (status_of(order), order.overfill_quantity) == ("FILLED", 0.0)


def test_a_bust_of_the_only_fill_leaves_no_price():
    order = after(fill(4.0), bust(0.0))
    assert not order.HasField("avg_fill_price")
    assert (order.filled_quantity, order.leaves_quantity) == (0.0, 10.0)


@pytest.mark.parametrize("end", ["CANCELLED", "EXPIRED"])
def test_a_bust_of_an_order_that_is_over_keeps_its_status(end: str):
    order = after(fill(4.0), change(end), bust(0.0, leaves=10.0))
    assert (status_of(order), order.filled_quantity) == (end, 0.0)


def test_a_correction_can_fill_an_order():
    order = after(fill(4.0), (change("TRADE_CORRECT"), Filled(10.0, 990.0)))
    assert (status_of(order), order.avg_fill_price) == ("FILLED", 99.0)


# --- Cancels ---


def test_a_cancel_of_an_order_that_is_not_sent_yet_is_pending():
    order = after(CANCEL)
    assert (status_of(order), ord_status_of(order)) == ("PENDING", "PENDING_CANCEL")
    assert order.pending_version == order.version == 2


def test_a_second_cancel_is_known():
    assert step(after(CANCEL), CANCEL) is None
    assert step(after(change("CANCELLED")), CANCEL) is None


def test_a_cancel_takes_the_place_of_a_replace():
    order = after(ACKNOWLEDGED, REPLACE, CANCEL)
    assert ord_status_of(order) == "PENDING_CANCEL"
    assert not order.HasField("pending_terms")
    assert order.pending_version == 4


def test_a_cancelled_order_has_nothing_pending():
    order = after(ACKNOWLEDGED, CANCEL, change("OUTCOME_UNKNOWN"), change("CANCELLED"))
    assert (status_of(order), ord_status_of(order)) == ("CANCELLED", "CANCELED")
    assert not order.pending_request and not order.pending_version
    assert not order.outcome_unknown


def test_the_broker_cancels_without_a_request():
    order = after(ACKNOWLEDGED, fill(4.0), change("CANCELLED"))
    assert (status_of(order), order.leaves_quantity) == ("CANCELLED", 0.0)


def test_a_refused_cancel_leaves_the_order_as_it_was():
    order = after(ACKNOWLEDGED, CANCEL, change("CANCEL_REJECTED", command_version=3))
    assert (status_of(order), ord_status_of(order)) == ("OPEN", "NEW")
    assert not order.pending_version


@pytest.mark.parametrize("name", ["CANCEL_REJECTED", "REPLACE_REJECTED"])
def test_a_refusal_of_nothing_changes_nothing(name: str):
    assert step(after(ACKNOWLEDGED), change(name)) is None


def test_a_refusal_of_an_earlier_cancel_changes_nothing():
    order = after(CANCEL, change("CANCEL_REJECTED"), CANCEL)
    assert step(order, change("CANCEL_REJECTED", command_version=2)) is None


def test_too_late_to_cancel_changes_nothing():
    order = after(ACKNOWLEDGED, CANCEL, fill(10.0))
    assert step(order, change("CANCEL_REJECTED", command_version=3)) is None


# --- Replaces ---


def test_a_replace_is_pending_until_the_broker_answers():
    order = after(ACKNOWLEDGED, REPLACE)
    assert ord_status_of(order) == "PENDING_REPLACE"
    assert (order.quantity, order.price) == (10.0, 100.0)
    assert (order.pending_terms, order.pending_version) == (REPLACE.terms, 3)


@pytest.mark.parametrize("named", [0, 3])
def test_replaced_puts_what_was_asked_for_in_force(named: int):
    order = after(ACKNOWLEDGED, REPLACE, change("REPLACED", command_version=named))
    assert (status_of(order), order.quantity, order.price) == ("OPEN", 20.0, 101.0)
    assert not order.pending_request and not order.HasField("pending_terms")
    assert order.leaves_quantity == 20.0


def test_replaced_puts_the_brokers_terms_in_force_where_it_has_some():
    order = after(ACKNOWLEDGED, REPLACE, change("REPLACED", terms=terms(15.0)))
    assert (order.quantity, order.price) == (15.0, 100.0)


@pytest.mark.parametrize(
    "again",
    [
        change("REPLACED"),
        change("REPLACED", command_version=3),
        change("REPLACED", terms=REPLACE.terms),
        change("REPLACED", command_version=3, terms=terms(15.0)),
    ],
)
def test_replaced_again_is_known(again: pb.OrderReport):
    assert step(after(ACKNOWLEDGED, REPLACE, change("REPLACED")), again) is None


def test_an_answer_to_an_earlier_replace_changes_nothing():
    newer = change("REPLACE_REQUESTED", terms=terms(30.0))
    order = after(ACKNOWLEDGED, REPLACE, change("REPLACE_REJECTED"), newer)
    for name in ("REPLACED", "REPLACE_REJECTED"):
        assert step(order, change(name, command_version=3)) is None


def test_replaced_to_other_terms_without_a_request_is_refused():
    error = refusal(after(ACKNOWLEDGED), change("REPLACED", terms=terms(20.0)))
    assert "RESTATED" in str(error)


def test_a_quantity_that_is_filled_already_fills_the_order():
    order = after(fill(0.1 + 0.2), change("REPLACE_REQUESTED", terms=terms(0.3)))
    order = step(order, change("REPLACED")) or order
    assert (status_of(order), order.quantity) == ("FILLED", 0.3)
    assert not order.pending_request


@pytest.mark.parametrize("name", ["REPLACE_REQUESTED", "REPLACED", "RESTATED"])
def test_a_quantity_below_what_is_filled_is_refused(name: str):
    before = [REPLACE] if name == "REPLACED" else []
    order = after(fill(4.0), *before)
    assert "4 of it" in str(refusal(order, change(name, terms=terms(3.0))))


@pytest.mark.parametrize("quantity", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["REPLACE_REQUESTED", "RESTATED"])
def test_a_quantity_of_nothing_is_refused(name: str, quantity: float):
    refusal(after(ACKNOWLEDGED), change(name, terms=terms(quantity)))


@pytest.mark.parametrize(
    "wrong", [terms(20.0, None), pb.Terms(quantity=20.0, price=100.0, stop_price=95.0)]
)
@pytest.mark.parametrize("name", ["REPLACE_REQUESTED", "RESTATED"])
def test_terms_have_the_prices_of_the_type(name: str, wrong: pb.Terms):
    assert "price" in str(refusal(after(ACKNOWLEDGED), change(name, terms=wrong)))


def test_a_replace_of_an_order_that_is_not_open_is_refused():
    refusal(after(), REPLACE)


@pytest.mark.parametrize("other", [CANCEL, REPLACE])
def test_a_replace_beside_another_request_is_refused(other: pb.OrderReport):
    newer = change("REPLACE_REQUESTED", terms=terms(30.0))
    assert "under way" in str(refusal(after(ACKNOWLEDGED, other), newer))


def test_a_replace_back_to_what_is_in_force_waits_for_the_answer():
    back = change("REPLACE_REQUESTED", terms=terms())
    assert "under way" in str(refusal(after(ACKNOWLEDGED, REPLACE), back))


def test_a_market_order_is_not_replaced():
    wanted = change("REPLACE_REQUESTED", terms=terms(20.0, None))
    assert "MARKET" in str(refusal(after(ACKNOWLEDGED, of=market()), wanted))


def test_a_replace_to_what_is_pending_or_in_force_is_known():
    assert step(after(ACKNOWLEDGED, REPLACE), REPLACE) is None
    assert step(after(ACKNOWLEDGED, REPLACE, change("REPLACED")), REPLACE) is None


def test_a_replace_that_was_done_is_known_when_the_order_is_over():
    order = after(ACKNOWLEDGED, REPLACE, change("REPLACED"), fill(20.0))
    assert step(order, REPLACE) is None


def test_a_refused_replace_leaves_the_terms():
    order = after(ACKNOWLEDGED, REPLACE, change("REPLACE_REJECTED"))
    assert (order.quantity, order.price, order.pending_version) == (10.0, 100.0, 0)
    assert not order.HasField("pending_terms")


def test_the_broker_restates_the_terms_and_leaves_a_request_pending():
    order = after(ACKNOWLEDGED, REPLACE, change("RESTATED", terms=terms(8.0, 99.0)))
    assert (order.quantity, order.price) == (8.0, 99.0)
    assert order.pending_request == pb.PENDING_REQUEST_REPLACE


def test_restated_to_what_is_in_force_is_known():
    assert step(after(ACKNOWLEDGED), change("RESTATED", terms=terms())) is None


def test_restated_to_what_is_filled_fills_the_order():
    order = after(fill(4.0), change("RESTATED", terms=terms(4.0)))
    assert (status_of(order), order.leaves_quantity) == ("FILLED", 0.0)


# --- An unknown outcome ---


def test_an_unknown_outcome_is_a_flag():
    order = after(change("OUTCOME_UNKNOWN"))
    assert (status_of(order), order.outcome_unknown) == ("PENDING", True)
    assert step(order, change("OUTCOME_UNKNOWN")) is None


def test_an_open_order_without_a_request_has_no_outcome_to_wait_for():
    refusal(after(ACKNOWLEDGED), change("OUTCOME_UNKNOWN"))


@pytest.mark.parametrize(
    "said",
    [
        change("CANCEL_REJECTED"),
        change("CANCELLED"),
        fill(1.0),
        change("RESTATED", terms=terms(8.0)),
    ],
)
def test_whatever_the_broker_says_clears_the_flag(said: Step):
    order = after(ACKNOWLEDGED, CANCEL, change("OUTCOME_UNKNOWN"), said)
    assert not order.outcome_unknown


@pytest.mark.parametrize("ours", [change("SUBMITTED"), CANCEL])
def test_what_we_do_leaves_the_flag(ours: pb.OrderReport):
    assert after(change("OUTCOME_UNKNOWN"), ours).outcome_unknown


# --- Refusals ---


@pytest.mark.parametrize("number", [0, 1, 2, 99])
@pytest.mark.parametrize("status", WAYS)
def test_what_is_no_change_is_illegal(status: str, number: int):
    report = pb.OrderReport(order_id="o1", type=number)  # type: ignore[arg-type]
    refusal(after(*WAYS[status]), report)


def test_a_refusal_names_status_and_event():
    error = refusal(after(fill(1.0)), change("REJECTED"))
    assert error.metadata == {"status": "OPEN", "event": "REJECTED"}
    assert str(error).startswith("the order is OPEN and can't take REJECTED: ")


def test_a_refusal_of_what_is_over_names_status_and_event():
    with pytest.raises(OrderTerminal) as caught:
        step(after(fill(10.0)), CANCEL)
    metadata = {"status": "FILLED", "event": "CANCEL_REQUESTED"}
    assert caught.value.metadata == metadata
    assert "FILLED" in str(caught.value) and "CANCEL_REQUESTED" in str(caught.value)


# --- Whatever happens ---

QUANTITIES = st.sampled_from([0.1, 0.2, 0.3, 1.0, 4.0, 6.0, 10.0, 1e15]) | st.floats(
    1e-9, 1e15
)
PRICES = st.floats(-1e15, 1e15)
REPORTS = [
    *("SUBMITTED", "ACKNOWLEDGED", "TRIGGERED", "CANCEL_REQUESTED"),
    *("CANCEL_REJECTED", "REPLACED", "REPLACE_REJECTED", "OUTCOME_UNKNOWN"),
]
IMMUTABLE = (
    *("order_id", "client_order_id", "strategy_id", "signal_id", "symbol", "side"),
    *("order_type", "time_in_force", "created_at", "trace_id"),
)


class Lifecycle(RuleBasedStateMachine):
    """Drives one order by legal and illegal changes."""

    @initialize(
        kind=st.sampled_from(pb.OrderType.values()[1:]),
        quantity=QUANTITIES,
    )
    def create(self, kind: Any, quantity: float) -> None:
        self.limited = kind in (pb.ORDER_TYPE_LIMIT, pb.ORDER_TYPE_STOP_LIMIT)
        self.stopped = kind in (pb.ORDER_TYPE_STOP, pb.ORDER_TYPE_STOP_LIMIT)
        self.executions: list[tuple[float, float]] = []  # quantity, price
        self.accepted: list[tuple[pb.OrderReport, Filled | None]] = []
        wanted = new(
            order_type=kind,
            quantity=quantity,
            price=100.0 if self.limited else None,
            stop_price=95.0 if self.stopped else None,
        )
        self.first = self.order = lifecycle.created(wanted, "o1", AT, "t1")

    def take(self, report: pb.OrderReport, filled: Filled | None = None) -> None:
        before = self.order.SerializeToString(deterministic=True)
        over = self.order.status in OVER
        try:
            changed = lifecycle.apply(self.order, report, LATER, filled)
        except OrderTerminal:
            assert over and filled is None
        except IllegalTransition:
            assert filled is None
        else:
            assert self.order.SerializeToString(deterministic=True) == before
            if changed is None:
                assert filled is None
                return
            assert filled or not over or changed.status == self.order.status
            self.order = changed
            self.accepted.append((report, filled))
            if not filled:  # a repetition changes nothing
                assert lifecycle.apply(changed, report, LATER) is None

    @rule(
        name=st.sampled_from(REPORTS),
        broker_order_id=st.sampled_from(["b1", "b1", "b1", "b2"]),
    )
    def report(self, name: str, broker_order_id: str) -> None:
        self.take(change(name, broker_order_id=broker_order_id))

    @rule(
        name=st.sampled_from(["REPLACE_REQUESTED", "RESTATED"]),
        share=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
        price=PRICES,
        fits=st.sampled_from([True, True, True, False]),
    )
    def change_terms(self, name: str, share: float, price: float, fits: bool) -> None:
        wanted = pb.Terms(quantity=min(self.order.quantity * share, 1e15))
        if self.limited == fits:
            wanted.price = price
        if self.stopped:
            wanted.stop_price = price
        self.take(change(name, terms=wanted))

    @rule(
        name=st.sampled_from(["CANCEL_REJECTED", "REPLACED", "REPLACE_REJECTED"]),
        stale=st.sampled_from([0, 0, 0, 0, 0, 1, 2]),
        quantity=st.none() | QUANTITIES,
    )
    def answer(self, name: str, stale: int, quantity: float | None) -> None:
        report = change(name)
        report.command_version = max(self.order.pending_version - stale, 0)
        if name == "REPLACED" and quantity:
            report.terms.CopyFrom(lifecycle.terms_of(self.order))
            report.terms.quantity = quantity
        self.take(report)

    @precondition(lambda self: len(self.accepted) >= 4)
    @rule(name=st.sampled_from(["CANCELLED", "REJECTED", "EXPIRED"]))
    def end(self, name: str) -> None:
        self.take(change(name))

    @rule(data=st.data(), price=PRICES)
    def trade(self, data: st.DataObject, price: float) -> None:
        rest = self.order.leaves_quantity or 1.0
        parts = st.sampled_from([rest, rest / 2, rest / 3, rest * 2])
        self.executions.append((min(data.draw(parts | QUANTITIES), 1e15), price))
        self.take(change("TRADE"), self.filled())

    @precondition(lambda self: self.executions)
    @rule(data=st.data(), leaves=st.sampled_from([0.0, 1.0]))
    def bust(self, data: st.DataObject, leaves: float) -> None:
        self.executions.pop(self.any_execution(data))
        self.take(change("TRADE_CANCEL"), self.filled(leaves))

    @precondition(lambda self: self.executions)
    @rule(
        data=st.data(),
        quantity=QUANTITIES,
        price=PRICES,
        leaves=st.sampled_from([0.0, 1.0]),
    )
    def correct(
        self, data: st.DataObject, quantity: float, price: float, leaves: float
    ) -> None:
        self.executions[self.any_execution(data)] = (quantity, price)
        self.take(change("TRADE_CORRECT"), self.filled(leaves))

    def any_execution(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.executions) - 1))

    def filled(self, leaves: float = 0.0) -> Filled:
        quantity = fsum(q for q, _ in self.executions)
        return Filled(quantity, fsum(q * p for q, p in self.executions), leaves)

    @invariant()
    def what_is_filled_is_the_sum_of_the_executions(self) -> None:
        filled = self.filled()
        assert self.order.filled_quantity == filled.quantity
        assert self.order.HasField("avg_fill_price") == bool(self.executions)
        if self.executions:
            assert self.order.avg_fill_price == filled.notional / filled.quantity

    @invariant()
    def the_status_agrees_with_what_is_filled(self) -> None:
        order = self.order
        cum, quantity = order.filled_quantity, order.quantity
        full = cum >= quantity or isclose(cum, quantity, rel_tol=1e-9)
        assert full == (order.status == pb.ORDER_STATUS_FILLED)
        if order.status in (pb.ORDER_STATUS_REJECTED, pb.ORDER_STATUS_PENDING):
            assert cum == 0
        live = order.status in LIVE
        assert order.leaves_quantity == (max(quantity - cum, 0) if live else 0)
        beyond = cum - quantity
        if isclose(cum, quantity, rel_tol=1e-9):
            beyond = 0
        assert order.overfill_quantity == max(beyond, 0)

    @invariant()
    def requests_are_of_live_orders(self) -> None:
        order = self.order
        asked = order.pending_request
        assert bool(asked) == bool(order.pending_version)
        replaces = asked == pb.PENDING_REQUEST_REPLACE
        assert order.HasField("pending_terms") == replaces
        assert order.pending_version <= order.version
        if asked:
            assert order.status in LIVE
        if replaces:
            assert order.status == pb.ORDER_STATUS_OPEN
            assert order.order_type != pb.ORDER_TYPE_MARKET
        if order.outcome_unknown:
            assert asked or order.status == pb.ORDER_STATUS_PENDING

    @invariant()
    def ord_status_has_the_precedence_of_fix(self) -> None:
        order = self.order
        first = {1: "PENDING_CANCEL", 2: "PENDING_REPLACE"}.get(order.pending_request)
        part = order.filled_quantity > 0
        by_status = {
            "PENDING": "PENDING_NEW",
            "OPEN": "PARTIALLY_FILLED" if part else "NEW",
            "CANCELLED": "CANCELED",
        }
        status = status_of(order)
        assert ord_status_of(order) == (first or by_status.get(status, status))

    @invariant()
    def what_never_changes_is_unchanged(self) -> None:
        for field in IMMUTABLE:
            assert getattr(self.order, field) == getattr(self.first, field)
        assert self.order.HasField("price") == self.limited
        assert self.order.HasField("stop_price") == self.stopped
        assert self.stopped or not self.order.HasField("triggered_at")

    @invariant()
    def versions_have_no_gap_and_numbers_are_finite(self) -> None:
        order = self.order
        assert order.version == 1 + len(self.accepted)
        assert order.updated_at == (LATER if self.accepted else AT)
        assert all(
            isfinite(getattr(order, field.name))
            for field in pb.Order.DESCRIPTOR.fields
            if field.type == field.TYPE_DOUBLE
        )

    def teardown(self) -> None:
        order = self.first
        for report, filled in self.accepted:
            order = lifecycle.apply(order, report, LATER, filled) or pb.Order()
        assert order == self.order


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=250, stateful_step_count=25, deadline=None
)
