"""What the paper broker's book makes of commands and quotes."""

from typing import Any

import pytest

from quantplane import v1 as pb
from quantplane_server.paper.book import Book, Commission
from tests.paper import START_NS, command, fills, order, quote, said

BUY, SELL = pb.SIDE_BUY, pb.SIDE_SELL
LIMIT = {"order_type": pb.ORDER_TYPE_LIMIT}
STOP = {"order_type": pb.ORDER_TYPE_STOP}
STOP_LIMIT = {"order_type": pb.ORDER_TYPE_STOP_LIMIT}
IOC = {"time_in_force": pb.TIME_IN_FORCE_IOC}
FOK = {"time_in_force": pb.TIME_IN_FORCE_FOK}


def book_with(*orders: pb.Order, commission: Commission | None = None) -> Book:
    book = Book(commission or Commission())
    for each in orders:
        book.take(command("NEW", each))
    return book


def asked(first: pb.Order, **terms: float) -> pb.BrokerCommand:
    """Return the command to change an order, at its version 3."""
    changed = pb.Order()
    changed.CopyFrom(first)
    changed.version = 3
    changed.pending_terms.CopyFrom(pb.Terms(**terms))
    return command("REPLACE", changed)


# --- accepting ----------------------------------------------------------------


def test_a_new_order_is_submitted_and_acknowledged_under_a_name_of_its_id():
    submitted, acknowledged = Book(Commission()).take(command("NEW", order(7)))
    assert said(submitted) == "SUBMITTED"
    assert said(acknowledged) == "ACKNOWLEDGED"
    assert acknowledged.broker_order_id == "paper-00000000000000000000000000000007"


def test_an_order_that_a_predecessor_submitted_goes_on():
    known = order()
    known.submitted_at.FromNanoseconds(START_NS)
    reports = Book(Commission()).take(command("NEW", known, revision=0))
    assert [said(report) for report in reports] == ["ACKNOWLEDGED"]


def test_an_order_that_works_is_not_told_again():
    known = order(broker_order_id="paper-1", status=pb.ORDER_STATUS_OPEN)
    known.submitted_at.FromNanoseconds(START_NS)
    assert Book(Commission()).take(command("WORKING", known, revision=0)) == []


# --- filling ------------------------------------------------------------------


@pytest.mark.parametrize(("side", "price"), [(BUY, 100.5), (SELL, 99.5)])
def test_a_market_order_fills_on_its_side_of_the_quote(side: Any, price: float):
    book = book_with(order(side=side))
    assert fills(book.see(quote(1, 99.5, 100.5))) == [(10, price)]


def test_a_fill_names_its_number_its_quote_and_its_time():
    (fill,) = book_with(order()).see(quote(3, 99, 101))
    assert isinstance(fill, pb.ExecutionReport)
    assert fill.broker_exec_id == f"1@{START_NS + 3_000}"
    assert fill.time.ToNanoseconds() == START_NS + 3_000
    assert (fill.venue, fill.symbol, fill.side) == ("paper", "A", BUY)


def test_an_order_fills_at_the_latest_quote_when_it_comes():
    book = book_with()
    book.see(quote(1, 99, 101))
    assert fills(book.take(command("NEW", order()))) == [(10, 101)]


def test_an_order_waits_for_a_quote_that_has_its_side():
    book = book_with(order())
    assert book.see(quote(1, 99, None)) == []
    assert fills(book.see(quote(2, None, 101))) == [(10, 101)]


@pytest.mark.parametrize(
    ("side", "limit", "filled"),
    [(BUY, 101, True), (BUY, 100.9, False), (SELL, 99, True), (SELL, 99.1, False)],
)
def test_a_limit_order_fills_at_the_quote_if_that_is_within_its_limit(
    side: Any, limit: float, filled: bool
):
    book = book_with(order(side=side, price=limit, **LIMIT))
    assert bool(fills(book.see(quote(1, 99, 101)))) == filled


def test_what_the_size_leaves_waits_for_the_next_quote():
    book = book_with(order())
    assert fills(book.see(quote(1, 99, 101, ask_size=4))) == [(4, 101)]
    assert book.see(quote(1, 99, 101, ask_size=4)) == []  # the same one again
    last = book.see(quote(2, 99, 102, ask_size=40))
    assert fills(last) == [(6, 102)]
    assert last[0].broker_exec_id.startswith("2@")
    assert not book.symbols


def test_orders_use_up_a_size_as_they_came():
    book = book_with(order(1), order(2), order(3))
    reports = book.see(quote(1, 99, 101, ask_size=15))
    filled = [report.order_id for report in reports]
    assert filled == [order(1).order_id, order(2).order_id]
    assert fills(reports) == [(10, 101), (5, 101)]
    assert book.take(command("NEW", order(4)))[2:] == []


def test_the_sizes_of_both_sides_are_apart():
    book = book_with(order(1), order(2, side=SELL))
    reports = book.see(quote(1, 99, 101, ask_size=5, bid_size=7))
    assert fills(reports) == [(5, 101), (7, 99)]


def test_a_size_of_0_is_without_limit():
    assert fills(book_with(order()).see(quote(1, 99, 101, ask_size=0))) == [(10, 101)]


def test_commissions_are_by_notional_or_by_unit():
    by_notional = book_with(order(), commission=Commission(bps=5))
    by_unit = book_with(order(), commission=Commission(per_unit=0.25))
    (first,), (second,) = (b.see(quote(1, 99, 200)) for b in (by_notional, by_unit))
    assert isinstance(first, pb.ExecutionReport)
    assert isinstance(second, pb.ExecutionReport)
    assert (first.commission, second.commission) == (1.0, 2.5)


