"""Short ways to say what a paper broker is told, and what it reports."""

from typing import Any
from uuid import UUID

from quantplane import v1 as pb
from quantplane_server.paper.book import Report

SYMBOL = "A"
START_NS = 1_700_000_000_000_000_000


def quote(number: int, bid: float | None, ask: float | None, **sizes: int) -> pb.Quote:
    """Return the quote `number`, a microsecond after the last; None is no price."""
    made = pb.Quote(symbol=SYMBOL, bid=bid, ask=ask, **sizes)
    made.time.FromNanoseconds(START_NS + number * 1_000)
    return made


def order(number: int = 1, **fields: Any) -> pb.Order:
    """Return a market order to buy 10, or what the fields say; pending."""
    given = {
        "order_id": str(UUID(int=number)),
        "symbol": SYMBOL,
        "side": pb.SIDE_BUY,
        "order_type": pb.ORDER_TYPE_MARKET,
        "quantity": 10.0,
        "time_in_force": pb.TIME_IN_FORCE_DAY,
        "status": pb.ORDER_STATUS_PENDING,
        "version": 1,
    }
    return pb.Order(**given | fields)


def command(name: str, order: pb.Order, revision: int = 1) -> pb.BrokerCommand:
    """Return NEW, CANCEL, ... of an order; of the snapshot with revision 0."""
    kind = pb.BrokerCommandType.Value(f"BROKER_COMMAND_TYPE_{name}")
    return pb.BrokerCommand(type=kind, order=order, revision=revision)


def said(report: Report) -> str:
    """Return the name of what a report says."""
    return pb.OrderEventType.Name(report.type).removeprefix("ORDER_EVENT_TYPE_")


def fills(reports: list[Report]) -> list[tuple[float, float]]:
    """Return quantity and price of each fill."""
    return [
        (report.quantity, report.price)
        for report in reports
        if isinstance(report, pb.ExecutionReport)
    ]
