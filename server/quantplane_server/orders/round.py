"""The commands that share a transaction: read all at once, decided one by one, written
all at once.

Locks are taken in one order by everybody: strategies with limits, orders, positions,
signals, names of new orders, the heads of the logs.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.ids import new_id
from quantplane_server import log as logs
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.db import Connection
from quantplane_server.errors import (
    KeyReused,
    QuantplaneError,
    RiskLimit,
    SignalMismatch,
    UnknownOrder,
    UnknownSignal,
    VersionMismatch,
)
from quantplane_server.orders import checks, lifecycle, queries, risk
from quantplane_server.orders.commands import (
    Change,
    Command,
    Done,
    Fill,
    Outcome,
    Replace,
    Submit,
)
from quantplane_server.orders.executions import Executions
from quantplane_server.orders.lifecycle import terms_of
from quantplane_server.orders.queries import Key, NameTaken
from quantplane_server.orders.risk import Exposure
from quantplane_server.origin import SERVER, Origin
from quantplane_server.portfolio import queries as portfolio
from quantplane_server.portfolio.booking import book
from quantplane_server.signals import queries as signals
from quantplane_server.signals.events import log_events

OVER = (pb.SIGNAL_STATUS_EXPIRED, pb.SIGNAL_STATUS_CANCELLED)

Name = tuple[str, str]  # strategy_id, client_order_id


class Bounds(NamedTuple):
    """What the risk of new orders is checked against."""

    limits: Mapping[str, risk.Limits]  # by strategy
    quotes: Mapping[str, pb.Quote]  # of the symbols of market orders, if needed


class Round:
    """One transaction's worth of commands."""

    def __init__(self, conn: Connection, bounds: Bounds, taken: bool = False) -> None:
        self.executions: list[pb.Execution] = []  # booked
        self.appended: list[tuple[str, int, list[logs.Event]]] = []
        self._conn = conn
        self._bounds = bounds
        self._taken = taken  # some of the names of new orders
        self._at = _now()
        self._exposure = Exposure({}, ())
        self._keys: dict[Name, Key] = {}
        self._orders: dict[str, pb.Order] = {}  # as they are by now
        self._created: list[Key] = []
        self._changed: set[str] = set()
        self._signals: dict[str, pb.Signal] = {}
        self._executed: dict[str, Origin] = {}  # signals, by what executed them
        self._known = Executions()
        self._events: list[pb.OrderEvent] = []
        self._booked: list[tuple[pb.OrderEvent, list[pb.Execution]]] = []

    @staticmethod
    def is_one_statement(
        commands: Iterable[Command], bounds: Bounds, taken: bool
    ) -> bool:
        """Tell whether a round locks nothing and writes by one statement."""
        submits = all(isinstance(command, Submit) for command in commands)
        return submits and not taken and not _limited(bounds)

    async def run(self, commands: Sequence[Command]) -> list[Outcome]:
        """Return what came of each command; the caller commits.

        Raises NameTaken where it has to be done again with the names of new orders
        `taken`: most are free, so they are read only then.
        """
        await self._read(commands)
        outcomes = [self._decide(command) for command in commands]
        await self._write()
        return outcomes

    async def check(self, submit: Submit) -> float | None:
        """Raise what submitting an order would; return its notional, if there is a
        price. Nothing is written."""
        new = submit.order
        name = _name(new)
        self._keys = await queries.keys_of(self._conn, [name])
        if key := self._keys.get(name):
            created = {key.order_id: key.created_at}
            self._orders = await queries.orders_at(self._conn, created)
            self._submit(submit)
        order = lifecycle.created(new, new_id(), self._at, "")
        terms = terms_of(order)
        if not key:
            await self._read_signals([new])
            self._check_signal(submit)
            await self._read_exposure(_limited(self._bounds))
            if breach := self._breach(order, terms, None):
                raise _risk_error(lifecycle.denied(order, breach.code, breach.text))
        price = risk.price_of(order, terms, self._bounds.quotes.get(new.symbol))
        return None if price is None else new.quantity * price

    # --- Reading ---

    async def _read(self, commands: Sequence[Command]) -> None:
        new = [c.order for c in commands if isinstance(c, Submit)]
        fills = [c.report for c in commands if isinstance(c, Fill)]
        wanted = {_target(c) for c in commands if not isinstance(c, Submit)}
        if limited := _limited(self._bounds):
            await queries.lock_strategies(self._conn, limited)
        if new and self._taken:
            self._keys = await queries.keys_of(self._conn, map(_name, new))
            wanted |= {key.order_id for key in self._keys.values()}
        if wanted:
            created = await queries.lock(self._conn, sorted(wanted))
            self._orders = await queries.orders_at(self._conn, created)
        await self._read_exposure(limited)
        await self._read_signals(new)
        if fills:
            await self._known.read(self._conn, fills)

    async def _read_exposure(self, strategies: Sequence[str]) -> None:
        # In this order: a fill between the two counts twice rather than not at all.
        if strategies:
            working = await queries.working(self._conn, strategies)
            held = await portfolio.quantities(self._conn, strategies)
            self._exposure = Exposure(held, working)

    async def _read_signals(self, orders: Iterable[pb.NewOrder]) -> None:
        if named := {order.signal_id for order in orders if order.signal_id}:
            self._signals = await signals.find(self._conn, sorted(named))

    # --- Deciding ---

    def _decide(self, command: Command) -> Outcome:
        try:
            match command:
                case Submit():
                    return self._submit(command)
                case Change():
                    return self._change(command)
                case Replace():
                    return self._replace(command)
                case Fill():
                    return self._fill(command)
        except QuantplaneError as error:
            return error

    def _submit(self, submit: Submit) -> Done:
        new = submit.order
        name = _name(new)
        if key := self._keys.get(name):
            if key.request_hash != _hash(new):
                raise KeyReused("client_order_id", new.client_order_id)
            return _again(self._order(key.order_id))
        try:
            self._check_signal(submit)
        except QuantplaneError as error:
            if not self._taken:  # the order may be there, from when its signal was good
                raise NameTaken from error
            raise
        order = lifecycle.created(new, new_id(), self._at, submit.origin.trace_id)
        created_at = to_datetime(time_us(self._at))
        key = Key(*name, order.order_id, created_at, _hash(new))
        self._keys[name] = key
        self._created.append(key)
        if breach := self._breach(order, terms_of(order), None):
            order = lifecycle.denied(order, breach.code, breach.text)
            self._happened(pb.ORDER_EVENT_TYPE_DENIED, order, submit.origin)
            raise _risk_error(order)
        self._exposure.add(order, order.quantity, 1)
        self._happened(pb.ORDER_EVENT_TYPE_CREATED, order, submit.origin)
        return Done(order, duplicate=False)

    def _check_signal(self, submit: Submit) -> None:
        new = submit.order
        if not new.signal_id:
            return
        signal = self._signals.get(new.signal_id)
        if signal and submit.confined and signal.strategy_id != new.strategy_id:
            signal = None
        if signal is None:
            raise UnknownSignal(new.signal_id)
        for field in ("strategy_id", "symbol"):
            if getattr(signal, field) != getattr(new, field):
                raise SignalMismatch(
                    f"the signal is of {field} {getattr(signal, field)!r}",
                    signal_id=new.signal_id,
                )
        if signal.status in OVER:
            status = pb.SignalStatus.Name(signal.status).removeprefix("SIGNAL_STATUS_")
            raise SignalMismatch(
                f"the signal is {status.lower()}", signal_id=new.signal_id
            )

    def _breach(
        self, order: pb.Order, terms: pb.Terms, more: float | None
    ) -> risk.Breach | None:
        limits = self._bounds.limits.get(order.strategy_id)
        if not limits:
            return None
        price = risk.price_of(order, terms, self._bounds.quotes.get(order.symbol))
        return risk.breach(limits, order, terms, price, self._exposure, more)

    def _change(self, change: Change) -> Done:
        order = self._order(change.report.order_id)
        after = lifecycle.apply(order, change.report, self._at)
        return self._applied(after, order, change.report, change.version, change.origin)

    def _replace(self, replace: Replace) -> Done:
        order = self._order(replace.order_id)
        terms = checks.check_terms(order, replace.request)
        report = pb.OrderReport(
            order_id=order.order_id,
            type=pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED,
            terms=terms,
        )
        after = lifecycle.apply(order, report, self._at)
        more = terms.quantity - order.quantity
        if after and (breach := self._breach(order, terms, more)):
            raise RiskLimit(
                f"{breach.limit}: {breach.text}",
                limit=breach.limit,
                order_id=order.order_id,
            )
        if after:
            self._exposure.add(order, max(more, 0.0), 0)
        version = replace.request.version
        return self._applied(after, order, report, version, replace.origin)

    def _applied(
        self,
        after: pb.Order | None,
        before: pb.Order,
        report: pb.OrderReport,
        version: int,
        origin: Origin,
    ) -> Done:
        if after is None:
            return Done(before, duplicate=True)
        if version and version != before.version:
            raise VersionMismatch(before.version)
        event = self._happened(report.type, after, origin)
        event.code, event.text = report.code, report.text
        if report.HasField("time"):
            event.broker_time.CopyFrom(report.time)
        if (terms := terms_of(before)) != terms_of(after):
            event.previous_terms.CopyFrom(terms)
        return Done(after, duplicate=False)

    def _fill(self, fill: Fill) -> Done:
        report = fill.report
        kind = report.type or pb.ORDER_EVENT_TYPE_TRADE
        order = self._order(report.order_id)
        executions = self._known.add(order, report)
        if not executions:
            return Done(order, duplicate=True)
        filled = self._known.filled(order.order_id)
        filled = filled._replace(leaves=report.leaves_quantity)
        change = pb.OrderReport(order_id=order.order_id, type=kind)
        after = lifecycle.apply(order, change, self._at, filled)
        assert after, "a fact always says something new"
        self.executions += executions
        event = self._happened(kind, after, fill.origin)
        event.broker_time.CopyFrom(report.time)
        self._booked.append((event, executions))
        if order.signal_id and kind == pb.ORDER_EVENT_TYPE_TRADE:
            self._executed.setdefault(order.signal_id, fill.origin)
        return Done(after, duplicate=False)

    def _order(self, order_id: str) -> pb.Order:
        order = self._orders.get(order_id)
        if order is None:
            raise UnknownOrder(order_id, order_id=order_id)
        return order

    def _happened(self, kind: Any, order: pb.Order, origin: Origin) -> pb.OrderEvent:
        self._orders[order.order_id] = order
        self._changed.add(order.order_id)
        event = pb.OrderEvent(
            time=self._at,
            type=kind,
            order=order,
            trace_id=origin.trace_id,
            span_id=origin.span_id,
            actor=origin.actor,
        )
        if kind == pb.ORDER_EVENT_TYPE_DENIED:
            event.code, event.text = order.reject_code, order.error_message
        self._events.append(event)
        return event

    # --- Writing ---

    async def _write(self) -> None:
        if self.executions:
            await book(self._conn, self.executions)
        for event, executions in self._booked:
            event.execution.CopyFrom(executions[-1])
            if len(executions) > 1:
                event.reversal.CopyFrom(executions[0])
        executed = []
        if self._executed:
            executed = await signals.mark_executed(self._conn, sorted(self._executed))
        if self._events:
            changed = [self._orders[order_id] for order_id in sorted(self._changed)]
            events = list(map(_log_event, self._events))
            first = await queries.store(self._conn, self._created, changed, events)
            self.appended.append((queries.LOG, first, events))
        if executed:
            events = list(map(self._executed_event, executed))
            first = await logs.append(self._conn, "signals", events)
            self.appended.append(("signals", first, events))

    def _executed_event(self, signal: pb.Signal) -> logs.Event:
        """Return the event of a signal: the server did it, in the trace of a fill."""
        origin = self._executed[signal.signal_id]._replace(actor=SERVER.actor)
        (event,) = log_events(pb.SIGNAL_EVENT_TYPE_EXECUTED, [signal], origin)
        return event


