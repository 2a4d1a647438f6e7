"""What a broker makes of commands and quotes, without a clock or a network.

A buy fills at the ask, a sell at the bid, at most at the size that the quote shows
there; what one order takes is gone for those behind it, until the next quote. So
equal commands and quotes give equal reports.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from quantplane import v1 as pb

VENUE = "paper"
DUST = 1e-9  # of an order's quantity: what is left by rounding is not left
TOO_LATE = "the order is over"

Report = pb.OrderReport | pb.ExecutionReport


class Commission(NamedTuple):
    """What a fill costs, in quote currency."""

    bps: float = 0.0  # hundredths of a percent of the notional
    per_unit: float = 0.0

    def of(self, quantity: float, price: float) -> float:
        return quantity * (abs(price) * self.bps / 1e4 + self.per_unit)


@dataclass
class Working:
    """An order at the broker; its terms and what is filled are as of now."""

    order: pb.Order
    fills: int  # that it has had

    @property
    def left(self) -> float:
        left = self.order.quantity - self.order.filled_quantity
        return left if left > DUST * self.order.quantity else 0.0

    @property
    def waits_for_stop(self) -> bool:
        return self.order.HasField("stop_price") and not self.order.HasField(
            "triggered_at"
        )


@dataclass
class Market:
    """One symbol: its latest quote, and the orders in it as they came."""

    quote: pb.Quote = field(default_factory=pb.Quote)
    sizes: dict[int, float] = field(default_factory=dict)  # left for buys, for sells
    orders: dict[str, Working] = field(default_factory=dict)

    def show(self, quote: pb.Quote) -> None:
        self.quote = quote
        self.sizes = {
            pb.SIDE_BUY: quote.ask_size or inf,
            pb.SIDE_SELL: quote.bid_size or inf,
        }

    def price(self, side: int) -> float | None:
        """Return what an order of this side fills at."""
        quote = self.quote
        if side == pb.SIDE_BUY:
            return quote.ask if quote.HasField("ask") else None
        return quote.bid if quote.HasField("bid") else None


class Book:
    """The live orders of a paper broker, and the latest quotes of their symbols."""

    def __init__(self, commission: Commission) -> None:
        self._commission = commission
        self._markets: dict[str, Market] = {}

    @property
    def symbols(self) -> set[str]:
        """Of the live orders."""
        return {symbol for symbol, market in self._markets.items() if market.orders}

    def forget(self, symbol: str) -> None:
        """Drop the quote of a symbol without orders."""
        self._markets.pop(symbol, None)

    def take(self, command: pb.BrokerCommand, fills: int = 0) -> list[Report]:
        """Do what a command says; `fills` is how many the order has had."""
        market = self._markets.setdefault(command.order.symbol, Market())
        return list(self._take(market, command, fills))

    def see(self, quote: pb.Quote) -> list[Report]:
        """Fill what the quote allows. The same quote again allows nothing more."""
        market = self._markets.setdefault(quote.symbol, Market())
        if quote == market.quote:
            return []
        market.show(quote)
        return [
            report
            for working in list(market.orders.values())
            for report in self._fill(market, working)
        ]

    def _take(
        self, market: Market, command: pb.BrokerCommand, fills: int
    ) -> Iterator[Report]:
        order, kind = command.order, command.type
        if kind == pb.BROKER_COMMAND_TYPE_NEW or not command.revision:
            yield from _accept(market, Working(_copy(order), fills))
        working = market.orders.get(order.order_id)
        match kind:
            case pb.BROKER_COMMAND_TYPE_CANCEL:
                yield _cancel(market, command)
            case pb.BROKER_COMMAND_TYPE_REPLACE:
                yield _replace(market, working, command)
            case pb.BROKER_COMMAND_TYPE_EXPIRE:
                market.orders.pop(order.order_id, None)
        if working and order.order_id in market.orders:
            yield from self._fill(market, working)

    def _fill(self, market: Market, working: Working) -> Iterator[Report]:
        """Do for an order what the latest quote allows."""
        order = working.order
        price = market.price(order.side)
        if price is None:
            return
        if working.waits_for_stop:
            if not _reaches(order.side, order.stop_price, price):
                return
            order.triggered_at.CopyFrom(market.quote.time)
            triggered = _report(order, pb.ORDER_EVENT_TYPE_TRIGGERED)
            triggered.time.CopyFrom(market.quote.time)
            yield triggered
        if quantity := _quantity(working, price, market.sizes[order.side]):
            market.sizes[order.side] = round(market.sizes[order.side] - quantity, 9)
            yield self._execution(market.quote, working, quantity, price)
        if not working.left:
            del market.orders[order.order_id]
        elif _at_once(order):
            del market.orders[order.order_id]
            yield _report(order, pb.ORDER_EVENT_TYPE_CANCELLED)

    def _execution(
        self, quote: pb.Quote, working: Working, quantity: float, price: float
    ) -> pb.ExecutionReport:
        order = working.order
        order.filled_quantity += quantity
        working.fills += 1
        return pb.ExecutionReport(
            order_id=order.order_id,
            type=pb.ORDER_EVENT_TYPE_TRADE,
            broker_exec_id=f"{working.fills}@{quote.time.ToNanoseconds()}",
            symbol=order.symbol,
            side=order.side,
            quantity=quantity,
            price=price,
            commission=self._commission.of(quantity, price),
            venue=VENUE,
            time=quote.time,
        )


def rejected(order: pb.Order, code: str, text: str) -> pb.OrderReport:
    report = _report(order, pb.ORDER_EVENT_TYPE_REJECTED)
    report.code, report.text = code, text
    return report


def _accept(market: Market, working: Working) -> Iterator[Report]:
    """Take an order in, and say what has not been said of it."""
    order = working.order
    market.orders[order.order_id] = working
    if not order.HasField("submitted_at"):
        yield _report(order, pb.ORDER_EVENT_TYPE_SUBMITTED)
    if not order.broker_order_id:
        acknowledged = _report(order, pb.ORDER_EVENT_TYPE_ACKNOWLEDGED)
        acknowledged.broker_order_id = f"paper-{order.order_id.replace('-', '')}"[:64]
        yield acknowledged


def _cancel(market: Market, command: pb.BrokerCommand) -> pb.OrderReport:
    if market.orders.pop(command.order.order_id, None):
        return _report(command.order, pb.ORDER_EVENT_TYPE_CANCELLED)
    return _refusal(command, pb.ORDER_EVENT_TYPE_CANCEL_REJECTED, TOO_LATE)


def _replace(
    market: Market, working: Working | None, command: pb.BrokerCommand
) -> pb.OrderReport:
    """Put new terms in force. The order keeps its place."""
    refused, terms = pb.ORDER_EVENT_TYPE_REPLACE_REJECTED, command.order.pending_terms
    if working is None:
        return _refusal(command, refused, TOO_LATE)
    order = working.order
    if terms.quantity < order.filled_quantity:
        text = f"{order.filled_quantity:g} are filled already"
        return _refusal(command, refused, text)
    order.quantity = terms.quantity
    for name in ("price", "stop_price"):
        if terms.HasField(name):
            setattr(order, name, getattr(terms, name))
    if not working.left:
        del market.orders[order.order_id]
    replaced = _report(order, pb.ORDER_EVENT_TYPE_REPLACED)
    replaced.command_version = command.order.version
    return replaced


def _quantity(working: Working, price: float, size: float) -> float:
    """Return how much of an order fills at this price, of which `size` is left."""
    order, left = working.order, working.left
    if order.HasField("price") and not _reaches(order.side, price, order.price):
        return 0.0
    if order.time_in_force == pb.TIME_IN_FORCE_IOC and working.fills:
        return 0.0  # it had its one quote, and its cancellation was lost
    if order.time_in_force == pb.TIME_IN_FORCE_FOK and size < left:
        return 0.0
    return min(left, size)


def _reaches(side: int, level: float, price: float) -> bool:
    """Say whether `price` is at `level` or, for a buy above, for a sell below it."""
    return price >= level if side == pb.SIDE_BUY else price <= level


def _at_once(order: pb.Order) -> bool:
    return order.time_in_force in (pb.TIME_IN_FORCE_IOC, pb.TIME_IN_FORCE_FOK)


def _report(order: pb.Order, kind: "pb.OrderEventType.ValueType") -> pb.OrderReport:
    return pb.OrderReport(order_id=order.order_id, type=kind)


def _refusal(
    command: pb.BrokerCommand, kind: "pb.OrderEventType.ValueType", text: str
) -> pb.OrderReport:
    report = _report(command.order, kind)
    report.command_version = command.order.version
    report.text = text
    return report


def _copy(order: pb.Order) -> pb.Order:
    copy = pb.Order()
    copy.CopyFrom(order)
    return copy
