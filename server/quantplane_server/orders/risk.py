"""The risk limits of strategies: what an order must keep to be accepted.

`strategies.risk_limits` may hold any of
- max_order_quantity    of one order, in units
- max_order_notional    of one order: quantity times its price, in quote currency
- max_position          of a symbol, in units, long or short, as if all live orders of
                        the order's side were filled
- max_open_orders       live orders of the strategy, this one included
- allowed_symbols       a list; no other may be traded
A limit that is not what it should be refuses every order: it was meant to protect.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple

from quantplane import v1 as pb
from quantplane_server.orders.queries import Working
from quantplane_server.reference.limits import (
    ALLOWED_SYMBOLS,
    MAX_OPEN_ORDERS,
    MAX_ORDER_NOTIONAL,
    MAX_ORDER_QUANTITY,
    MAX_POSITION,
    NUMBERS,
)

PREFIX = "RISK_"

Limits = Mapping[str, Any]


class Breach(NamedTuple):
    """The limit that an order would break, and how."""

    limit: str
    text: str

    @property
    def code(self) -> str:
        """What stands as the reject_code of the order."""
        return PREFIX + self.limit.upper()


class Exposure:
    """What strategies hold and may yet trade; grows with each order accepted."""

    def __init__(
        self, positions: Mapping[tuple[str, str], float], working: Iterable[Working]
    ) -> None:
        self._positions = positions
        self._leaves: defaultdict[tuple[str, str, int], float] = defaultdict(float)
        self._live: Counter[str] = Counter()
        for each in working:
            self._leaves[each.strategy_id, each.symbol, each.side] += each.leaves
            self._live[each.strategy_id] += each.orders

    def live(self, strategy_id: str) -> int:
        return self._live[strategy_id]

    def worst(self, order: pb.Order | pb.NewOrder) -> float:
        """Return the position, in the direction of the order, if all that is live on
        its side were filled."""
        held = self._positions.get((order.strategy_id, order.symbol), 0.0)
        sign = 1 if order.side == pb.SIDE_BUY else -1
        return sign * held + self._leaves[order.strategy_id, order.symbol, order.side]

    def add(self, order: pb.Order | pb.NewOrder, quantity: float, count: int) -> None:
        self._leaves[order.strategy_id, order.symbol, order.side] += quantity
        self._live[order.strategy_id] += count


def needs_price(limits: Limits) -> bool:
    return MAX_ORDER_NOTIONAL in limits


def needs_exposure(limits: Limits) -> bool:
    return MAX_POSITION in limits or MAX_OPEN_ORDERS in limits


def price_of(
    order: pb.Order | pb.NewOrder, terms: pb.Terms, quote: pb.Quote | None
) -> float | None:
    """Return the price that an order is valued at: its limit, its stop price, or what
    the market asks or bids now."""
    if terms.HasField("price"):
        return terms.price
    if terms.HasField("stop_price"):
        return terms.stop_price
    if quote is None:
        return None
    side: Literal["ask", "bid"] = "ask" if order.side == pb.SIDE_BUY else "bid"
    if quote.HasField(side):
        return float(getattr(quote, side))
    return quote.last if quote.HasField("last") else None


def breach(
    limits: Limits,
    order: pb.Order | pb.NewOrder,
    terms: pb.Terms,
    price: float | None,
    exposure: Exposure,
    more: float | None = None,
) -> Breach | None:
    """Return the first limit that an order with these terms would break.

    `more` is by how much the quantity of a live order grows; None for a new one.
    """
    for limit in NUMBERS:
        if limit in limits and not _is_limit(limits[limit]):
            return Breach(limit, f"the limit is no number: {limits[limit]!r}")
    allowed = limits.get(ALLOWED_SYMBOLS)
    if allowed is not None and not isinstance(allowed, list):
        return Breach(ALLOWED_SYMBOLS, f"the limit is no list: {allowed!r}")
    if allowed is not None and order.symbol not in allowed:
        return Breach(ALLOWED_SYMBOLS, f"{order.symbol} is not among them")
    if _above(terms.quantity, limits, MAX_ORDER_QUANTITY):
        return _beyond(MAX_ORDER_QUANTITY, terms.quantity, limits)
    if MAX_ORDER_NOTIONAL in limits:
        if price is None:
            return Breach(MAX_ORDER_NOTIONAL, "there is no price to check it at")
        notional = abs(terms.quantity * price)
        if _above(notional, limits, MAX_ORDER_NOTIONAL):
            return _beyond(MAX_ORDER_NOTIONAL, notional, limits)
    grown = terms.quantity if more is None else more
    worst = exposure.worst(order) + grown
    if grown > 0 and _above(worst, limits, MAX_POSITION):
        return _beyond(MAX_POSITION, worst, limits)
    count = exposure.live(order.strategy_id) + 1
    if more is None and _above(count, limits, MAX_OPEN_ORDERS):
        return _beyond(MAX_OPEN_ORDERS, count, limits)
    return None


def _is_limit(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value)


def _above(value: float, limits: Limits, limit: str) -> bool:
    return limit in limits and value > limits[limit]


def _beyond(limit: str, value: float, limits: Limits) -> Breach:
    return Breach(limit, f"{value:g} is above {limits[limit]:g}")
