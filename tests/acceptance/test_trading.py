"""Random histories of orders, made by strategies and two gateways at two servers.

After each step, what the servers say is compared with what was done; at the end, the
log with all of it. Nothing here uses the server's own arithmetic: the book below is an
independent one, in fractions.
"""

import asyncio
from contextlib import AsyncExitStack
from fractions import Fraction
from itertools import count
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from quantplane import Client, reason_of, sync
from quantplane import v1 as pb
from quantplane.ids import new_id
from quantplane_server.main import recording, serving
from quantplane_server.orders import lifecycle
from tests.conftest import Settings
from tests.faults import until

EXAMPLES, STEPS = 40, 60
LIVE = (pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN)
FACTS = (
    pb.ORDER_EVENT_TYPE_TRADE,
    pb.ORDER_EVENT_TYPE_TRADE_CANCEL,
    pb.ORDER_EVENT_TYPE_TRADE_CORRECT,
)
REPORTS = (
    *("SUBMITTED", "ACKNOWLEDGED", "REJECTED", "TRIGGERED", "CANCELLED"),
    *("CANCEL_REJECTED", "REPLACED", "REPLACE_REJECTED", "EXPIRED", "RESTATED"),
    "OUTCOME_UNKNOWN",
)
FIXED = (
    *("order_id", "client_order_id", "strategy_id", "signal_id", "symbol", "side"),
    *("order_type", "time_in_force", "created_at", "trace_id"),
)
numbers = count(1)
quantities = st.sampled_from([0.1, 0.2, 0.3, 1, 2.5, 7, 1e6])
prices = st.sampled_from([-2.5, 0.0, 0.1, 99.99, 100, 101.5])
either = st.integers(0, 1)


class Fact(NamedTuple):
    """A fill that was booked. Busts and corrections replace it in its place."""

    order_id: str
    strategy_id: str
    symbol: str
    sign: int
    quantity: float
    price: float
    commission: float
    name: str


class Position:
    """A position by average cost, exactly."""

    def __init__(self, facts: list[Fact]) -> None:
        self.quantity = self.cost = self.realized = self.cash = Fraction(0)
        for fact in facts:
            self._add(Fraction(fact.quantity) * fact.sign, Fraction(fact.price))
            self.realized -= Fraction(fact.commission)
            self.cash -= Fraction(fact.quantity) * fact.sign * Fraction(fact.price)
            self.cash -= Fraction(fact.commission)

    def _add(self, quantity: Fraction, price: Fraction) -> None:
        after = self.quantity + quantity
        if self.quantity * quantity >= 0:
            if after:
                self.cost = (self.quantity * self.cost + quantity * price) / after
        else:
            closed = min(abs(quantity), abs(self.quantity))
            sign = 1 if self.quantity > 0 else -1
            self.realized += closed * sign * (price - self.cost)
            if abs(after) <= Fraction(1, 10**9) * abs(quantity):
                after = self.cost = Fraction(0)
            elif after * self.quantity < 0:
                self.cost = price
        self.quantity = after


def near(value: float, exact: Fraction, scale: float) -> bool:
    """Tell whether a sum is right, relative to what went into it."""
    return abs(Fraction(value) - exact) <= Fraction(1, 10**9) * Fraction(max(scale, 1))


