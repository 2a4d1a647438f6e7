"""The state machine of orders: one table, and what an order becomes by it.

An event is legal where TRANSITIONS has a row for it, and changes nothing where it
says what is known already. GetOrderLifecycle serves the table, and lifecycle_page.py
makes docs/order-lifecycle.md of it.
"""

from collections.abc import Iterator
from math import isclose
from typing import NamedTuple, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.checks import time_us
from quantplane_server.errors import IllegalTransition, OrderTerminal

PENDING = pb.ORDER_STATUS_PENDING
OPEN = pb.ORDER_STATUS_OPEN
FILLED = pb.ORDER_STATUS_FILLED
CANCELLED = pb.ORDER_STATUS_CANCELLED
REJECTED = pb.ORDER_STATUS_REJECTED
EXPIRED = pb.ORDER_STATUS_EXPIRED

CANCEL = pb.PENDING_REQUEST_CANCEL
REPLACE = pb.PENDING_REQUEST_REPLACE

LIVE = (PENDING, OPEN)
STOPS = (pb.ORDER_TYPE_STOP, pb.ORDER_TYPE_STOP_LIMIT)
REVERSALS = (pb.ORDER_EVENT_TYPE_TRADE_CANCEL, pb.ORDER_EVENT_TYPE_TRADE_CORRECT)
FACTS = (pb.ORDER_EVENT_TYPE_TRADE, *REVERSALS)
# What the broker does not say: it leaves outcome_unknown as it is.
OURS = (
    pb.ORDER_EVENT_TYPE_SUBMITTED,
    pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED,
    pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED,
    pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN,
)
TOLERANCE = 1e-9  # relative, of quantities: sums of doubles are not exact

Status: TypeAlias = "pb.OrderStatus.ValueType"
Event: TypeAlias = "pb.OrderEventType.ValueType"


class Filled(NamedTuple):
    """The executions of an order after a fill, a bust or a correction, summed."""

    quantity: float
    notional: float  # the sum of quantity * price
    leaves: float = 0.0  # of a bust or correction: what the broker still works


def _row(
    event: Event,
    before: tuple[Status, ...],
    to: tuple[Status, ...],
    *,
    fix: str = "",
    guard: str = "",
    effect: str = "",
) -> pb.Transition:
    row = pb.Transition(event=event, to=to, fix=fix, guard=guard, effect=effect)
    getattr(row, "from").extend(before)
    return row


def _facts(event: Event, fix: str) -> Iterator[pb.Transition]:
    """Yield what the three facts have in common: no state of an order refuses them."""
    filled = "recomputes what is filled; FILLED once that reaches the quantity"
    acknowledged = f"{filled}; PENDING, the order is thereby acknowledged"
    yield _row(event, LIVE, (OPEN, FILLED), fix=fix, effect=acknowledged)
    for status in (CANCELLED, EXPIRED):
        yield _row(
            event, (status,), (status, FILLED), fix=fix, effect=f"late: {filled}"
        )
    contradicted = (
        "late: recomputes what is filled; above 0, the broker contradicts itself and "
        "the order was not rejected: CANCELLED, or FILLED at the quantity"
    )
    to = (REJECTED, CANCELLED, FILLED)
    yield _row(event, (REJECTED,), to, fix=fix, effect=contradicted)


def _bust(event: Event, fix: str) -> pb.Transition:
    effect = (
        "recomputes what is filled; if that is below the quantity: OPEN where the "
        "broker still works a part (leaves_quantity), else CANCELLED"
    )
    return _row(event, (FILLED,), (FILLED, OPEN, CANCELLED), fix=fix, effect=effect)


