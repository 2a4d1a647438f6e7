"""What executions make of a position, by average cost. Pure: no I/O.

Booking, recomputing and auditing fold fills with the same function in the same order,
so their results are equal to the last bit.

It holds after every fill, but for rounding:
realized_pnl - quantity * average_cost = cash_flow.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from quantplane import v1 as pb
from quantplane_server.checks import EPOCH, time_us, to_datetime

TOLERANCE = 1e-9  # of a position; less than that of it is rounding


class Fill(NamedTuple):
    """An execution, as far as positions are concerned."""

    time: datetime
    strategy_id: str  # empty: none
    quantity: float  # negative: sold
    price: float
    commission: float


class Position(NamedTuple):
    """A position, of the account or of a strategy; all amounts in quote currency."""

    quantity: float = 0.0  # negative: short
    average_cost: float = 0.0  # per unit; 0 if flat
    realized_pnl: float = 0.0  # less commission
    cash_flow: float = 0.0  # what was received less what was paid, commission included
    commission: float = 0.0
    strategy_id: str = ""  # that opened it
    opened_at: datetime = EPOCH
    updated_at: datetime = EPOCH  # the latest time of its executions

    def emptied(self, time: datetime) -> "Position":
        """Return what to fold all fills into again, after an execution at `time`."""
        latest = max(self.updated_at, time)
        return Position(opened_at=self.opened_at, updated_at=latest)


class Book:
    """The positions in one symbol: the account's, and that of each strategy."""

    def __init__(self, account: Position, strategies: Mapping[str, Position]) -> None:
        self.account = account
        self.strategies = dict(strategies)

    def add(self, fill: Fill) -> float:
        """Fold a fill; return what it adds to its strategy's realised P&L."""
        held = self.strategies.get(fill.strategy_id, Position())
        self.account, _ = after(self.account, fill)
        self.strategies[fill.strategy_id], realized = after(held, fill)
        return realized

    def emptied(self, time: datetime) -> "Book":
        strategies = {id: held.emptied(time) for id, held in self.strategies.items()}
        return Book(self.account.emptied(time), strategies)


def after(held: Position, fill: Fill) -> tuple[Position, float]:
    """Return the position after a fill, and what that adds to the realised P&L."""
    quantity = held.quantity + fill.quantity
    cost, price = held.average_cost, fill.price
    strategy_id, opened_at = held.strategy_id, held.opened_at
    if abs(quantity) <= TOLERANCE * abs(held.quantity):  # closed
        gain = held.quantity * (price - cost) - quantity * price
        quantity = cost = 0.0
    elif abs(quantity) < abs(held.quantity) and _same_side(quantity, held.quantity):
        gain = -fill.quantity * (price - cost)  # reduced
    elif _same_side(held.quantity, fill.quantity):  # added to
        gain = 0.0
        cost += (price - cost) * (fill.quantity / quantity)
    else:  # opened, or flipped
        gain = held.quantity * (price - cost)
        cost = price
        strategy_id, opened_at = fill.strategy_id, fill.time
    realized = gain - fill.commission
    position = Position(
        quantity,
        cost,
        held.realized_pnl + realized,
        held.cash_flow - fill.quantity * price - fill.commission,
        held.commission + fill.commission,
        strategy_id,
        opened_at,
        max(held.updated_at, fill.time),
    )
    return position, realized


def _same_side(one: float, other: float) -> bool:
    return (one > 0 and other > 0) or (one < 0 and other < 0)


def is_reversal(execution: pb.Execution) -> bool:
    return bool(execution.ref_execution_id) and execution.quantity < 0


def is_correction(execution: pb.Execution) -> bool:
    return bool(execution.ref_execution_id) and execution.quantity >= 0


def fill_of(execution: pb.Execution) -> Fill:
    bought = execution.side == pb.SIDE_BUY
    return Fill(
        to_datetime(time_us(execution.time)),
        execution.strategy_id,
        execution.quantity if bought else -execution.quantity,
        execution.price,
        execution.commission,
    )
