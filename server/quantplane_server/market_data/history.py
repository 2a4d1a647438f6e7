"""Recorded bars by pages that do not shift when rows are inserted.

A page is named by the time it starts at. Rows as stored are cut by count. Buckets are
cut by time, so that a page reads no more rows than it shows: it may hold fewer bars
than asked for where there are holes, but never none while there are more.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from quantplane import v1 as pb
from quantplane_server.checks import seconds, time_us, to_datetime
from quantplane_server.db import Connection
from quantplane_server.market_data import queries
from quantplane_server.market_data.queries import BarRange

FIRST = datetime(1900, 1, 1, tzinfo=UTC)
LAST = datetime(9999, 12, 31, tzinfo=UTC)
ORIGIN = datetime(2000, 1, 3, tzinfo=UTC)  # of time_bucket: a Monday


class Page(NamedTuple):
    rows: Any  # what the reader returned, at most `limit` of it
    next_start: datetime | None  # of the next page


def bar_range(
    symbol: str, request: pb.ListBarsRequest | pb.StreamBarsRequest
) -> BarRange:
    """Return the range that a checked request asks for."""
    return BarRange(
        symbol,
        _bound(request, "start_time", FIRST),
        _bound(request, "end_time", LAST),
        timedelta(seconds=seconds(request.interval)) or None,
    )


async def read_page(
    conn: Connection,
    read: Callable[[Connection, BarRange, int], Awaitable[Any]],
    wanted: BarRange,
    limit: int,
) -> Page:
    """Read the first page of a range with one of the bar queries."""
    if wanted.interval is None:
        rows = await read(conn, wanted, limit + 1)
        more = len(rows) > limit
        return Page(rows[:limit], _time(rows[limit]) if more else None)
    first = await queries.first_time_from(conn, wanted.symbol, wanted.start)
    if first is None or first >= wanted.end:
        return Page(await read(conn, wanted, 0), None)
    end = first - (first - ORIGIN) % wanted.interval + limit * wanted.interval
    rows = await read(conn, wanted._replace(end=min(end, wanted.end)), limit)
    following = await queries.first_time_from(conn, wanted.symbol, end)
    if following is None or following >= wanted.end:
        return Page(rows, None)
    return Page(rows, following)


def _bound(request: Any, field: str, default: datetime) -> datetime:
    if not request.HasField(field):
        return default
    return to_datetime(time_us(getattr(request, field)))


def _time(row: Any) -> datetime:
    if isinstance(row, pb.Bar):
        return row.time.ToDatetime(tzinfo=UTC)
    return to_datetime(int(row["time_us"]))