TRANSITIONS: tuple[pb.Transition, ...] = (
    _row(
        pb.ORDER_EVENT_TYPE_CREATED,
        (),
        (PENDING,),
        fix="A",
        guard="within the strategy's risk limits",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_DENIED,
        (),
        (REJECTED,),
        fix="8",
        guard="beyond a risk limit",
        effect="kept for audit, with reject_code and error_message",
    ),
    _row(pb.ORDER_EVENT_TYPE_SUBMITTED, (PENDING,), (), effect="sets submitted_at"),
    _row(
        pb.ORDER_EVENT_TYPE_ACKNOWLEDGED,
        (PENDING,),
        (OPEN,),
        fix="0",
        effect="sets broker_order_id",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_ACKNOWLEDGED,
        (OPEN, FILLED),
        (),
        fix="0",
        guard="no broker_order_id yet: a fill came first",
        effect="sets broker_order_id",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_REJECTED,
        (PENDING, OPEN),
        (REJECTED,),
        fix="8",
        guard="nothing is filled",
        effect="sets reject_code and error_message",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_TRIGGERED,
        (OPEN,),
        (),
        fix="D; L since FIX 5.0",
        guard="STOP or STOP_LIMIT",
        effect="sets triggered_at",
    ),
    *_facts(pb.ORDER_EVENT_TYPE_TRADE, "F"),
    _row(
        pb.ORDER_EVENT_TYPE_TRADE,
        (FILLED,),
        (),
        fix="F",
        effect="late: recomputes what is filled; the excess is overfill_quantity",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED,
        (PENDING, OPEN),
        (),
        fix="6",
        effect="pending_request is CANCEL, also in place of REPLACE; while PENDING, "
        "queued behind the order",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_CANCELLED,
        (PENDING, OPEN),
        (CANCELLED,),
        fix="4",
        effect="also without a request, as of what an IOC order leaves",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_CANCEL_REJECTED,
        (PENDING, OPEN),
        (),
        fix="35=9, 434=1",
        guard="pending_request is CANCEL",
        effect="ends the request",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED,
        (OPEN,),
        (),
        fix="E",
        guard="no pending_request; not MARKET; quantity at least what is filled",
        effect="pending_request is REPLACE, pending_terms are what is asked for",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_REPLACED,
        (OPEN,),
        (OPEN, FILLED),
        fix="5",
        guard="pending_request is REPLACE; quantity at least what is filled",
        effect="the terms are in force; FILLED if the quantity is what is filled",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_REPLACE_REJECTED,
        (OPEN,),
        (),
        fix="35=9, 434=2",
        guard="pending_request is REPLACE",
        effect="ends the request",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_EXPIRED,
        (PENDING, OPEN),
        (EXPIRED,),
        fix="C",
        effect="by the end of its time in force",
    ),
    _row(
        pb.ORDER_EVENT_TYPE_RESTATED,
        (OPEN,),
        (OPEN, FILLED),
        fix="D",
        guard="quantity at least what is filled",
        effect="the terms are in force; FILLED if the quantity is what is filled",
    ),
    *_facts(pb.ORDER_EVENT_TYPE_TRADE_CANCEL, "H"),
    _bust(pb.ORDER_EVENT_TYPE_TRADE_CANCEL, "H"),
    *_facts(pb.ORDER_EVENT_TYPE_TRADE_CORRECT, "G"),
    _bust(pb.ORDER_EVENT_TYPE_TRADE_CORRECT, "G"),
    _row(
        pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN,
        (PENDING, OPEN),
        (),
        guard="PENDING, or a pending_request",
        effect="sets outcome_unknown, until the broker says anything new",
    ),
)

LEGAL = {
    (row.event, status): row for row in TRANSITIONS for status in getattr(row, "from")
}
CHANGES = {event for event, _ in LEGAL}

ORD_STATUS = {
    PENDING: pb.ORD_STATUS_PENDING_NEW,
    OPEN: pb.ORD_STATUS_NEW,
    FILLED: pb.ORD_STATUS_FILLED,
    CANCELLED: pb.ORD_STATUS_CANCELED,
    REJECTED: pb.ORD_STATUS_REJECTED,
    EXPIRED: pb.ORD_STATUS_EXPIRED,
}


def created(
    order: pb.NewOrder, order_id: str, at: Timestamp, trace_id: str
) -> pb.Order:
    """Return a new order as it is accepted: PENDING, version 1."""
    made = pb.Order(
        order_id=order_id,
        client_order_id=order.client_order_id,
        strategy_id=order.strategy_id,
        signal_id=order.signal_id,
        symbol=order.symbol,
        side=order.side,
        order_type=order.order_type,
        quantity=order.quantity,
        time_in_force=order.time_in_force or pb.TIME_IN_FORCE_DAY,
        status=PENDING,
        version=1,
        created_at=at,
        updated_at=at,
        trace_id=trace_id,
    )
    if order.HasField("price"):
        made.price = order.price
    if order.HasField("stop_price"):
        made.stop_price = order.stop_price
    return derived(made)


def denied(order: pb.Order, code: str, text: str) -> pb.Order:
    """Return what a created order is instead where a risk limit refuses it."""
    made = pb.Order()
    made.CopyFrom(order)
    made.status = REJECTED
    made.reject_code = code
    made.error_message = text
    return derived(made)


