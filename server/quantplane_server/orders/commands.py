"""What can be done to orders, and what comes of it."""

from typing import NamedTuple, TypeAlias

from quantplane import v1 as pb
from quantplane_server.origin import NONE, Origin


class Submit(NamedTuple):
    """A strategy wants an order."""

    order: pb.NewOrder
    origin: Origin = NONE
    confined: bool = False  # by who does not see the signals of other strategies


class Change(NamedTuple):
    """A gateway reports an event of an order, or somebody asks for one."""

    report: pb.OrderReport
    origin: Origin = NONE
    version: int = 0  # that the order must have; 0: any


class Replace(NamedTuple):
    """Somebody asks to change the terms of an order of a strategy."""

    order_id: str
    strategy_id: str
    request: pb.ReplaceOrderRequest
    origin: Origin = NONE


class Fill(NamedTuple):
    """A gateway reports a fill, a bust or a correction."""

    report: pb.ExecutionReport
    origin: Origin = NONE


Command: TypeAlias = Submit | Change | Replace | Fill


class Done(NamedTuple):
    """A command was done, or had been before."""

    order: pb.Order  # as it is now
    duplicate: bool


Outcome: TypeAlias = Done | Exception
