"""What a portfolio is worth: positions from the database, at the marks of now."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from math import fsum
from typing import TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server import log
from quantplane_server.db import Database
from quantplane_server.errors import ResultTooLarge
from quantplane_server.portfolio import queries
from quantplane_server.portfolio.queries import Totals
from quantplane_server.reference.settings import INITIAL_CASH, configured

LatestQuotes: TypeAlias = Callable[[Iterable[str]], Awaitable[Mapping[str, pb.Quote]]]

MAX_POSITIONS = 20_000  # in one answer


class Valuation:
    """Values the account, and strategies."""

    def __init__(
        self, db: Database, reference: Database, latest_quotes: LatestQuotes
    ) -> None:
        self._db = db
        self._reference = reference
        self._latest_quotes = latest_quotes

    async def portfolio(self, strategy_id: str) -> pb.GetPortfolioResponse:
        """Return a strategy's portfolio; if it is empty, the account's.

        Raises ResultTooLarge.
        """
        portfolio = await self._read(strategy_id, MAX_POSITIONS + 1, open_only=False)
        if len(portfolio.positions) > MAX_POSITIONS:
            raise ResultTooLarge(MAX_POSITIONS, "positions")
        return portfolio

    async def account(self) -> pb.PortfolioSummary:
        """Return the account's sums, however many positions it has."""
        return (await self._read("", None, open_only=True)).summary

    async def mark(self, positions: Sequence[pb.Position]) -> None:
        """Mark the positions that are open."""
        held = [position for position in positions if position.quantity]
        if not held:
            return
        quotes = await self._latest_quotes(position.symbol for position in held)
        for position in held:
            _mark(position, quotes.get(position.symbol))

    async def _read(
        self, strategy_id: str, limit: int | None, open_only: bool
    ) -> pb.GetPortfolioResponse:
        # What is read in one snapshot belongs together: these positions, these sums,
        # and the last event that they include.
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            positions = await queries.positions(conn, strategy_id, "", limit, open_only)
            totals = await queries.totals(conn, strategy_id)
            head = await log.head(conn, "orders")
        initial_cash = 0.0
        if not strategy_id:
            initial_cash = await configured(self._reference, INITIAL_CASH)
        await self.mark(positions)
        summary = _summary(positions, totals, initial_cash)
        summary.revision = head.revision
        return pb.GetPortfolioResponse(summary=summary, positions=positions)


def _mark(position: pb.Position, quote: pb.Quote | None) -> None:
    mark = None if quote is None else _price(quote)
    if mark is None:
        position.mark = position.average_cost
    else:
        assert quote is not None
        position.mark = mark
        position.mark_time.CopyFrom(quote.time)
    per_unit = position.mark - position.average_cost
    position.unrealized_pnl = position.quantity * per_unit
    position.value = position.quantity * position.mark


def _price(quote: pb.Quote) -> float | None:
    """Return the mid, or else the last trade, or else nothing."""
    if quote.HasField("bid") and quote.HasField("ask"):
        return quote.bid / 2 + quote.ask / 2  # a sum could overflow
    return quote.last if quote.HasField("last") else None


def _summary(
    positions: Sequence[pb.Position], totals: Totals, initial_cash: float
) -> pb.PortfolioSummary:
    """Return the sums; `positions` are all that are open, marked, or more."""
    cash = initial_cash + totals.cash_flow
    value = fsum(position.value for position in positions)
    unrealized_pnl = fsum(position.unrealized_pnl for position in positions)
    n_open = sum(bool(position.quantity) for position in positions)
    marked = [
        position.mark_time for position in positions if position.HasField("mark_time")
    ]
    summary = pb.PortfolioSummary(
        total_value=cash + value,
        cash=cash,
        positions_value=value,
        total_pnl=totals.realized_pnl + unrealized_pnl,
        unrealized_pnl=unrealized_pnl,
        realized_pnl=totals.realized_pnl,
        total_exposure=fsum(abs(position.value) for position in positions),
        net_exposure=value,
        n_positions=n_open,
        n_unmarked=n_open - len(marked),
        initial_cash=initial_cash,
        commission=totals.commission,
    )
    times = list(marked)
    if totals.updated_at:
        executed = Timestamp()
        executed.FromDatetime(totals.updated_at)
        times.append(executed)
    if times:
        summary.time.CopyFrom(max(times, key=lambda time: (time.seconds, time.nanos)))
    return summary
