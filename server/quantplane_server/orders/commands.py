"""What can be done to orders, and what comes of it."""

from typing import NamedTuple, TypeAlias

from quantplane import v1 as pb


class Submit(NamedTuple):
    """A strategy wants an order."""

    order: pb.NewOrder
    trace_id: str = ""
    confined: bool = False  # by who does not see the signals of other strategies


class Change(NamedTuple):
    """A gateway reports an event of an order, or somebody asks for one."""

    report: pb.OrderReport
    trace_id: str = ""
    actor: str = ""
    version: int = 0  # that the order must have; 0: any


class Replace(NamedTuple):
    """Somebody asks to change the terms of an order of a strategy."""

    order_id: str
    strategy_id: str
    request: pb.ReplaceOrderRequest
    trace_id: str = ""


class Fill(NamedTuple):
    """A gateway reports a fill, a bust or a correction."""

    report: pb.ExecutionReport
    trace_id: str = ""


Command: TypeAlias = Submit | Change | Replace | Fill


class Done(NamedTuple):
    """A command was done, or had been before."""

    order: pb.Order  # as it is now
    duplicate: bool


Outcome: TypeAlias = Done | Exception