def apply(
    order: pb.Order, change: pb.OrderReport, at: Timestamp, filled: Filled | None = None
) -> pb.Order | None:
    """Return the order after a change, or None where the change says nothing new.

    `change` is of any type but CREATED and DENIED: a broker's report, a request
    (CANCEL_REQUESTED, or REPLACE_REQUESTED with all its terms), or a fact (TRADE,
    TRADE_CANCEL, TRADE_CORRECT), which comes with `filled`. It is checked already,
    and facts are known to be new.

    Raises OrderTerminal, IllegalTransition.
    """
    event = change.type
    if event not in CHANGES:
        raise _illegal(order, event, "that is no change of an order")
    if _is_known(order, change):
        return None
    row = LEGAL.get((event, order.status))
    if row is None:
        if order.status in LIVE:
            raise _illegal(order, event, "GetOrderLifecycle says what can come now")
        raise OrderTerminal(status_name(order.status), event_name(event))
    if objection := _objection(order, change):
        raise _illegal(order, event, objection)
    after = pb.Order()
    after.CopyFrom(order)
    after.version += 1
    after.updated_at.CopyFrom(at)
    if event not in OURS:
        after.outcome_unknown = False
    if len(row.to) == 1:
        after.status = row.to[0]
    if event in FACTS:
        assert filled is not None
        _book(after, filled)
    else:
        _take(after, change, at)
    if after.status not in LIVE:
        _end_request(after)
        after.outcome_unknown = False
    return derived(after)


def is_late(order: pb.Order) -> bool:
    """Tell whether a fill would come after the order was over."""
    return order.status not in LIVE


def ord_status(order: pb.Order) -> "pb.OrdStatus.ValueType":
    """Return FIX tag 39: of what applies, what FIX puts first."""
    if order.pending_request == CANCEL:
        return pb.ORD_STATUS_PENDING_CANCEL
    if order.pending_request == REPLACE:
        return pb.ORD_STATUS_PENDING_REPLACE
    if order.status == OPEN and order.filled_quantity > 0:
        return pb.ORD_STATUS_PARTIALLY_FILLED
    return ORD_STATUS[order.status]


def terms_of(order: pb.Order) -> pb.Terms:
    """Return the terms in force."""
    terms = pb.Terms(quantity=order.quantity)
    if order.HasField("price"):
        terms.price = order.price
    if order.HasField("stop_price"):
        terms.stop_price = order.stop_price
    return terms


def _is_known(order: pb.Order, change: pb.OrderReport) -> bool:
    """Tell whether the order is already as a change would make it."""
    in_force = change.terms == terms_of(order)
    match change.type:
        case pb.ORDER_EVENT_TYPE_SUBMITTED:
            return order.HasField("submitted_at") or order.status == OPEN
        case pb.ORDER_EVENT_TYPE_ACKNOWLEDGED:
            return order.broker_order_id == change.broker_order_id
        case pb.ORDER_EVENT_TYPE_TRIGGERED:
            return order.HasField("triggered_at")
        case pb.ORDER_EVENT_TYPE_CANCELLED:
            return order.status == CANCELLED
        case pb.ORDER_EVENT_TYPE_REJECTED:
            return order.status == REJECTED
        case pb.ORDER_EVENT_TYPE_EXPIRED:
            return order.status == EXPIRED
        case pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED:
            return order.pending_request == CANCEL or order.status == CANCELLED
        case pb.ORDER_EVENT_TYPE_CANCEL_REJECTED:
            return not _answers(order, change, CANCEL)
        case pb.ORDER_EVENT_TYPE_REPLACE_REJECTED:
            return not _answers(order, change, REPLACE)
        case pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED:
            if order.pending_request == REPLACE:
                return change.terms == order.pending_terms
            return in_force
        case pb.ORDER_EVENT_TYPE_REPLACED:
            # Without terms, or naming a command: the answer to an earlier one.
            earlier = change.command_version or not change.HasField("terms")
            return not _answers(order, change, REPLACE) and bool(earlier or in_force)
        case pb.ORDER_EVENT_TYPE_RESTATED:
            return in_force
        case pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN:
            return order.outcome_unknown
    return False


def _answers(
    order: pb.Order, change: pb.OrderReport, request: "pb.PendingRequest.ValueType"
) -> bool:
    """Tell whether a report answers the request that is under way."""
    if order.pending_request != request:
        return False
    return change.command_version in (0, order.pending_version)


def _objection(order: pb.Order, change: pb.OrderReport) -> str:
    """Return which guard of the table a change breaks; empty: none."""
    match change.type:
        case pb.ORDER_EVENT_TYPE_ACKNOWLEDGED if order.broker_order_id:
            return f"the broker named it {order.broker_order_id!r} before"
        case pb.ORDER_EVENT_TYPE_REJECTED if order.filled_quantity > 0:
            return "a part of it is filled"
        case pb.ORDER_EVENT_TYPE_TRIGGERED if order.order_type not in STOPS:
            return "only STOP and STOP_LIMIT orders have a stop price"
        case pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED:
            if order.pending_request:
                return "another request is under way"
            if order.order_type == pb.ORDER_TYPE_MARKET:
                return "a MARKET order can't be replaced"
            return _terms_objection(order, change.terms)
        case pb.ORDER_EVENT_TYPE_REPLACED:
            if order.pending_request != REPLACE:
                return "no replacement is under way; its own changes are RESTATED"
            return _terms_objection(order, _replacement(order, change))
        case pb.ORDER_EVENT_TYPE_RESTATED:
            return _terms_objection(order, change.terms)
        case pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN if order.status == OPEN:
            return "" if order.pending_request else "no request is under way"
    return ""


