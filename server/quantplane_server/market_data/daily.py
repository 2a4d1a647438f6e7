"""Aggregates days once they are over, and again when their rows have changed.

Whoever changes rows marks their days in the same transaction, and each marking has a
version of its own. `daily_bars` computes marked days from their rows, so it is right
at any time. A day loses its mark once it was aggregated, unless a writer has marked it
again since, or is about to.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime
from itertools import groupby
from time import monotonic

from asyncpg import DataError

from quantplane_server.checks import FIRST
from quantplane_server.db import Database, Edition
from quantplane_server.market_data import queries
from quantplane_server.market_data.queries import DAY, PendingDay

logger = logging.getLogger(__name__)

RUN_S = 20.0
STEP_MARKS = 1_000
STEP_DAYS = 10  # of all symbols

Marks = Sequence[PendingDay]


async def aggregate_days(db: Database, since: datetime | None = None) -> str:
    """Aggregate the marked days that ended an hour ago; return how many there were.

    After RUN_S the rest is left to the next run. Days that began before `since` keep
    the aggregate that they have: retention may have removed rows of theirs.
    """
    until = monotonic() + RUN_S
    since = since or FIRST
    await _release(db, since)
    days = 0
    symbols: set[str] = set()
    steps = _refresh if db.edition is Edition.COMMUNITY else _aggregate
    async with aclosing(steps(db, since)) as done:
        async for marks in done:
            days += len(marks)
            symbols.update(mark.symbol for mark in marks)
            if monotonic() > until:
                break
    return f"{days:,} days of {len(symbols):,} symbols"


async def _aggregate(db: Database, since: datetime) -> AsyncGenerator[Marks, None]:
    """Aggregate symbol by symbol into a table; yield the marks of each."""
    after = ("", since)
    while True:
        async with db.connection() as conn:
            found = await queries.pending_by_symbol(conn, since, after, STEP_MARKS)
        if not found:
            return
        for symbol, group in groupby(found, key=lambda mark: mark.symbol):
            marks = list(group)
            try:
                async with db.transaction() as conn:
                    days = [mark.day for mark in marks]
                    await queries.aggregate_days(conn, symbol, days)
                    await queries.unmark_days(conn, marks)
            except DataError:
                _log_failure(marks)
                marks = []
            yield marks
        after = found[-1].symbol, found[-1].day


async def _refresh(db: Database, since: datetime) -> AsyncGenerator[Marks, None]:
    """Refresh the continuous aggregate run by run of days; yield the marks of each."""
    while True:
        async with db.connection() as conn:
            found = await queries.pending_by_day(conn, since, STEP_DAYS)
        if not found:
            return
        for marks in _runs(found):
            try:
                async with db.connection() as conn:
                    first, last = marks[0].day, marks[-1].day
                    await queries.refresh_days(conn, first, last + DAY)
                    await queries.unmark_days(conn, marks)
            except DataError:
                _log_failure(marks)
                marks = []
            yield marks
        since = found[-1].day + DAY


def _runs(marks: Marks) -> list[list[PendingDay]]:
    """Return marks in order of day as runs of neighbouring days."""
    runs: list[list[PendingDay]] = []
    for mark in marks:
        if not runs or mark.day - runs[-1][-1].day > DAY:
            runs.append([])
        runs[-1].append(mark)
    return runs


def _log_failure(marks: Marks) -> None:
    """Log what must not hold back the other days; these are read from their rows."""
    first, last = marks[0], marks[-1]
    logger.exception("could not aggregate %s to %s", first, last)


async def _release(db: Database, before: datetime) -> None:
    """Unmark old days that have no rows, and so let their aggregates count again."""
    async with db.connection() as conn:
        marks = await queries.pending_without_rows(conn, before, STEP_MARKS)
        await queries.unmark_days(conn, marks)
