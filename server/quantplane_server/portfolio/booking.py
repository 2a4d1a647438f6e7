"""Booking executions: rows, and the positions that follow from them."""

from collections import Counter, deque
from collections.abc import Sequence
from datetime import datetime

from quantplane import v1 as pb
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.db import Connection
from quantplane_server.portfolio import queries
from quantplane_server.portfolio.positions import (
    Book,
    Position,
    fill_of,
    is_correction,
    is_reversal,
)


async def book(conn: Connection, executions: Sequence[pb.Execution]) -> None:
    """Book executions in the order given, inside the caller's transaction.

    Sets on each what it did: position_quantity and realized_pnl. Holds the positions
    in their symbols until the end of the transaction. An execution may be reversed
    once; that is for the caller to see to, who holds its order.
    """
    if not executions:
        return
    # What is corrected keeps its number for ever, so it can be read before the lock.
    corrected = [e.ref_execution_id for e in executions if is_correction(e)]
    numbers = await queries.position_numbers(conn, corrected) if corrected else {}
    ledgers = await _open(conn, executions, numbers)
    for execution in executions:
        await ledgers[execution.symbol].book(conn, execution)
    await queries.insert_executions(
        conn, executions, [numbers[e.execution_id] for e in executions]
    )
    await queries.write_positions(
        conn, {symbol: ledger.held.account for symbol, ledger in ledgers.items()}
    )
    await queries.write_strategy_positions(
        conn,
        {
            pair: ledgers[pair[1]].held.strategies[pair[0]]
            for pair in _pairs(executions)
        },
    )


async def _open(
    conn: Connection, executions: Sequence[pb.Execution], numbers: dict[str, int]
) -> dict[str, "Ledger"]:
    """Lock what the executions change."""
    known = numbers.keys() | {execution.execution_id for execution in executions}
    more = Counter[str]()
    opened: dict[str, datetime] = {}
    for execution in executions:
        new = not is_correction(execution) or execution.ref_execution_id not in known
        more[execution.symbol] += new
        opened.setdefault(execution.symbol, to_datetime(time_us(execution.time)))
    locked = await queries.lock_positions(
        conn, {symbol: (more[symbol], time) for symbol, time in opened.items()}
    )
    pairs = _pairs(executions)
    strategies = await queries.strategy_positions(conn, pairs)
    ledgers = {}
    for symbol, (account, n_executions) in locked.items():
        last = n_executions - more[symbol]
        ledgers[symbol] = Ledger(symbol, Book(account, {}), last, numbers)
    for strategy_id, symbol in pairs:
        new_position = Position(opened_at=opened[symbol])
        held = strategies.get((strategy_id, symbol), new_position)
        ledgers[symbol].held.strategies[strategy_id] = held
    return ledgers


def _pairs(executions: Sequence[pb.Execution]) -> list[queries.Pair]:
    return sorted({(e.strategy_id, e.symbol) for e in executions})


class Ledger:
    """A symbol while executions of it are booked."""

    def __init__(
        self, symbol: str, held: Book, last: int, numbers: dict[str, int]
    ) -> None:
        self.held = held
        self._symbol = symbol
        self._last = last  # number given
        self._numbers = numbers  # execution_id -> position_number
        self._booked: list[pb.Execution] = []

    async def book(self, conn: Connection, execution: pb.Execution) -> None:
        self._number(execution)
        self._booked.append(execution)
        strategy_id = execution.strategy_id
        if execution.ref_execution_id:
            before = self.held.strategies[strategy_id]
            self.held = await self._recomputed(conn, execution)
            after = self.held.strategies[strategy_id]
            execution.realized_pnl = after.realized_pnl - before.realized_pnl
        else:
            execution.realized_pnl = self.held.add(fill_of(execution))
        execution.position_quantity = self.held.strategies[strategy_id].quantity

    def _number(self, execution: pb.Execution) -> None:
        """Give the next number, or to a correction that of what it corrects."""
        corrected = self._numbers.get(execution.ref_execution_id)
        if corrected is None or not is_correction(execution):
            self._last += 1
            corrected = self._last
        self._numbers[execution.execution_id] = corrected

    async def _recomputed(self, conn: Connection, execution: pb.Execution) -> Book:
        """Return what all executions that count come to, as far as they are booked."""
        held = self.held.emptied(fill_of(execution).time)
        reversed_ids = {e.ref_execution_id for e in self._booked if is_reversal(e)}
        booked = deque(
            sorted(
                queries.Live(self._numbers[e.execution_id], e.execution_id, fill_of(e))
                for e in self._booked
                if not is_reversal(e) and e.execution_id not in reversed_ids
            )
        )
        async for live in queries.live_executions(conn, self._symbol):
            while booked and booked[0].number < live.number:
                held.add(booked.popleft().fill)
            if live.execution_id not in reversed_ids:
                held.add(live.fill)
        for live in booked:
            held.add(live.fill)
        return held
