"""The rules of requests about orders, as their proto comments state them."""

from collections.abc import Sequence
from math import inf
from typing import Any, Literal

from quantplane import v1 as pb
from quantplane_server.checks import (
    AMOUNT,
    ID,
    MAX_AMOUNT,
    SYMBOL,
    TIME,
    Checks,
    is_amount,
    is_id,
    is_name,
    is_time,
)
from quantplane_server.constraints import RULES
from quantplane_server.orders.lifecycle import REVERSALS, STOPS

MAX_BATCH = 1_000
MAX_NAMES = 1_000

VERSION = "must be at least 0"
TERMS = "at least one of quantity, price and stop_price must be given"

PRICED = (pb.ORDER_TYPE_LIMIT, pb.ORDER_TYPE_STOP_LIMIT)
# Field -> the order types that have it, and their names.
PRICES: dict[Literal["price", "stop_price"], tuple[tuple[int, ...], str]] = {
    "price": (PRICED, "LIMIT and STOP_LIMIT"),
    "stop_price": (STOPS, "STOP and STOP_LIMIT"),
}
REPORTED = (
    pb.ORDER_EVENT_TYPE_SUBMITTED,
    pb.ORDER_EVENT_TYPE_ACKNOWLEDGED,
    pb.ORDER_EVENT_TYPE_REJECTED,
    pb.ORDER_EVENT_TYPE_TRIGGERED,
    pb.ORDER_EVENT_TYPE_CANCELLED,
    pb.ORDER_EVENT_TYPE_CANCEL_REJECTED,
    pb.ORDER_EVENT_TYPE_REPLACED,
    pb.ORDER_EVENT_TYPE_REPLACE_REJECTED,
    pb.ORDER_EVENT_TYPE_EXPIRED,
    pb.ORDER_EVENT_TYPE_RESTATED,
    pb.ORDER_EVENT_TYPE_OUTCOME_UNKNOWN,
)
REPORT_TYPE = (
    "must be SUBMITTED, ACKNOWLEDGED, REJECTED, TRIGGERED, CANCELLED, "
    "CANCEL_REJECTED, REPLACED, REPLACE_REJECTED, EXPIRED, RESTATED or OUTCOME_UNKNOWN"
)
FILLS = (pb.ORDER_EVENT_TYPE_UNSPECIFIED, pb.ORDER_EVENT_TYPE_TRADE)
EXECUTION_TYPE = "must be TRADE, TRADE_CANCEL or TRADE_CORRECT"
WITH_TERMS = (pb.ORDER_EVENT_TYPE_REPLACED, pb.ORDER_EVENT_TYPE_RESTATED)


def check_new_order(order: pb.NewOrder, at: str = "order.") -> None:
    with Checks() as check:
        for field in ("client_order_id", "strategy_id", "symbol"):
            check(is_name(getattr(order, field)), at + field, SYMBOL)
        _check_uuid_or_empty(check, order.signal_id, at + "signal_id")
        check.constraint("valid_order_side", is_known(pb.Side, order.side), at)
        typed = is_known(pb.OrderType, order.order_type)
        check.constraint("valid_order_type", typed, at)
        _check_quantity(check, order.quantity, at)
        for field, (types, names) in PRICES.items():
            fits = order.HasField(field) == (order.order_type in types)
            check(fits or not typed, at + field, f"must be given exactly for {names}")
        _check_prices(check, order, at)
        lasts = order.time_in_force in pb.TimeInForce.values()
        check.constraint("valid_time_in_force", lasts, at)


def check_batch(items: Sequence[object], field: str) -> None:
    with Checks() as check:
        inside = 0 < len(items) <= MAX_BATCH
        check(inside, field, f"must be 1 to {MAX_BATCH:,} {field}")


def check_cancel(request: pb.CancelOrderRequest) -> None:
    with Checks() as check:
        _check_id(check, request)
        check(request.version >= 0, "version", VERSION)


def check_replace(request: pb.ReplaceOrderRequest) -> None:
    with Checks() as check:
        _check_id(check, request)
        sized = request.HasField("quantity")
        check(sized or any(map(request.HasField, PRICES)), "quantity", TERMS)
        if sized:
            _check_quantity(check, request.quantity)
        _check_prices(check, request)
        check(request.version >= 0, "version", VERSION)


def check_terms(order: pb.Order, request: pb.ReplaceOrderRequest) -> pb.Terms:
    """Return all terms that a replacement asks for, as it is where it says nothing.

    Raises InvalidRequest for a price that the order's type does not have.
    """
    terms = pb.Terms(quantity=order.quantity)
    if request.HasField("quantity"):
        terms.quantity = request.quantity
    with Checks() as check:
        for field, (types, names) in PRICES.items():
            if order.order_type in types:
                source = request if request.HasField(field) else order
                setattr(terms, field, getattr(source, field))
            else:
                rule = f"must be omitted: only {names} orders have it"
                check(not request.HasField(field), field, rule)
    return terms


def check_get_order(request: pb.GetOrderRequest) -> None:
    with Checks() as check:
        _check_id(check, request)