def _limited(bounds: Bounds) -> list[str]:
    """Return the strategies whose limits depend on what they hold."""
    limits = bounds.limits.items()
    return sorted(strategy for strategy, own in limits if risk.needs_exposure(own))


def _target(command: Change | Replace | Fill) -> str:
    if isinstance(command, Replace):
        return command.order_id
    return command.report.order_id


def _name(order: pb.NewOrder) -> Name:
    return order.strategy_id, order.client_order_id


def _hash(order: pb.NewOrder) -> bytes:
    data = order.SerializeToString(deterministic=True)
    return blake2b(data, digest_size=16).digest()


def _again(order: pb.Order) -> Done:
    """Return the first answer again. Raises RiskLimit where that was it."""
    if order.reject_code.startswith(risk.PREFIX):
        raise _risk_error(order)
    return Done(order, duplicate=True)


def _risk_error(order: pb.Order) -> RiskLimit:
    limit = order.reject_code.removeprefix(risk.PREFIX).lower()
    return RiskLimit(
        f"{limit}: {order.error_message}", limit=limit, order_id=order.order_id
    )


def _log_event(event: pb.OrderEvent) -> logs.Event:
    kind = pb.OrderEventType.Name(event.type).removeprefix("ORDER_EVENT_TYPE_")
    payload = event.SerializeToString()
    return logs.Event(kind, event.order.order_id, payload, event.actor, event.trace_id)


def _now() -> Timestamp:
    """Return the time as the database keeps it."""
    now = Timestamp()
    now.GetCurrentTime()
    now.nanos -= now.nanos % 1_000
    return now