class Trading(RuleBasedStateMachine):
    """Strategies and gateways at work."""

    clients: tuple[sync.Client, sync.Client]

    orders = Bundle("orders")
    signals = Bundle("signals")
    facts = Bundle("facts")

    @initialize()
    def begin(self) -> None:
        number = next(numbers)
        self.symbols = (f"A{number}", f"B{number}")
        self.strategies = (f"s{number}", f"t{number}")
        self.known: dict[str, pb.Order] = {}
        self.booked: list[Fact] = []
        self.signal_of: dict[str, str] = {}
        self.status_of: dict[str, int] = {}

    # --- Strategies ---

    @rule(target=signals, strategy=either, symbol=either, at=either)
    def publish(self, strategy: int, symbol: int, at: int) -> str:
        signal = pb.Signal(
            signal_id=new_id(), strategy_id=self.strategies[strategy],
            symbol=self.symbols[symbol], signal_type=pb.SIGNAL_TYPE_LONG, strength=1,
        )  # fmt: skip
        signal.time.GetCurrentTime()
        request = pb.PublishSignalsRequest(signals=[signal])
        self.clients[at].signal.PublishSignals(request)
        self.status_of[signal.signal_id] = pb.SIGNAL_STATUS_ACTIVE
        return signal.signal_id

    @rule(
        target=orders, strategy=either, symbol=either, at=either, price=prices,
        quantity=quantities, side=st.sampled_from([pb.SIDE_BUY, pb.SIDE_SELL]),
        kind=st.sampled_from(pb.OrderType.values()[1:]),
    )  # fmt: skip
    def submit(
        self, strategy: int, symbol: int, at: int, price: float, quantity: float,
        side: Any, kind: Any,
    ) -> str:  # fmt: skip
        return self._submit(strategy, symbol, at, price, quantity, side, kind, "")

    @rule(target=orders, signal=signals, at=either, price=prices, quantity=quantities)
    def act_on(self, signal: str, at: int, price: float, quantity: float) -> Any:
        request = pb.GetSignalRequest(signal_id=signal)
        found = self.clients[at].signal.GetSignal(request).signal
        if found.status == pb.SIGNAL_STATUS_CANCELLED:
            return multiple()
        return self._submit(
            self.strategies.index(found.strategy_id), self.symbols.index(found.symbol),
            at, price, quantity, pb.SIDE_BUY, pb.ORDER_TYPE_MARKET, signal,
        )  # fmt: skip

    def _submit(
        self, strategy: int, symbol: int, at: int, price: float, quantity: float,
        side: Any, kind: Any, signal: str,
    ) -> str:  # fmt: skip
        new = pb.NewOrder(
            client_order_id=new_id(), strategy_id=self.strategies[strategy],
            signal_id=signal, symbol=self.symbols[symbol], side=side, order_type=kind,
            quantity=quantity,
        )  # fmt: skip
        if kind in (pb.ORDER_TYPE_LIMIT, pb.ORDER_TYPE_STOP_LIMIT):
            new.price = price
        if kind in (pb.ORDER_TYPE_STOP, pb.ORDER_TYPE_STOP_LIMIT):
            new.stop_price = price
        request = pb.SubmitOrderRequest(order=new)
        first = self.clients[at].order.SubmitOrder(request)
        again = self.clients[1 - at].order.SubmitOrder(request)
        assert (first.duplicate, again.duplicate) == (False, True)
        assert again.order == first.order
        order = first.order
        self.known[order.order_id] = order
        if signal:
            self.signal_of[order.order_id] = signal
        return order.order_id

    @rule(signal=consumes(signals), at=either)
    def cancel_signal(self, signal: str, at: int) -> None:
        request = pb.CancelSignalRequest(signal_id=signal)
        try:
            self.clients[at].signal.CancelSignal(request)
        except grpc.RpcError as error:
            assert reason_of(error) == "ILLEGAL_TRANSITION"
            assert self.status_of[signal] == pb.SIGNAL_STATUS_EXECUTED
        else:
            self.status_of[signal] = pb.SIGNAL_STATUS_CANCELLED
        self._check_signal(signal)

    @rule(order=orders, at=either, stale=st.booleans())
    def cancel(self, order: str, at: int, stale: bool) -> None:
        version = self.known[order].version + 1 if stale else 0
        request = pb.CancelOrderRequest(order_id=order, version=version)
        self._ask(order, self.clients[at].order.CancelOrder, request)

    @rule(order=orders, at=either, quantity=quantities)
    def replace(self, order: str, at: int, quantity: float) -> None:
        request = pb.ReplaceOrderRequest(order_id=order, quantity=quantity)
        self._ask(order, self.clients[at].order.ReplaceOrder, request)

    def _ask(self, order: str, call: Any, request: Any) -> None:
        try:
            after = call(request).order
        except grpc.RpcError as error:
            assert reason_of(error) in {
                *("ORDER_TERMINAL", "ILLEGAL_TRANSITION", "VERSION_MISMATCH"),
            }
            self._check(order, self.known[order])
        else:
            self._check(order, after)

    # --- Gateways ---

    @rule(
        order=orders, at=either, event=st.sampled_from(REPORTS), price=prices,
        quantity=quantities, name=st.sampled_from(["b", "c"]), told=st.booleans(),
    )  # fmt: skip
    def report(
        self, order: str, at: int, event: str, price: float, quantity: float,
        name: str, told: bool,
    ) -> None:  # fmt: skip
        kind = pb.OrderEventType.Value(f"ORDER_EVENT_TYPE_{event}")
        report = pb.OrderReport(order_id=order, type=kind)
        if event == "ACKNOWLEDGED":
            report.broker_order_id = name
        if event == "RESTATED" or (event == "REPLACED" and told):
            report.terms.quantity = quantity
            for field in ("price", "stop_price"):
                if self.known[order].HasField(field):  # type: ignore[arg-type]
                    setattr(report.terms, field, price)
        request = pb.ReportOrderEventsRequest(reports=[report])
        (result,) = self.clients[at].broker.ReportOrderEvents(request).results
        self._take(order, result)

    @rule(
        target=facts, order=orders, at=either, quantity=quantities, price=prices,
        whole=st.booleans(), commission=st.sampled_from([0.0, 0.25, -0.1]),
    )  # fmt: skip
    def fill(
        self, order: str, at: int, quantity: float, price: float, whole: bool,
        commission: float,
    ) -> Any:  # fmt: skip
        before = self.known[order]
        if whole and before.leaves_quantity > 0:
            quantity = before.leaves_quantity
        sign = 1 if before.side == pb.SIDE_BUY else -1
        fact = Fact(
            order, before.strategy_id, before.symbol, sign, quantity, price,
            commission, new_id(),
        )  # fmt: skip
        report = self._execution(fact)
        result = self._book(at, report)
        again = self._book(1 - at, report)
        assert not result.reason, result.message
        assert again.duplicate
        self.booked.append(fact)
        if signal := self.signal_of.get(order):
            if self.status_of[signal] == pb.SIGNAL_STATUS_ACTIVE:
                self.status_of[signal] = pb.SIGNAL_STATUS_EXECUTED
            self._check_signal(signal)
        self._take(order, result)
        return fact

    @rule(fact=consumes(facts), at=either, leaves=st.booleans())
    def bust(self, fact: Fact, at: int, leaves: bool) -> None:
        report = self._execution(fact, pb.ORDER_EVENT_TYPE_TRADE_CANCEL, leaves)
        result = self._book(at, report)
        assert not result.reason, result.message
        assert self._book(1 - at, report).duplicate
        self.booked.remove(fact)
        self._take(fact.order_id, result)

    @rule(
        target=facts, fact=consumes(facts), at=either, quantity=quantities,
        price=prices, leaves=st.booleans(),
    )  # fmt: skip
    def correct(
        self, fact: Fact, at: int, quantity: float, price: float, leaves: bool
    ) -> Fact:
        right = fact._replace(quantity=quantity, price=price, name=new_id())
        kind = pb.ORDER_EVENT_TYPE_TRADE_CORRECT
        report = self._execution(right, kind, leaves)
        report.ref_broker_exec_id = fact.name
        result = self._book(at, report)
        assert not result.reason, result.message
        assert self._book(1 - at, report).duplicate
        self.booked[self.booked.index(fact)] = right
        self._take(fact.order_id, result)
        return right

    @rule(order=orders, at=either, wrong=st.sampled_from(["symbol", "order", "huge"]))
    def misreport(self, order: str, at: int, wrong: str) -> None:
        known = self.known[order]
        fact = Fact(order, "", known.symbol, 1, 1.0, 1.0, 0.0, new_id())
        report = self._execution(fact)
        match wrong:
            case "symbol":
                report.symbol = "another"
            case "order":
                report.order_id = new_id()
            case "huge":
                report.quantity = 1e308
        assert self._book(at, report).reason
        self._check(order, known)

    def _execution(
        self, fact: Fact, kind: Any = pb.ORDER_EVENT_TYPE_TRADE, leaves: bool = False
    ) -> pb.ExecutionReport:
        report = pb.ExecutionReport(
            order_id=fact.order_id, type=kind, broker_exec_id=fact.name,
            symbol=fact.symbol, side=self.known[fact.order_id].side,
            quantity=fact.quantity, price=fact.price, commission=fact.commission,
        )  # fmt: skip
        if kind == pb.ORDER_EVENT_TYPE_TRADE_CANCEL:
            report.broker_exec_id, report.ref_broker_exec_id = new_id(), fact.name
        if leaves:
            report.leaves_quantity = 1
        report.time.GetCurrentTime()
        return report

    def _book(self, at: int, report: pb.ExecutionReport) -> pb.OrderResult:
        request = pb.ReportExecutionsRequest(reports=[report])
        (result,) = self.clients[at].broker.ReportExecutions(request).results
        return result

    def _take(self, order: str, result: pb.OrderResult) -> None:
        if result.reason:
            assert result.reason in (
                pb.ERROR_REASON_ORDER_TERMINAL, pb.ERROR_REASON_ILLEGAL_TRANSITION,
            )  # fmt: skip
        after = self.known[order] if result.reason or result.duplicate else result.order
        self._check(order, after)

    # --- What must hold ---

    def _check(self, order_id: str, after: pb.Order) -> None:
        """Compare an order with what was done to it, as each server has it."""
        before = self.known[order_id]
        request = pb.GetOrderRequest(order_id=order_id)
        for client in self.clients:
            assert client.order.GetOrder(request).order == after
        self.known[order_id] = after
        assert after.version - before.version in (0, 1)
        for field in FIXED:
            assert getattr(after, field) == getattr(before, field), field
        facts = [fact for fact in self.booked if fact.order_id == order_id]
        filled = sum((Fraction(fact.quantity) for fact in facts), Fraction(0))
        assert near(after.filled_quantity, filled, float(filled))
        if facts:
            notional = sum(Fraction(f.quantity) * Fraction(f.price) for f in facts)
            mean, scale = notional / filled, max(abs(f.price) for f in facts)
            assert near(after.avg_fill_price, Fraction(mean), scale)
        if after.status == pb.ORDER_STATUS_REJECTED:
            assert not facts
        if after.status == pb.ORDER_STATUS_FILLED:
            assert filled >= Fraction(after.quantity) * (1 - Fraction(1, 10**9))
        leaves = max(after.quantity - after.filled_quantity, 0)
        assert after.leaves_quantity == (leaves if after.status in LIVE else 0)
        if after.status not in LIVE:
            assert not after.pending_request
        self._check_portfolio(after.strategy_id, after.symbol)

    def _check_portfolio(self, strategy_id: str, symbol: str) -> None:
        of_symbol = [fact for fact in self.booked if fact.symbol == symbol]
        mine = [fact for fact in self.booked if fact.strategy_id == strategy_id]
        of_both = [fact for fact in mine if fact.symbol == symbol]
        scale = sum(abs(f.quantity) * (1 + abs(f.price)) for f in self.booked)
        account = self.clients[0].portfolio.GetPortfolio(pb.GetPortfolioRequest())
        request = pb.GetPortfolioRequest(strategy_id=strategy_id)
        own = self.clients[1].portfolio.GetPortfolio(request)
        for portfolio, facts in ((account, of_symbol), (own, of_both)):
            exact = Position(facts)
            held = {each.symbol: each for each in portfolio.positions}
            found = held.get(symbol, pb.Position())
            assert near(found.quantity, exact.quantity, scale)
            assert near(found.realized_pnl, exact.realized, scale)
            if exact.quantity:
                cost = found.average_cost * found.quantity
                assert near(cost, exact.cost * exact.quantity, scale)
        cash = sum(
            Position([f for f in mine if f.symbol == s]).cash for s in self.symbols
        )
        assert near(own.summary.cash, Fraction(cash), scale)
        for portfolio in (account, own):
            sums = portfolio.summary
            total = sums.cash + sums.positions_value
            assert sums.total_value == pytest.approx(total, rel=1e-9, abs=1e-6)
            gain = sums.realized_pnl + sums.unrealized_pnl
            assert sums.total_pnl == pytest.approx(gain, rel=1e-9, abs=1e-6)

    def _check_signal(self, signal: str) -> None:
        request = pb.GetSignalRequest(signal_id=signal)
        for client in self.clients:
            status = client.signal.GetSignal(request).signal.status
            assert status == self.status_of[signal]


