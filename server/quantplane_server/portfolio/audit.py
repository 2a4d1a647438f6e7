"""The audit: what is stored, beside what all executions give."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from math import isclose
from typing import TypeAlias

from quantplane import v1 as pb
from quantplane_server.db import Connection, Database
from quantplane_server.portfolio import queries
from quantplane_server.portfolio.positions import Book, Fill, Position

MAX_DRIFTS = 1_000
TOLERANCE = 1e-9  # of what is compared
ROUNDING = 1e-12  # of all that went into a sum
BATCH = 500  # symbols compared at once

OrderDrifts: TypeAlias = Callable[
    [Connection, int], Awaitable[tuple[list[pb.Drift], int]]
]
"""Compares the orders, inside a transaction: the first drifts, and how many orders."""

ACCOUNT = ("quantity", "average_cost", "realized_pnl")
STRATEGY = (*ACCOUNT, "cash_flow", "commission")


class Audit:
    """Recomputes everything from the executions, one caller at a time."""

    def __init__(self, db: Database, order_drifts: OrderDrifts) -> None:
        self._db = db
        self._order_drifts = order_drifts
        self._one = asyncio.Lock()  # each holds a connection for long

    async def run(self) -> pb.AuditPositionsResponse:
        async with (
            self._one,
            self._db.transaction("repeatable_read", readonly=True) as conn,
        ):
            drifts, n_orders = await self._order_drifts(conn, MAX_DRIFTS)
            report = pb.AuditPositionsResponse(drifts=drifts, n_orders=n_orders)
            report.n_positions = await queries.position_count(conn)
            await _audit_positions(conn, report)
        del report.drifts[MAX_DRIFTS:]
        return report


class Recomputed(Book):
    """What the executions of a symbol give, and how much went into it."""

    def __init__(self) -> None:
        super().__init__(Position(), {})
        self.quantity = 0.0  # bought and sold
        self.amount = 0.0  # in quote currency

    def add(self, fill: Fill) -> float:
        self.quantity += abs(fill.quantity)
        self.amount += abs(fill.quantity * fill.price) + abs(fill.commission)
        return super().add(fill)


async def _audit_positions(conn: Connection, report: pb.AuditPositionsResponse) -> None:
    books: dict[str, Recomputed] = {}
    async for symbol, fill, live in queries.audited_executions(conn):
        report.n_executions += 1
        if symbol not in books:
            if len(books) == BATCH:
                await _compare(conn, books, report)
            books[symbol] = Recomputed()
        if live:
            books[symbol].add(fill)
    async for symbol in queries.symbols_without_executions(conn):
        if len(books) >= BATCH:
            await _compare(conn, books, report)
        books[symbol] = Recomputed()
    await _compare(conn, books, report)


async def _compare(
    conn: Connection, books: dict[str, Recomputed], report: pb.AuditPositionsResponse
) -> None:
    """Note the drifts of symbols, and let go of them."""
    stored = await queries.stored_books(conn, books)
    for symbol, recomputed in books.items():
        if len(report.drifts) < MAX_DRIFTS:
            held = stored.get(symbol, Book(Position(), {}))
            report.drifts.extend(_drifts(symbol, held, recomputed))
    books.clear()


def _drifts(symbol: str, held: Book, recomputed: Recomputed) -> Iterator[pb.Drift]:
    rounding = {
        "quantity": recomputed.quantity * ROUNDING,
        "realized_pnl": recomputed.amount * ROUNDING,
        "cash_flow": recomputed.amount * ROUNDING,
        "commission": recomputed.amount * ROUNDING,
    }
    yield from _differing(
        symbol, "positions", ACCOUNT, held.account, recomputed.account, rounding
    )
    for strategy_id in sorted(held.strategies.keys() | recomputed.strategies.keys()):
        yield from _differing(
            f"{strategy_id} {symbol}",
            "strategy_positions",
            STRATEGY,
            held.strategies.get(strategy_id, Position()),
            recomputed.strategies.get(strategy_id, Position()),
            rounding,
        )


def _differing(
    key: str,
    table: str,
    columns: tuple[str, ...],
    stored: Position,
    recomputed: Position,
    rounding: Mapping[str, float],
) -> Iterator[pb.Drift]:
    for column in columns:
        one, other = getattr(stored, column), getattr(recomputed, column)
        slack = rounding.get(column, 0.0)
        if not isclose(one, other, rel_tol=TOLERANCE, abs_tol=slack):
            yield pb.Drift(
                key=key, column=f"{table}.{column}", stored=one, recomputed=other
            )
