"""All that changes orders: commands that come while a transaction runs share the next.

What a round of commands does is told in round.py; here is what surrounds it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeAlias

import asyncpg

from quantplane import v1 as pb
from quantplane_server.coalescing import Coalescer
from quantplane_server.db import Database
from quantplane_server.errors import QuantplaneError
from quantplane_server.log import Logs
from quantplane_server.orders import risk
from quantplane_server.orders.commands import Command, Outcome, Replace, Submit
from quantplane_server.orders.queries import NameTaken
from quantplane_server.orders.round import Bounds, Round
from quantplane_server.reference.queries import risk_limits
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import EXECUTIONS, ORDERS_REFUSED
from quantplane_server.watch import Watches

MOST = 256  # commands that share a transaction
LIMIT = 10_000  # commands that wait
TRIES = 3  # of a round that was broken off for another's sake

LatestQuotes: TypeAlias = Callable[[Iterable[str]], Awaitable[dict[str, pb.Quote]]]

BROKEN_OFF = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, NameTaken)
REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)


class Writer:
    """Does commands; those of one order in the order in which they come."""

    def __init__(
        self,
        db: Database,
        reference: Database,
        logs: Logs,
        watches: Watches,
        latest_quotes: LatestQuotes,
    ) -> None:
        self._db = db
        self._reference = reference
        self._logs = logs
        self._watches = watches
        self._latest_quotes = latest_quotes
        self._rounds = Coalescer[Command, Outcome](self._round, MOST, LIMIT)
        self._booked = asyncio.Event()

    async def do(self, commands: Sequence[Command]) -> list[Outcome]:
        """Return what came of each: it is committed. Raises Overloaded."""
        outcomes = await self._rounds.do(commands)
        for command, outcome in zip(commands, outcomes, strict=True):
            if isinstance(command, Submit) and isinstance(outcome, QuantplaneError):
                ORDERS_REFUSED.add(1, outcome.reason_name)
        return outcomes

    async def validate(self, submit: Submit) -> float | None:
        """Raise what submitting an order would now; return its notional, if known."""
        limits = await self._limits([submit])
        bounds = Bounds(limits, await self._latest_quotes([submit.order.symbol]))
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            return await Round(conn, bounds).check(submit)

    async def run(self) -> None:
        """Tell who watches portfolios that executions were booked, until cancelled."""
        while True:
            await self._booked.wait()
            self._booked.clear()
            await self._watches.announce(["portfolio"])

    async def close(self) -> None:
        """Return once all that was taken is done."""
        await self._rounds.close()

    async def _round(self, commands: list[Command]) -> list[Outcome]:
        origins = (command.origin for command in commands)
        with tracing.together("write orders", origins):
            return await self._work(commands)

    async def _work(self, commands: list[Command]) -> list[Outcome]:
        taken = False
        for attempt in range(TRIES):
            try:
                return await self._commit(commands, taken)
            except BROKEN_OFF as error:
                if len(commands) == 1 and attempt == TRIES - 1:
                    raise
                taken = taken or isinstance(error, NameTaken)
            except REFUSED as error:  # by a constraint, the backstop of the checks
                if len(commands) == 1:
                    return [error]
                break
        return [(await self._work([command]))[0] for command in commands]

    async def _commit(self, commands: Sequence[Command], taken: bool) -> list[Outcome]:
        bounds = await self._bounds(commands)
        # One statement is a transaction of its own, for fewer round trips.
        alone = Round.is_one_statement(commands, bounds, taken)
        begin = self._db.connection if alone else self._db.transaction
        async with begin() as conn:
            done = Round(conn, bounds, taken)
            outcomes = await done.run(commands)
        for appended in done.appended:
            self._logs.committed(*appended)
        if done.executions:
            EXECUTIONS.add(len(done.executions))
            self._booked.set()
        return outcomes

    async def _bounds(self, commands: Sequence[Command]) -> Bounds:
        limits = await self._limits(commands)
        return Bounds(limits, await self._quotes(commands, limits))

    async def _limits(self, commands: Sequence[Command]) -> dict[str, risk.Limits]:
        strategies = {c.order.strategy_id for c in commands if isinstance(c, Submit)}
        strategies |= {c.strategy_id for c in commands if isinstance(c, Replace)}
        if not strategies:
            return {}
        async with self._reference.connection() as conn:
            return dict(await risk_limits(conn, sorted(strategies)))

    async def _quotes(
        self, commands: Sequence[Command], limits: dict[str, Any]
    ) -> dict[str, pb.Quote]:
        """Return the quotes that market orders are valued at, where limits need it."""
        symbols = {
            c.order.symbol
            for c in commands
            if isinstance(c, Submit)
            and c.order.order_type == pb.ORDER_TYPE_MARKET
            and risk.needs_price(limits.get(c.order.strategy_id, {}))
        }
        return await self._latest_quotes(symbols) if symbols else {}
