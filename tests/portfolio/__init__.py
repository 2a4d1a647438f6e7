"""Short ways to trade: executions as brokers report them, booked without a broker."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from quantplane import v1 as pb
from quantplane.ids import new_id
from quantplane_server.db import Connection, Database
from quantplane_server.portfolio.booking import book

START = datetime(2024, 1, 1, tzinfo=UTC)


def at(minute: float) -> datetime:
    return START + timedelta(minutes=minute)


def fill(
    symbol: str, quantity: float, price: float, minute: float = 0, **fields: Any
) -> pb.Execution:
    """Return an execution of an order of its own; a negative quantity sells."""
    execution = pb.Execution(
        execution_id=new_id(),
        symbol=symbol,
        side=pb.SIDE_BUY if quantity > 0 else pb.SIDE_SELL,
        quantity=abs(quantity),
        price=price,
        **({"order_id": new_id(), "strategy_id": "s"} | fields),
    )
    execution.broker_exec_id = f"exec {execution.execution_id}"
    execution.time.FromDatetime(at(minute))
    return execution


def bust(original: pb.Execution, minute: float = 0) -> pb.Execution:
    """Return what takes an execution back."""
    reversal = pb.Execution()
    reversal.CopyFrom(original)
    reversal.execution_id = new_id()
    reversal.broker_exec_id = ""
    reversal.ref_execution_id = original.execution_id
    reversal.quantity, reversal.commission = -original.quantity, -original.commission
    reversal.time.FromDatetime(at(minute))
    return reversal


def correct(original: pb.Execution, **fields: Any) -> list[pb.Execution]:
    """Return what takes an execution back, and what is right."""
    reversal = bust(original)
    right = pb.Execution()
    right.CopyFrom(original)
    right.execution_id = new_id()
    right.broker_exec_id = f"exec {right.execution_id}"
    right.ref_execution_id = original.execution_id
    for name, value in fields.items():
        setattr(right, name, value)
    return [reversal, right]


class Desk:
    """Books what was traded."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def book(self, *executions: pb.Execution) -> None:
        async with self.db.transaction() as conn:
            await insert_orders(conn, executions)
            await book(conn, executions)

    async def fetch(self, statement: str, *args: Any) -> list[Any]:
        async with self.db.connection() as conn:
            return list(map(tuple, await conn.fetch(statement, *args)))

    async def execute(self, statement: str, *args: Any) -> None:
        async with self.db.connection() as conn:
            await conn.execute(statement, *args)

    async def account(self, symbol: str = "A") -> tuple[float, float, float]:
        """Return quantity, average cost and realised P&L."""
        (held,) = await self.fetch(
            "SELECT quantity, average_cost, realized_pnl FROM positions"
            " WHERE symbol = $1",
            symbol,
        )
        return held  # type: ignore[no-any-return]

    async def strategy(
        self, strategy_id: str = "s", symbol: str = "A"
    ) -> tuple[float, float, float]:
        (held,) = await self.fetch(
            "SELECT quantity, average_cost, realized_pnl FROM strategy_positions"
            " WHERE (strategy_id, symbol) = ($1, $2)",
            strategy_id,
            symbol,
        )
        return held  # type: ignore[no-any-return]


async def insert_orders(conn: Connection, executions: Iterable[pb.Execution]) -> None:
    """Insert the orders that executions are of, where they are missing."""
    for execution in executions:
        await conn.execute(
            """
            INSERT INTO orders (order_id, created_at, symbol, side, order_type,
                                quantity, filled_quantity, avg_fill_price)
            VALUES ($1, $2, $3, 'buy', 'market', 1, $4, $5) ON CONFLICT DO NOTHING
            """,
            execution.order_id,
            START,
            execution.symbol,
            execution.quantity,
            execution.price,
        )


# --- An independent recomputation ---------------------------------------------------


def exact(number: float) -> Fraction:
    """Return the number that was meant: 0.1 is a tenth."""
    return Fraction(Decimal(repr(number)))


class Exact(NamedTuple):
    """A position in exact numbers: its cost as a whole, not per unit."""

    quantity: Fraction = Fraction(0)
    cost: Fraction = Fraction(0)
    realized: Fraction = Fraction(0)
    cash: Fraction = Fraction(0)
    gross: Fraction = Fraction(0)  # of all amounts, for what rounding can do


def replayed(executions: Sequence[pb.Execution]) -> Exact:
    """Return what executions come to; none of them is a reversal or was reversed."""
    held = Exact()
    for execution in executions:
        sign = 1 if execution.side == pb.SIDE_BUY else -1
        left = sign * exact(execution.quantity)
        price, commission = exact(execution.price), exact(execution.commission)
        quantity, cost, realized, cash, gross = held
        cash -= left * price + commission
        realized -= commission
        gross += abs(left * price) + abs(commission)
        if quantity * left < 0:  # first what closes, then what opens
            closed = min(abs(left), abs(quantity)) / abs(quantity)
            realized += closed * (quantity * price - cost)
            closing = closed * quantity
            quantity, cost, left = (
                quantity - closing,
                cost * (1 - closed),
                left + closing,
            )
        quantity, cost = quantity + left, cost + left * price
        held = Exact(quantity, cost, realized, cash, gross)
    return held


def assert_held(held: Any, expected: Exact) -> None:
    """Check quantity, average cost and realised P&L, to within rounding."""
    quantity, average_cost, realized = held
    slack = 1e-9 * float(expected.gross + 1)
    assert abs(quantity - float(expected.quantity)) <= 1e-9
    assert (quantity == 0) == (expected.quantity == 0)
    assert abs(quantity * average_cost - float(expected.cost)) <= slack
    assert abs(realized - float(expected.realized)) <= slack
    if not expected.quantity:
        assert average_cost == 0