def check_list_orders(request: pb.ListOrdersRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        known = pb.OrderStatus.values()[1:]
        few = len(request.statuses) <= len(known)
        check(few, "statuses", f"must be at most {len(known)} statuses")
        for i, status in enumerate(request.statuses[: len(known)]):
            field = f"statuses[{i}]"
            check(status in known, field, RULES["valid_order_status"][1])
        _check_uuid_or_empty(check, request.signal_id, "signal_id")
        check.time_range(request)
        check.page_size(request)


def check_list_executions(request: pb.ListExecutionsRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        _check_uuid_or_empty(check, request.order_id, "order_id")
        check.time_range(request)
        check.page_size(request)


def check_lineage(request: pb.GetLineageRequest) -> None:
    with Checks() as check:
        field = request.WhichOneof("id")
        if field:
            check(is_id(getattr(request, field)), field, ID)
        else:
            check(False, "signal_id", "this or order_id must be given")


def check_watch_orders(request: pb.WatchOrdersRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        check.heartbeat(request)


def check_watch_commands(request: pb.WatchBrokerCommandsRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        check.heartbeat(request)


def check_report(report: pb.OrderReport) -> None:
    with Checks() as check:
        check(is_id(report.order_id), "order_id", ID)
        check(report.type in REPORTED, "type", REPORT_TYPE)
        if report.HasField("time"):
            check(is_time(report.time), "time", TIME)
        named = report.type == pb.ORDER_EVENT_TYPE_ACKNOWLEDGED
        if named or report.broker_order_id:
            check(is_name(report.broker_order_id), "broker_order_id", SYMBOL)
        _check_text(check, report.code, "code", 64)
        _check_text(check, report.text, "text", 1_000)
        _check_reported_terms(check, report)
        check(report.command_version >= 0, "command_version", VERSION)


def check_execution(report: pb.ExecutionReport) -> None:
    with Checks() as check:
        check(is_id(report.order_id), "order_id", ID)
        filled = report.type in FILLS
        reversed_ = report.type in REVERSALS
        check(filled or reversed_, "type", EXECUTION_TYPE)
        check(is_name(report.broker_exec_id), "broker_exec_id", SYMBOL)
        ref = report.ref_broker_exec_id
        if reversed_:
            check(is_name(ref), "ref_broker_exec_id", SYMBOL)
            other = ref != report.broker_exec_id
            check(other, "ref_broker_exec_id", "must differ from broker_exec_id")
        else:
            check(not ref, "ref_broker_exec_id", "must be empty for TRADE")
        check(is_name(report.symbol), "symbol", SYMBOL)
        check.constraint("valid_execution_side", is_known(pb.Side, report.side))
        if report.type != pb.ORDER_EVENT_TYPE_TRADE_CANCEL:
            _check_quantity(check, report.quantity)
            check(is_amount(report.price), "price", AMOUNT)
        check(is_amount(report.commission), "commission", AMOUNT)
        if report.venue:
            check(is_name(report.venue), "venue", SYMBOL)
        check(report.HasField("time") and is_time(report.time), "time", TIME)
        leaves = report.leaves_quantity
        check(0 <= leaves <= MAX_AMOUNT, "leaves_quantity", "must be 0 to 1e15")


def is_known(kind: Any, value: int) -> bool:
    """Tell whether an enum has this value, and it is not UNSPECIFIED."""
    return value != 0 and value in kind.values()


def _check_uuid_or_empty(check: Checks, text: str, field: str) -> None:
    check(not text or is_id(text), field, ID)


def _check_quantity(check: Checks, value: float, at: str = "") -> None:
    check.constraint("valid_order_quantity", 0 < value < inf, at)
    check(not MAX_AMOUNT < value < inf, at + "quantity", "must be at most 1e15")


def _check_prices(
    check: Checks, terms: pb.Terms | pb.NewOrder | pb.ReplaceOrderRequest, at: str = ""
) -> None:
    for field in PRICES:
        check(is_amount(getattr(terms, field)), at + field, AMOUNT)


def _check_id(
    check: Checks,
    request: pb.CancelOrderRequest | pb.ReplaceOrderRequest | pb.GetOrderRequest,
) -> None:
    match request.WhichOneof("id"):
        case "order_id":
            check(is_id(request.order_id), "order_id", ID)
        case "client_order_id":
            for field in ("strategy_id", "client_order_id"):
                name = getattr(request.client_order_id, field)
                check(is_name(name), f"client_order_id.{field}", SYMBOL)
        case _:
            check(False, "order_id", "this or client_order_id must be given")


def _check_filter(check: Checks, wanted: pb.OrderFilter) -> None:
    for field in ("strategy_ids", "symbols"):
        names = getattr(wanted, field)
        few = len(names) <= MAX_NAMES
        check(few, f"filter.{field}", f"must be at most {MAX_NAMES:,}")
        for i, name in enumerate(names[:MAX_NAMES]):
            check(is_name(name), f"filter.{field}[{i}]", SYMBOL)


def _check_text(check: Checks, text: str, field: str, at_most: int) -> None:
    # The database keeps no NUL in a text.
    kept = len(text) <= at_most and "\0" not in text
    check(kept, field, f"must be at most {at_most:,} characters, without NUL")


def _check_reported_terms(check: Checks, report: pb.OrderReport) -> None:
    if report.HasField("terms"):
        check(report.type in WITH_TERMS, "terms", "must be omitted for this type")
        _check_quantity(check, report.terms.quantity, "terms.")
        _check_prices(check, report.terms, "terms.")
    else:
        restated = report.type == pb.ORDER_EVENT_TYPE_RESTATED
        check(not restated, "terms", "must be given for RESTATED")