# --- The log ------------------------------------------------------------------------


def replay(events: list[pb.OrderEvent]) -> pb.Order:
    """Return what the events of an order make of it, by the state machine."""
    first, *rest = events
    assert first.type == pb.ORDER_EVENT_TYPE_CREATED
    order = first.order
    assert order.version == 1
    quantity = notional = Fraction(0)
    for event in rest:
        for execution in (event.reversal, event.execution):
            quantity += Fraction(execution.quantity)
            notional += Fraction(execution.quantity) * Fraction(execution.price)
        change = pb.OrderReport(type=event.type, code=event.code, text=event.text)
        if event.type == pb.ORDER_EVENT_TYPE_ACKNOWLEDGED:
            change.broker_order_id = event.order.broker_order_id
        if event.type == pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED:
            change.terms.CopyFrom(event.order.pending_terms)
        if event.HasField("previous_terms"):
            change.terms.CopyFrom(lifecycle.terms_of(event.order))
        leaves = float(event.order.status == pb.ORDER_STATUS_OPEN)
        filled = lifecycle.Filled(float(quantity), float(notional), leaves)
        facts = filled if event.type in FACTS else None
        after = lifecycle.apply(order, change, event.time, facts)
        assert after, event
        assert_same(after, event.order)
        order = event.order
    return order