def _terms_objection(order: pb.Order, terms: pb.Terms) -> str:
    if terms.quantity <= 0:
        return "the quantity must be above 0"
    if terms.HasField("price") != order.HasField("price"):
        return "exactly LIMIT and STOP_LIMIT orders have a price"
    if terms.HasField("stop_price") != order.HasField("stop_price"):
        return "exactly STOP and STOP_LIMIT orders have a stop price"
    if not _reaches(terms.quantity, order.filled_quantity):
        return f"{order.filled_quantity:g} of it are filled"
    return ""


def _replacement(order: pb.Order, change: pb.OrderReport) -> pb.Terms:
    """Return the terms in force after REPLACED."""
    return change.terms if change.HasField("terms") else order.pending_terms


def _take(order: pb.Order, change: pb.OrderReport, at: Timestamp) -> None:
    """Put what a change says, besides a status, into the order."""
    match change.type:
        case pb.ORDER_EVENT_TYPE_SUBMITTED:
            order.submitted_at.CopyFrom(at)
        case pb.ORDER_EVENT_TYPE_ACKNOWLEDGED:
            order.broker_order_id = change.broker_order_id
        case pb.ORDER_EVENT_TYPE_REJECTED:
            order.reject_code = change.code
            order.error_message = change.text
        case pb.ORDER_EVENT_TYPE_TRIGGERED:
            when = change.time if change.HasField("time") else at
            order.triggered_at.FromMicroseconds(time_us(when))
        case pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED:
            order.pending_request = CANCEL
            order.pending_version = order.version
            order.ClearField("pending_terms")
        case pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED:
            order.pending_request = REPLACE
            order.pending_version = order.version
            order.pending_terms.CopyFrom(change.terms)
        case pb.ORDER_EVENT_TYPE_CANCEL_REJECTED | pb.ORDER_EVENT_TYPE_REPLACE_REJECTED:
            _end_request(order)
        case pb.ORDER_EVENT_TYPE_REPLACED:
            _put_in_force(order, _replacement(order, change))
            _end_request(order)
        case pb.ORDER_EVENT_TYPE_RESTATED:
            _put_in_force(order, change.terms)
        case pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN:
            order.outcome_unknown = True


def _book(order: pb.Order, filled: Filled) -> None:
    order.filled_quantity = filled.quantity
    if filled.quantity > 0:
        order.avg_fill_price = filled.notional / filled.quantity
    else:
        order.ClearField("avg_fill_price")
    if _reaches(order.filled_quantity, order.quantity):
        order.status = FILLED
    elif order.status == PENDING:
        order.status = OPEN
    elif order.status == FILLED:
        order.status = OPEN if filled.leaves > 0 else CANCELLED
    elif order.status == REJECTED and filled.quantity > 0:
        order.status = CANCELLED


def _put_in_force(order: pb.Order, terms: pb.Terms) -> None:
    order.quantity = terms.quantity
    if terms.HasField("price"):
        order.price = terms.price
    if terms.HasField("stop_price"):
        order.stop_price = terms.stop_price
    order.status = FILLED if _reaches(order.filled_quantity, order.quantity) else OPEN


def _end_request(order: pb.Order) -> None:
    for field in ("pending_request", "pending_version", "pending_terms"):
        order.ClearField(field)


def derived(order: pb.Order) -> pb.Order:
    """Fill in what follows from the other fields."""
    beyond = order.filled_quantity - order.quantity
    exact = isclose(order.filled_quantity, order.quantity, rel_tol=TOLERANCE)
    order.overfill_quantity = 0.0 if exact else max(beyond, 0.0)
    order.leaves_quantity = max(-beyond, 0.0) if order.status in LIVE else 0.0
    order.ord_status = ord_status(order)
    return order


def _reaches(quantity: float, least: float) -> bool:
    return quantity >= least or isclose(quantity, least, rel_tol=TOLERANCE)


def _illegal(order: pb.Order, event: Event, why: str) -> IllegalTransition:
    status, name = status_name(order.status), event_name(event)
    return IllegalTransition(
        f"the order is {status} and can't take {name}: {why}", status=status, event=name
    )


def status_name(status: Status) -> str:
    return pb.OrderStatus.Name(status).removeprefix("ORDER_STATUS_")


def event_name(event: Event) -> str:
    if event not in pb.OrderEventType.values():  # proto3 enums are open
        return str(event)
    return pb.OrderEventType.Name(event).removeprefix("ORDER_EVENT_TYPE_")