def test_a_negative_price_has_a_positive_commission():
    (fill,) = book_with(order(), commission=Commission(bps=5)).see(quote(1, -9, -2))
    assert isinstance(fill, pb.ExecutionReport)
    assert (fill.price, fill.commission) == (-2, 0.01)


# --- stops and times in force -------------------------------------------------


@pytest.mark.parametrize(("side", "stop"), [(BUY, 103), (SELL, 97)])
def test_a_stop_order_fills_once_the_market_reaches_its_stop(side: Any, stop: float):
    book = book_with(order(side=side, stop_price=stop, **STOP))
    assert book.see(quote(1, 99, 101)) == []
    triggered, fill = book.see(quote(2, 95, 105))
    assert said(triggered) == "TRIGGERED"
    assert triggered.time.ToNanoseconds() == START_NS + 2_000
    assert fills([fill]) == [(10, 105 if side == BUY else 95)]


def test_a_stop_that_was_reached_stays_reached():
    book = book_with(order(stop_price=103, price=102, **STOP_LIMIT))
    assert [said(report) for report in book.see(quote(1, 103, 104))] == ["TRIGGERED"]
    assert fills(book.see(quote(2, 99, 101))) == [(10, 101)]


def test_a_stop_that_a_predecessor_triggered_is_not_triggered_again():
    known = order(stop_price=103, broker_order_id="paper-1", **STOP)
    known.submitted_at.FromNanoseconds(START_NS)
    known.triggered_at.FromNanoseconds(START_NS)
    book = book_with()
    book.take(command("WORKING", known, revision=0))
    (fill,) = book.see(quote(1, 99, 101))
    assert said(fill) == "TRADE"


def test_what_an_ioc_order_does_not_fill_at_once_is_cancelled():
    reports = book_with(order(**IOC)).see(quote(1, 99, 101, ask_size=4))
    assert [said(report) for report in reports] == ["TRADE", "CANCELLED"]
    assert fills(reports) == [(4, 101)]


def test_an_ioc_order_whose_cancellation_was_lost_gets_no_second_quote():
    book = book_with()
    known = order(filled_quantity=4, broker_order_id="paper-1", **IOC)
    book.take(command("WORKING", known, revision=0), fills=1)
    reports = book.see(quote(1, 99, 101))
    assert [said(report) for report in reports][-1:] == ["CANCELLED"]
    assert fills(reports) == []


@pytest.mark.parametrize(("size", "filled"), [(9, []), (10, [(10, 101)])])
def test_a_fok_order_fills_whole_or_is_cancelled(size: int, filled: list[Any]):
    reports = book_with(order(**FOK)).see(quote(1, 99, 101, ask_size=size))
    assert fills(reports) == filled
    assert said(reports[-1]) == ("TRADE" if filled else "CANCELLED")


# --- cancelling, replacing, expiring ------------------------------------------


def test_a_cancelled_order_fills_no_more():
    book = book_with(order())
    (report,) = book.take(command("CANCEL", order()))
    assert said(report) == "CANCELLED"
    assert book.see(quote(1, 99, 101)) == []


def test_an_order_that_is_over_is_not_cancelled():
    book = book_with(order())
    book.see(quote(1, 99, 101))
    (report,) = book.take(command("CANCEL", order(version=5)))
    assert isinstance(report, pb.OrderReport)
    assert (said(report), report.command_version) == ("CANCEL_REJECTED", 5)


def test_an_order_whose_cancelling_a_predecessor_missed_is_cancelled():
    known = order(broker_order_id="paper-1")
    known.submitted_at.FromNanoseconds(START_NS)
    book = book_with()
    book.see(quote(1, 99, 101))
    (report,) = book.take(command("CANCEL", known, revision=0))
    assert said(report) == "CANCELLED"


def test_replaced_terms_are_in_force_at_once():
    first = order(price=90, **LIMIT)
    book = book_with(first)
    book.see(quote(1, 99, 101))
    replaced, fill = book.take(asked(first, quantity=12, price=101))
    assert isinstance(replaced, pb.OrderReport)
    assert (said(replaced), replaced.command_version) == ("REPLACED", 3)
    assert fills([fill]) == [(12, 101)]


def test_a_quantity_below_what_is_filled_is_refused():
    first = order()
    book = book_with(first)
    book.see(quote(1, 99, 101, ask_size=4))
    (report,) = book.take(asked(first, quantity=3))
    assert isinstance(report, pb.OrderReport)
    assert (said(report), report.command_version) == ("REPLACE_REJECTED", 3)
    assert fills(book.see(quote(2, 99, 101))) == [(6, 101)]


def test_a_quantity_of_what_is_filled_ends_the_order():
    first = order()
    book = book_with(first)
    book.see(quote(1, 99, 101, ask_size=4))
    (report,) = book.take(asked(first, quantity=4))
    assert said(report) == "REPLACED"
    assert not book.symbols


def test_an_order_that_is_over_is_not_replaced():
    (report,) = book_with().take(asked(order(), quantity=4))
    assert said(report) == "REPLACE_REJECTED"


def test_an_expired_order_is_dropped_without_a_word():
    book = book_with(order())
    assert book.take(command("EXPIRE", order())) == []
    assert book.see(quote(1, 99, 101)) == []