def assert_same(one: pb.Order, other: pb.Order) -> None:
    """Compare orders, sums of doubles by their tolerance."""
    names = (
        "filled_quantity",
        "avg_fill_price",
        "leaves_quantity",
        "overfill_quantity",
    )
    kept, found = MessageToDict(one), MessageToDict(other)
    for name in names:
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9)
        camel = "".join(p.title() if i else p for i, p in enumerate(name.split("_")))
        kept.pop(camel, None), found.pop(camel, None)
    assert kept == found


async def collect(client: Client, into: list[pb.OrderEvent]) -> None:
    async with client.follow(client.order.WatchOrders, pb.WatchOrdersRequest()) as all:
        async for response in all:
            into += response.events


async def test_any_history_keeps_every_invariant(settings: Settings):
    events: tuple[list[pb.OrderEvent], ...] = ([], [])
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(recording(settings))
        targets = [await stack.enter_async_context(serving(settings)) for _ in events]
        clients = [await stack.enter_async_context(Client(t)) for t in targets]
        following = [
            asyncio.create_task(collect(client, into))
            for client, into in zip(clients, events, strict=True)
        ]
        made = await asyncio.to_thread(run_machine, targets)
        revisions = await clients[0].order.ListOrders(pb.ListOrdersRequest())
        assert revisions.orders
        audit = await clients[0].portfolio.AuditPositions(pb.AuditPositionsRequest())
        assert not audit.drifts
        last = sum(order.version for order in made.values())
        await until(lambda: all(len(e) >= last for e in events), "all events")
        for task in following:
            task.cancel()
    one, two = events
    assert one == two
    assert [event.revision for event in one] == list(range(1, last + 1))
    histories: dict[str, list[pb.OrderEvent]] = {}
    for event in one:
        histories.setdefault(event.order.order_id, []).append(event)
    for order_id, order in made.items():
        assert replay(histories[order_id]) == order


def run_machine(targets: list[str]) -> dict[str, pb.Order]:
    """Run many histories; return all orders as they are at the end."""
    made: dict[str, pb.Order] = {}
    with sync.Client(targets[0]) as one, sync.Client(targets[1]) as two:

        class Machine(Trading):
            clients = (one, two)

            def teardown(self) -> None:
                made.update(getattr(self, "known", {}))

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    return made
