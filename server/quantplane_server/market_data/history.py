"""Recorded bars by pages that do not shift when rows are inserted.

A page is named by the time it starts at. Rows as stored and whole days are cut by
count. Shorter buckets are cut by time, so that a page reads no more rows than it shows:
it may hold fewer bars than asked for where there are holes, but never none while there
are more.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from asyncpg import NumericValueOutOfRangeError

from quantplane import v1 as pb
from quantplane_server.checks import (
    FIRST,
    LAST,
    seconds,
    time_given,
    to_datetime,
)
from quantplane_server.db import Connection
from quantplane_server.errors import InvalidRequest
from quantplane_server.market_data import queries
from quantplane_server.market_data.queries import BarRange

ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)  # of time_bucket: a Monday
TOO_LARGE = "a bar's volume or vwap would be too large a number; ask for shorter bars"

Read = Callable[[Connection, BarRange, int], Awaitable[Any]]
"""One of the bar queries."""


class Page(NamedTuple):
    rows: Any  # what the reader returned, at most `limit` of it
    next_start: datetime | None  # of the next page


def bar_range(
    symbol: str, request: pb.ListBarsRequest | pb.StreamBarsRequest
) -> BarRange:
    """Return the range that a checked request asks for."""
    return BarRange(
        symbol,
        time_given(request, "start_time", FIRST),
        time_given(request, "end_time", LAST),
        timedelta(seconds=seconds(request.interval)) or None,
    )


async def read_page(conn: Connection, read: Read, wanted: BarRange, limit: int) -> Page:
    """Read the first page of a range."""
    if wanted.interval is None or wanted.daily:
        rows = await _read(conn, read, wanted, limit + 1)
        more = len(rows) > limit
        return Page(rows[:limit], _time(rows[limit]) if more else None)
    first = await queries.first_time(conn, wanted)
    if first is None:
        return Page(await read(conn, wanted, 0), None)
    end = _bucket(first, wanted.interval) + limit * wanted.interval
    page = wanted._replace(end=min(end, wanted.end))
    rows = await _read(conn, read, page, limit)
    following = await queries.first_time(conn, wanted._replace(start=page.end))
    return Page(rows, _bucket(following, wanted.interval) if following else None)


async def _read(conn: Connection, read: Read, wanted: BarRange, limit: int) -> Any:
    try:
        return await read(conn, wanted, limit)
    except NumericValueOutOfRangeError:
        raise InvalidRequest([("interval", TOO_LARGE)]) from None


def _bucket(time: datetime, interval: timedelta) -> datetime:
    """Return the start of the bucket that a time lies in."""
    return time - (time - ORIGIN) % interval


def _time(row: Any) -> datetime:
    if isinstance(row, pb.Bar):
        return row.time.ToDatetime(tzinfo=UTC)
    return to_datetime(int(row["time_us"]))
