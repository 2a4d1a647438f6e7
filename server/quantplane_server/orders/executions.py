"""What execution reports mean: the executions to book, and what is filled by them."""

from collections.abc import Sequence
from math import fsum
from typing import TypeAlias

from quantplane import v1 as pb
from quantplane.ids import new_id
from quantplane_server.db import Connection
from quantplane_server.errors import (
    ExecutionMismatch,
    IllegalTransition,
    KeyReused,
    UnknownExecution,
)
from quantplane_server.orders.lifecycle import REVERSALS, Filled, is_late
from quantplane_server.portfolio import queries as portfolio
from quantplane_server.portfolio.queries import Sums

MANY = 1_000_000  # executions of the orders of a round

Name: TypeAlias = tuple[str, str]  # order_id, broker_exec_id


class Executions:
    """Of the orders of a round: those that were booked before, and those to book."""

    def __init__(self) -> None:
        self._named: dict[Name, pb.Execution] = {}
        self._reversed: set[str] = set()
        self._filled: dict[str, Sums] = {}  # by order
        self._live: dict[str, dict[str, pb.Execution]] = {}  # of orders with reversals

    async def read(
        self, conn: Connection, reports: Sequence[pb.ExecutionReport]
    ) -> None:
        """Read what the reports are about."""
        names = {(report.order_id, report.broker_exec_id) for report in reports}
        self._named = await portfolio.executions_by_broker_id(conn, sorted(names))
        ids = sorted({report.order_id for report in reports})
        self._filled = await portfolio.filled(conn, ids)
        if again := sorted({r.order_id for r in reports if r.type in REVERSALS}):
            self._live = {order_id: {} for order_id in again}
            for execution in await portfolio.executions_of(conn, again, MANY):
                self._note(execution)
                self._count(execution)

    def add(self, order: pb.Order, report: pb.ExecutionReport) -> list[pb.Execution]:
        """Return the executions that a report makes; none if it did so before.

        A bust makes a reversal, a correction that and what is right instead. Raises
        KeyReused, ExecutionMismatch, UnknownExecution, IllegalTransition.
        """
        name = (report.order_id, report.broker_exec_id)
        if known := self._named.get(name):
            if not _is_same(known, report):
                raise KeyReused("broker_exec_id", report.broker_exec_id)
            return []
        _check_match(order, report)
        executions = []
        if report.type in REVERSALS:
            executions.append(self._reversal(report))
        if report.type != pb.ORDER_EVENT_TYPE_TRADE_CANCEL:
            execution = _execution(order, report)
            if executions:
                execution.ref_execution_id = executions[0].ref_execution_id
            executions.append(execution)
        self._sum(order.order_id, executions)
        for execution in executions:
            self._note(execution)
        return executions

    def filled(self, order_id: str) -> Filled:
        """Return the sums over the executions of an order that count."""
        live = self._live.get(order_id)
        if live is None:
            quantity, notional, _ = self._filled[order_id]
            return Filled(quantity, notional)
        return Filled(
            fsum(e.quantity for e in live.values()),
            fsum(e.quantity * e.price for e in live.values()),
        )

    def _reversal(self, report: pb.ExecutionReport) -> pb.Execution:
        """Return what takes the execution back that a report refers to."""
        original = self._named.get((report.order_id, report.ref_broker_exec_id))
        if original is None or original.quantity < 0:
            raise UnknownExecution(report.ref_broker_exec_id)
        if original.execution_id in self._reversed:
            raise IllegalTransition(
                f"execution {report.ref_broker_exec_id!r} was taken back already",
                broker_exec_id=report.ref_broker_exec_id,
            )
        reversal = pb.Execution()
        reversal.CopyFrom(original)
        reversal.execution_id = new_id()
        reversal.ref_execution_id = original.execution_id
        reversal.quantity = -original.quantity
        reversal.commission = -original.commission
        reversal.time.CopyFrom(report.time)
        # A correction's own name goes to what is right.
        cancels = report.type == pb.ORDER_EVENT_TYPE_TRADE_CANCEL
        reversal.broker_exec_id = report.broker_exec_id if cancels else ""
        return reversal

    def _sum(self, order_id: str, executions: Sequence[pb.Execution]) -> None:
        if order_id in self._live:
            for execution in executions:
                self._count(execution)
        else:  # none of them takes anything back
            quantity, notional, _ = self._filled.get(order_id, Sums())
            quantity += sum(e.quantity for e in executions)
            notional += sum(e.quantity * e.price for e in executions)
            self._filled[order_id] = Sums(quantity, notional)

    def _count(self, execution: pb.Execution) -> None:
        """Count an execution of an order whose executions are all known."""
        live = self._live[execution.order_id]
        if execution.quantity < 0:
            live.pop(execution.ref_execution_id, None)
        else:
            live[execution.execution_id] = execution

    def _note(self, execution: pb.Execution) -> None:
        if execution.broker_exec_id:
            name = (execution.order_id, execution.broker_exec_id)
            self._named[name] = execution
        if execution.quantity < 0:
            self._reversed.add(execution.ref_execution_id)


def _is_same(known: pb.Execution, report: pb.ExecutionReport) -> bool:
    """Tell whether a report says what an execution was booked for."""
    if (known.quantity < 0) != (report.type == pb.ORDER_EVENT_TYPE_TRADE_CANCEL):
        return False
    if known.quantity < 0:
        return True
    return (known.symbol, known.side, known.quantity, known.price) == (
        *(report.symbol, report.side, report.quantity, report.price),
    )


def _check_match(order: pb.Order, report: pb.ExecutionReport) -> None:
    for field in ("symbol", "side"):
        if getattr(report, field) != getattr(order, field):
            raise ExecutionMismatch(
                f"the execution's {field} is not that of the order",
                order_id=order.order_id,
            )


def _execution(order: pb.Order, report: pb.ExecutionReport) -> pb.Execution:
    return pb.Execution(
        execution_id=new_id(),
        time=report.time,
        order_id=order.order_id,
        symbol=order.symbol,
        side=order.side,
        quantity=report.quantity,
        price=report.price,
        commission=report.commission,
        venue=report.venue,
        broker_exec_id=report.broker_exec_id,
        late=is_late(order),
        strategy_id=order.strategy_id,
    )
