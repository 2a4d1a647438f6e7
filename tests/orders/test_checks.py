"""Every rule of a request about orders is named by its field, all at once."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.constraints import RULES
from quantplane_server.errors import InvalidRequest
from quantplane_server.orders import checks

ID = "0190d5a0-0000-7000-8000-000000000001"
AT = Timestamp(seconds=1_700_000_000)
NAN, INF = float("nan"), float("inf")
NOT_NAMES = ["", " a", "a ", "a\n", "a" * 65, "a\0"]
NOT_IDS = [
    *("x", ID.upper(), ID.replace("-", ""), f"{{{ID}}}", f"urn:uuid:{ID}", ID + "\n"),
]
NOT_QUANTITIES = [0.0, -1.0, NAN, INF, -INF, 1.01e15, 1e308]
NOT_PRICES = [NAN, INF, -INF, 1.01e15, -1.01e15]


def violations(check: Callable[..., None], *given: Any) -> set[str]:
    """Return the fields that a check refuses."""
    try:
        check(*given)
    except InvalidRequest as error:
        return {field for field, _ in error.violations}
    return set()


def rules(check: Callable[..., None], *given: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        check(*given)
    return dict(caught.value.violations)


def changed(message: Any, **fields: Any) -> Any:
    """Return a message with other fields; None clears one."""
    made = type(message)()
    made.CopyFrom(message)
    for field, value in fields.items():
        made.ClearField(field)
        if value is not None:
            made.MergeFrom(type(message)(**{field: value}))
    return made


# --- New orders ---

LIMIT = pb.NewOrder(
    client_order_id="c1",
    strategy_id="s1",
    signal_id=ID,
    symbol="AAPL",
    side=pb.SIDE_SELL,
    order_type=pb.ORDER_TYPE_LIMIT,
    quantity=10.0,
    price=100.0,
    time_in_force=pb.TIME_IN_FORCE_IOC,
)
MARKET = changed(LIMIT, order_type=pb.ORDER_TYPE_MARKET, price=None)
STOP = changed(MARKET, order_type=pb.ORDER_TYPE_STOP, stop_price=95.0)
STOP_LIMIT = changed(STOP, order_type=pb.ORDER_TYPE_STOP_LIMIT, price=94.0)


@pytest.mark.parametrize(
    "order",
    [
        *(LIMIT, MARKET, STOP, STOP_LIMIT),
        changed(LIMIT, signal_id=None),
        changed(LIMIT, time_in_force=None),
        changed(LIMIT, quantity=1e15, price=-1e15),
        changed(LIMIT, price=0.0),
    ],
)
def test_a_good_order_is_accepted(order: pb.NewOrder):
    assert violations(checks.check_new_order, order) == set()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("client_order_id", name) for name in NOT_NAMES),
        *(("strategy_id", name) for name in NOT_NAMES),
        *(("symbol", name) for name in NOT_NAMES),
        *(("signal_id", text) for text in NOT_IDS),
        *(("side", value) for value in (0, 3)),
        *(("order_type", value) for value in (0, 5)),
        *(("quantity", value) for value in NOT_QUANTITIES),
        *(("price", value) for value in (None, *NOT_PRICES)),
        ("stop_price", 1.0),
        ("time_in_force", 5),
    ],
)
def test_a_bad_field_of_an_order_is_named(field: str, value: Any):
    order = changed(LIMIT, **{field: value})
    assert violations(checks.check_new_order, order) == {f"order.{field}"}


@pytest.mark.parametrize(
    ("order", "fields"),
    [
        (changed(MARKET, price=1.0, stop_price=1.0), {"price", "stop_price"}),
        (changed(STOP, price=1.0), {"price"}),
        (changed(STOP, stop_price=None), {"stop_price"}),
        (changed(STOP_LIMIT, price=None, stop_price=None), {"price", "stop_price"}),
    ],
)
def test_an_order_has_exactly_the_prices_of_its_type(
    order: pb.NewOrder, fields: set[str]
):
    assert violations(checks.check_new_order, order, "") == fields


def test_everything_that_is_wrong_with_an_order_is_said_at_once():
    assert violations(checks.check_new_order, pb.NewOrder(), "orders[3].") == {
        *("orders[3].client_order_id", "orders[3].strategy_id", "orders[3].symbol"),
        *("orders[3].side", "orders[3].order_type", "orders[3].quantity"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("valid_order_side", "valid_order_type", "valid_order_quantity"),
        "valid_time_in_force",
    ],
)
def test_the_constraints_of_the_database_are_said_in_their_words(name: str):
    order = pb.NewOrder(time_in_force=9)  # type: ignore[arg-type]
    field, rule = RULES[name]
    assert rules(checks.check_new_order, order)[f"order.{field}"] == rule


# --- Batches ---


@pytest.mark.parametrize(("n", "refused"), [(0, 1), (1, 0), (1_000, 0), (1_001, 1)])
def test_a_batch_has_1_to_1000_items(n: int, refused: int):
    assert len(violations(checks.check_batch, [None] * n, "orders")) == refused


def test_a_batch_is_refused_by_its_name():
    assert rules(checks.check_batch, [], "reports") == {
        "reports": "must be 1 to 1,000 reports"
    }


# --- Which order ---

BY_NAME = pb.ClientOrderId(strategy_id="s1", client_order_id="c1")
OF_ONE: list[tuple[Callable[..., None], Any]] = [
    (checks.check_cancel, pb.CancelOrderRequest()),
    (checks.check_replace, pb.ReplaceOrderRequest(quantity=1.0)),
    (checks.check_get_order, pb.GetOrderRequest()),
]


@pytest.mark.parametrize(("check", "request_"), OF_ONE)
def test_an_order_is_named_by_its_id_or_the_strategys_name(
    check: Callable[..., None], request_: Any
):
    assert violations(check, changed(request_, order_id=ID)) == set()
    assert violations(check, changed(request_, client_order_id=BY_NAME)) == set()


@pytest.mark.parametrize(("check", "request_"), OF_ONE)
def test_an_order_must_be_named(check: Callable[..., None], request_: Any):
    assert violations(check, request_) == {"order_id"}
    assert violations(check, changed(request_, order_id="")) == {"order_id"}
    empty = changed(request_, client_order_id=pb.ClientOrderId())
    assert violations(check, empty) == {
        "client_order_id.strategy_id",
        "client_order_id.client_order_id",
    }


@pytest.mark.parametrize("text", NOT_IDS)
def test_an_id_is_canonical(text: str):
    request = pb.GetOrderRequest(order_id=text)
    assert violations(checks.check_get_order, request) == {"order_id"}


@pytest.mark.parametrize(("check", "request_"), OF_ONE[:2])
def test_a_version_is_not_negative(check: Callable[..., None], request_: Any):
    request = changed(request_, order_id=ID, version=-1)
    assert violations(check, request) == {"version"}


# --- Replacements ---


def replacement(**fields: Any) -> pb.ReplaceOrderRequest:
    return pb.ReplaceOrderRequest(order_id=ID, **fields)


@pytest.mark.parametrize("field", ["quantity", "price", "stop_price"])
def test_one_term_is_enough(field: str):
    assert violations(checks.check_replace, replacement(**{field: 1.0})) == set()


def test_a_replacement_has_a_term():
    assert violations(checks.check_replace, replacement()) == {"quantity"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("quantity", value) for value in NOT_QUANTITIES),
        *(("price", value) for value in NOT_PRICES),
        *(("stop_price", value) for value in NOT_PRICES),
    ],
)
def test_a_bad_term_is_named(field: str, value: float):
    assert violations(checks.check_replace, replacement(**{field: value})) == {field}


STOP_LIMIT_ORDER = pb.Order(
    order_type=pb.ORDER_TYPE_STOP_LIMIT, quantity=10.0, price=94.0, stop_price=95.0
)


def test_terms_are_as_they_were_where_nothing_is_said():
    asked = replacement(price=93.0)
    expected = pb.Terms(quantity=10.0, price=93.0, stop_price=95.0)
    assert checks.check_terms(STOP_LIMIT_ORDER, asked) == expected


def test_terms_are_what_is_asked_for():
    asked = replacement(quantity=5.0, price=0.0, stop_price=-1.0)
    expected = pb.Terms(quantity=5.0, price=0.0, stop_price=-1.0)
    assert checks.check_terms(STOP_LIMIT_ORDER, asked) == expected


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (pb.ORDER_TYPE_MARKET, {"price", "stop_price"}),
        (pb.ORDER_TYPE_LIMIT, {"stop_price"}),
        (pb.ORDER_TYPE_STOP, {"price"}),
        (pb.ORDER_TYPE_STOP_LIMIT, set()),
    ],
)
def test_terms_have_only_the_prices_of_the_type(kind: Any, fields: set[str]):
    order = pb.Order(order_type=kind, quantity=10.0)
    asked = replacement(price=1.0, stop_price=1.0)
    assert violations(checks.check_terms, order, asked) == fields


def test_terms_of_a_market_order_are_its_quantity():
    order = pb.Order(order_type=pb.ORDER_TYPE_MARKET, quantity=10.0)
    terms = checks.check_terms(order, replacement(quantity=5.0))
    assert terms == pb.Terms(quantity=5.0)


# --- Lists and streams ---

FILTERED: list[tuple[Callable[..., None], Any]] = [
    (checks.check_list_orders, pb.ListOrdersRequest),
    (checks.check_list_executions, pb.ListExecutionsRequest),
    (checks.check_watch_orders, pb.WatchOrdersRequest),
    (checks.check_watch_commands, pb.WatchBrokerCommandsRequest),
]


@pytest.mark.parametrize(("check", "kind"), FILTERED)
def test_a_filter_has_at_most_1000_names_of_each(check: Callable[..., None], kind: Any):
    assert violations(check, kind()) == set()
    most = [f"s{i}" for i in range(1_000)]
    given = kind(filter=pb.OrderFilter(strategy_ids=most, symbols=most))
    assert violations(check, given) == set()
    given.filter.strategy_ids.append("x")
    given.filter.symbols.append("x")
    assert violations(check, given) == {"filter.strategy_ids", "filter.symbols"}


@pytest.mark.parametrize(("check", "kind"), FILTERED)
def test_a_bad_name_in_a_filter_is_named(check: Callable[..., None], kind: Any):
    given = kind(filter=pb.OrderFilter(strategy_ids=["a", ""], symbols=[" b"]))
    assert violations(check, given) == {"filter.strategy_ids[1]", "filter.symbols[0]"}


@pytest.mark.parametrize(("check", "kind"), FILTERED[:2])
def test_a_list_has_its_bounds(check: Callable[..., None], kind: Any):
    for field in ("start_time", "end_time"):
        given = kind(**{field: Timestamp(seconds=253_402_300_800)})
        assert violations(check, given) == {field}
    given = kind(page_size=10_001)
    assert violations(check, given) == {"page_size"}
    given = kind(start_time=AT, end_time=Timestamp(seconds=1), page_size=-1)
    assert violations(check, given) == {"end_time", "page_size"}


@pytest.mark.parametrize(("check", "kind"), FILTERED[2:])
@pytest.mark.parametrize("seconds", [0, 61])
def test_a_heartbeat_is_1_to_60_s(check: Callable[..., None], kind: Any, seconds: int):
    given = kind(heartbeat_interval=Duration(seconds=seconds))
    assert violations(check, given) == {"heartbeat_interval"}


def test_statuses_are_known():
    request = pb.ListOrdersRequest(statuses=[1, 0, 6, 7])  # type: ignore[list-item]
    found = rules(checks.check_list_orders, request)
    rule = RULES["valid_order_status"][1]
    assert found == {"statuses[1]": rule, "statuses[3]": rule}


def test_statuses_are_no_more_than_there_are():
    request = pb.ListOrdersRequest(statuses=[pb.ORDER_STATUS_OPEN] * 7)
    assert violations(checks.check_list_orders, request) == {"statuses"}


@pytest.mark.parametrize("text", NOT_IDS)
def test_a_list_is_of_a_canonical_id(text: str):
    orders = pb.ListOrdersRequest(signal_id=text)
    assert violations(checks.check_list_orders, orders) == {"signal_id"}
    executions = pb.ListExecutionsRequest(order_id=text)
    assert violations(checks.check_list_executions, executions) == {"order_id"}


@pytest.mark.parametrize("field", ["signal_id", "order_id"])
def test_a_lineage_is_of_a_signal_or_an_order(field: str):
    check, kind = checks.check_lineage, pb.GetLineageRequest
    assert violations(check, kind(**{field: ID})) == set()
    assert violations(check, kind(**{field: "x"})) == {field}
    assert violations(check, kind(**{field: ""})) == {field}
    assert violations(check, kind()) == {"signal_id"}


# --- Reports ---

REPORT = pb.OrderReport(
    order_id=ID,
    type=pb.ORDER_EVENT_TYPE_REPLACED,
    time=AT,
    broker_order_id="b1",
    code="c" * 64,
    text="t" * 1_000,
    terms=pb.Terms(quantity=1.0, price=1.0, stop_price=1.0),
    command_version=3,
)


def test_a_good_report_is_accepted():
    assert violations(checks.check_report, REPORT) == set()


@pytest.mark.parametrize("number", [*pb.OrderEventType.values(), 99])
def test_a_report_is_of_what_brokers_say(number: Any):
    said = number in {3, 4, 5, 6, 9, 10, 12, 13, 14, 15, 18}
    report = changed(REPORT, type=number, terms=None)
    assert ("type" in violations(checks.check_report, report)) != said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("order_id", text) for text in ("", *NOT_IDS)),
        ("time", Timestamp(seconds=253_402_300_800)),
        *(("broker_order_id", name) for name in NOT_NAMES[1:]),
        *(("code", text) for text in ("c" * 65, "a\0")),
        *(("text", text) for text in ("t" * 1_001, "a\0")),
        ("command_version", -1),
    ],
)
def test_a_bad_field_of_a_report_is_named(field: str, value: Any):
    report = changed(REPORT, **{field: value})
    assert violations(checks.check_report, report) == {field}


@pytest.mark.parametrize("name", NOT_NAMES)
def test_an_acknowledgement_has_the_brokers_name(name: str):
    report = pb.OrderReport(
        order_id=ID, type=pb.ORDER_EVENT_TYPE_ACKNOWLEDGED, broker_order_id=name
    )
    assert violations(checks.check_report, report) == {"broker_order_id"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("quantity", value) for value in NOT_QUANTITIES),
        *(("price", value) for value in NOT_PRICES),
        *(("stop_price", value) for value in NOT_PRICES),
    ],
)
def test_a_bad_term_of_a_report_is_named(field: str, value: float):
    report = changed(REPORT)
    setattr(report.terms, field, value)
    assert violations(checks.check_report, report) == {f"terms.{field}"}


def test_restated_has_terms():
    report = changed(REPORT, type=pb.ORDER_EVENT_TYPE_RESTATED, terms=None)
    assert violations(checks.check_report, report) == {"terms"}


def test_only_replaced_and_restated_have_terms():
    report = changed(REPORT, type=pb.ORDER_EVENT_TYPE_CANCELLED)
    assert violations(checks.check_report, report) == {"terms"}


# --- Executions ---

TRADE = pb.ExecutionReport(
    order_id=ID,
    broker_exec_id="e1",
    symbol="AAPL",
    side=pb.SIDE_BUY,
    quantity=4.0,
    price=-1.0,
    commission=-0.5,
    venue="XNAS",
    time=AT,
)
CORRECT = changed(
    TRADE, type=pb.ORDER_EVENT_TYPE_TRADE_CORRECT, ref_broker_exec_id="e0"
)
BUST = changed(
    CORRECT, type=pb.ORDER_EVENT_TYPE_TRADE_CANCEL, quantity=None, price=None
)


@pytest.mark.parametrize(
    "report",
    [
        *(TRADE, CORRECT, BUST),
        changed(TRADE, type=pb.ORDER_EVENT_TYPE_TRADE, venue=None, price=None),
        changed(CORRECT, leaves_quantity=1e15),
    ],
)
def test_a_good_execution_is_accepted(report: pb.ExecutionReport):
    assert violations(checks.check_execution, report) == set()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("order_id", text) for text in ("", *NOT_IDS)),
        *(("type", number) for number in (3, 9, 18, 99)),
        *(("broker_exec_id", name) for name in NOT_NAMES),
        ("ref_broker_exec_id", "e0"),
        *(("symbol", name) for name in NOT_NAMES),
        *(("side", value) for value in (0, 3)),
        *(("quantity", value) for value in NOT_QUANTITIES),
        *(("price", value) for value in NOT_PRICES),
        *(("commission", value) for value in NOT_PRICES),
        *(("venue", name) for name in NOT_NAMES[1:]),
        *(("time", value) for value in (None, Timestamp(seconds=253_402_300_800))),
        *(("leaves_quantity", value) for value in (-1.0, NAN, INF, 1.01e15)),
    ],
)
def test_a_bad_field_of_an_execution_is_named(field: str, value: Any):
    report = changed(TRADE, **{field: value})
    assert violations(checks.check_execution, report) == {field}


@pytest.mark.parametrize("report", [CORRECT, BUST])
@pytest.mark.parametrize("name", [*NOT_NAMES, "e1"])
def test_what_takes_a_fill_back_names_another(report: pb.ExecutionReport, name: str):
    bad = changed(report, ref_broker_exec_id=name)
    assert violations(checks.check_execution, bad) == {"ref_broker_exec_id"}


def test_a_correction_says_what_is_right():
    bad = changed(CORRECT, quantity=None)
    assert violations(checks.check_execution, bad) == {"quantity"}
