"""All SQL on market_data, its days, and bus_positions."""

import asyncio
import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from quantplane import v1 as pb
from quantplane_server.bus import Position
from quantplane_server.checks import EPOCH, time_us, to_datetime
from quantplane_server.db import Connection, try_lock

EPOCH_2000_US = 946_684_800_000_000  # PostgreSQL counts time from 2000-01-01
DAY = timedelta(days=1)
DAY_US = 86_400_000_000

SymbolDay = tuple[str, int]
"""A symbol and a day: how many UTC days it lies after 1970-01-01."""

BAR_VALUES = (
    "open", "high", "low", "close", "volume", "vwap", "bid", "ask", "bid_size",
    "ask_size",
)  # fmt: skip


# --- The recorder -------------------------------------------------------------------


async def prepare_recorder(conn: Connection) -> None:
    """Create the session's staging table for upsert_quotes."""
    await conn.execute(
        """
        CREATE TEMPORARY TABLE IF NOT EXISTS staged_quotes (LIKE market_data)
            ON COMMIT DELETE ROWS
        """
    )


async def lock_recorder(conn: Connection, shard: int) -> bool:
    """Become the recorder of a shard while the connection lives, if there is none."""
    return await try_lock(conn, "quantplane.recorder", shard)


async def bus_positions(conn: Connection, shards: Iterable[int]) -> dict[int, Position]:
    """Return the position of each shard that the database holds everything up to."""
    rows = await conn.fetch(
        "SELECT shard, epoch, number FROM bus_positions WHERE shard = ANY($1)",
        list(shards),
    )
    return {row["shard"]: Position(row["epoch"], row["number"]) for row in rows}


class Move(NamedTuple):
    """A shard's position, as it is and as it shall be."""

    shard: int
    old: Position
    new: Position


async def move_bus_positions(conn: Connection, moves: Sequence[Move]) -> bool:
    """Move positions; false if one of them is not where its move says."""
    done = await conn.execute(
        """
        INSERT INTO bus_positions AS b (shard, epoch, number)
        SELECT shard, epoch, number
          FROM unnest($1::int[], $2::bigint[], $3::bigint[])
               AS moved (shard, epoch, number)
        ON CONFLICT (shard) DO UPDATE
           SET epoch = excluded.epoch, number = excluded.number
         WHERE (b.shard, b.epoch, b.number) IN
               (SELECT * FROM unnest($1::int[], $4::bigint[], $5::bigint[]))
        """,
        [move.shard for move in moves],
        [move.new.epoch for move in moves],
        [move.new.number for move in moves],
        [move.old.epoch for move in moves],
        [move.old.number for move in moves],
    )
    return bool(done == f"INSERT 0 {len(moves)}")


async def copy_quotes(conn: Connection, rows: bytes) -> None:
    """Store encoded quotes, all of which must be new. Raises UniqueViolationError."""
    await _copy(conn, "market_data", rows)


async def upsert_quotes(conn: Connection, rows: bytes) -> None:
    """Store encoded quotes; each replaces the row of its symbol and time."""
    await _copy(conn, "staged_quotes", rows)
    await conn.execute(
        f"""
        INSERT INTO market_data ({", ".join(_ENCODED)})
        SELECT {", ".join(_ENCODED)} FROM staged_quotes
        ON CONFLICT (time, symbol) DO UPDATE
           SET open = excluded.open, high = excluded.high, low = excluded.low,
               close = excluded.close, volume = excluded.volume, vwap = NULL,
               bid = excluded.bid, ask = excluded.ask,
               bid_size = excluded.bid_size, ask_size = excluded.ask_size
        """
    )


async def _copy(conn: Connection, table: str, rows: bytes) -> None:
    # All in one buffer: after each piece that an iterator yields, asyncpg waits for
    # room to send the next, for ever if the connection is lost then.
    whole = memoryview(rows)  # bytes would be the name of a file
    await conn.copy_to_table(table, source=whole, columns=_ENCODED, format="binary")


_ENCODED = (
    "time", "symbol", "open", "high", "low", "close", "volume", "bid", "ask",
    "bid_size", "ask_size",
)  # fmt: skip
_COPY_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_FINISH = b"\xff\xff"
_NULL = (-1,)
YIELD_ROWS = 256


class Encoded(NamedTuple):
    rows: bytes
    row_count: int
    days: set[SymbolDay]  # of the rows


async def encode_quotes(quotes: Iterable[pb.Quote]) -> Encoded:
    """Return quotes as rows in COPY's binary format, letting others run now and then.

    A quote is a degenerate bar: open = high = low = close = last, or the mid where the
    feed has no trades, or the one side there is. Of quotes with the same symbol and
    microsecond the last counts.
    """
    rows: dict[tuple[str, int], bytes] = {}
    for number, quote in enumerate(quotes):
        symbol, stamp = quote.symbol, time_us(quote.time)
        rows[symbol, stamp] = _encode(quote, symbol.encode(), stamp - EPOCH_2000_US)
        if number % YIELD_ROWS == 0:
            await asyncio.sleep(0)
    days = {(symbol, stamp // DAY_US) for symbol, stamp in rows}
    copied = b"".join([_COPY_BEGIN, *rows.values(), _COPY_FINISH])
    return Encoded(copied, len(rows), days)


def _encode(quote: pb.Quote, symbol: bytes, stamp: int) -> bytes:
    """Return a row: the number of its fields, then the length and value of each."""
    has = quote.HasField
    # What is not 0 is present; asking is slower.
    bid = quote.bid or (0.0 if has("bid") else None)
    ask = quote.ask or (0.0 if has("ask") else None)
    last = quote.last or (0.0 if has("last") else None)
    # Where there is a last, a missing volume means that nothing was traded.
    known = last is not None or has("volume")
    volume = quote.volume or (0 if known else None)
    bid_size = quote.bid_size or (0 if has("bid_size") else None)
    ask_size = quote.ask_size or (0 if has("ask_size") else None)
    price = _mid(bid, ask) if last is None else last
    size = len(symbol)
    layout = _layout(
        size,
        volume is None,
        bid is None,
        ask is None,
        bid_size is None,
        ask_size is None,
    )
    return layout(
        *(11, 8, stamp, size, symbol, 8, price, 8, price, 8, price, 8, price),
        *(_NULL if volume is None else (8, volume)),
        *(_NULL if bid is None else (8, bid)),
        *(_NULL if ask is None else (8, ask)),
        *(_NULL if bid_size is None else (4, bid_size)),
        *(_NULL if ask_size is None else (4, ask_size)),
    )


@cache
def _layout(symbol_size: int, *nulls: bool) -> Callable[..., bytes]:
    """Return what packs rows with these fields null: volume, bid, ask and sizes."""
    kinds = zip("qddii", nulls, strict=True)
    optional = "".join("i" if null else f"i{kind}" for kind, null in kinds)
    return struct.Struct(f"!hiqi{symbol_size}sidididid{optional}").pack


def _mid(bid: float | None, ask: float | None) -> float:
    """Return the mid of two prices, or the one there is."""
    if bid is None or ask is None:
        price = ask if bid is None else bid
        assert price is not None
        return price
    return bid / 2 + ask / 2  # a sum could overflow


# --- Quotes -------------------------------------------------------------------------

_QUOTE_COLUMNS = "time, symbol, close, volume, bid, ask, bid_size, ask_size"


async def quotes_after(
    conn: Connection, symbols: Sequence[str], after_us: int, after: str, limit: int
) -> list[pb.Quote]:
    """Return the next recorded quotes behind (time, symbol), in this order."""
    rows = await conn.fetch(
        f"""
        SELECT {_QUOTE_COLUMNS} FROM market_data
         WHERE symbol = ANY($1)
           AND time >= $2 AND (time, symbol COLLATE "C") > ($2, $3)
         ORDER BY time, symbol COLLATE "C" LIMIT $4
        """,
        symbols,
        to_datetime(after_us),
        after,
        limit,
    )
    return [_quote(row) for row in rows]


async def latest_quotes(
    conn: Connection, symbols: Sequence[str], as_of: datetime
) -> list[pb.Quote]:
    """Return the last row at or before a time of each symbol that has one."""
    rows = await conn.fetch(
        f"""
        SELECT {_QUOTE_COLUMNS} FROM unnest($1::text[]) AS wanted (name),
               LATERAL (SELECT * FROM market_data
                         WHERE symbol = name AND time <= $2
                         ORDER BY time DESC LIMIT 1) AS found
        """,
        symbols,
        as_of,
    )
    return [_quote(row) for row in rows]


def _quote(row: Any) -> pb.Quote:
    time, symbol, close, volume, bid, ask, bid_size, ask_size = row
    quote = pb.Quote(
        symbol=symbol, volume=volume, bid=bid, ask=ask,
        bid_size=bid_size, ask_size=ask_size,
    )  # fmt: skip
    quoted = bid is not None or ask is not None
    if volume or not quoted or close != _mid(bid, ask):  # else there was no last
        quote.last = close
    quote.time.FromDatetime(time)
    return quote


# --- Bars ---------------------------------------------------------------------------


async def store_bars(conn: Connection, bars: Iterable[pb.Bar]) -> None:
    """Store bars and mark their days; each replaces the row of its symbol and time.

    It comes last in its transaction, as mark_days does.
    """
    # In order, so that two who store the same ones do not wait for each other.
    rows = dict(sorted({(bar.symbol, time_us(bar.time)): bar for bar in bars}.items()))
    columns: list[list[Any]] = [
        [bar.time.ToDatetime(tzinfo=UTC) for bar in rows.values()],
        [bar.symbol for bar in rows.values()],
    ]
    for name in BAR_VALUES:
        columns.append([_value(bar, name) for bar in rows.values()])
    await conn.execute(
        """
        INSERT INTO market_data (time, symbol, open, high, low, close, volume, vwap,
                                 bid, ask, bid_size, ask_size)
        SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::float8[], $4::float8[],
                             $5::float8[], $6::float8[], $7::bigint[], $8::float8[],
                             $9::float8[], $10::float8[], $11::int[], $12::int[])
        ON CONFLICT (time, symbol) DO UPDATE
           SET open = excluded.open, high = excluded.high, low = excluded.low,
               close = excluded.close, volume = excluded.volume, vwap = excluded.vwap,
               bid = excluded.bid, ask = excluded.ask,
               bid_size = excluded.bid_size, ask_size = excluded.ask_size
        """,
        *columns,
    )
    await mark_days(conn, {(symbol, stamp // DAY_US) for symbol, stamp in rows})


def _value(bar: pb.Bar, field: Any) -> float | None:
    value: float = getattr(bar, field)
    return value if bar.HasField(field) else None


# Each row is a bar as stored.
_STORED = """
    SELECT time, open, high, low, close, volume, vwap, bid, ask, bid_size, ask_size
      FROM market_data
     WHERE symbol = $1 AND time >= $3 AND time < $4
     ORDER BY time LIMIT $2
"""

# Each row is the bar of a bucket of width $3, made of parts: rows or whole days.
_BUCKETS = """
    SELECT time_bucket($3, at) AS time,
           first(first_price, at) AS open,
           max(highest) AS high,
           min(lowest) AS low,
           last(close, at) AS close,
           sum(volume)::bigint AS volume,
           sum(vwap_value) / nullif(sum(vwap_volume), 0) AS vwap,
           last(bid, at) AS bid,
           last(ask, at) AS ask,
           last(bid_size, at) AS bid_size,
           last(ask_size, at) AS ask_size
      FROM ({parts}) AS parts
     GROUP BY 1 ORDER BY 1 LIMIT $2
"""

# Rows without open, high or low count with their close.
_ROWS = """
    SELECT time AS at, coalesce(open, close) AS first_price,
           coalesce(high, close) AS highest, coalesce(low, close) AS lowest, close,
           volume, vwap * volume AS vwap_value,
           CASE WHEN vwap IS NOT NULL THEN volume END AS vwap_volume,
           bid, ask, bid_size, ask_size
      FROM market_data
     WHERE symbol = $1 AND time >= {start} AND time < {end}
"""

_DAYS = """
    SELECT day AS at, first_price, highest, lowest, close, volume, vwap_value,
           vwap_volume, bid, ask, bid_size, ask_size
      FROM daily_bars
     WHERE symbol = $1 AND day >= $4 AND day < $5
"""

_FROM_ROWS = _BUCKETS.format(parts=_ROWS.format(start="$4", end="$5"))
_FROM_DAYS = _BUCKETS.format(parts=_DAYS)

# The range is $6 to $7, the whole days in it $4 to $5. Looking for rows before and
# behind them costs more than the days, so it is left out where there can't be any.
_FROM_BOTH = _BUCKETS.format(
    parts=" UNION ALL ".join(
        [_ROWS.format(start="$6", end="$4"), _DAYS, _ROWS.format(start="$5", end="$7")]
    )
)

# The same with a layout of one width, for COPY: NaN and -1 stand for null.
_FIXED = """
    SELECT time,
           coalesce(open, 'NaN'), coalesce(high, 'NaN'), coalesce(low, 'NaN'),
           close, coalesce(volume, -1), coalesce(vwap, 'NaN'),
           coalesce(bid, 'NaN'), coalesce(ask, 'NaN'),
           coalesce(bid_size, -1), coalesce(ask_size, -1)
      FROM ({query}) AS bars
"""


_BAR_ROW = np.dtype(
    [("fields", ">i2")]
    + [
        part
        for name, kind in (
            ("time_us", ">i8"), ("open", ">f8"), ("high", ">f8"), ("low", ">f8"),
            ("close", ">f8"), ("volume", ">i8"), ("vwap", ">f8"), ("bid", ">f8"),
            ("ask", ">f8"), ("bid_size", ">i4"), ("ask_size", ">i4"),
        )
        for part in ((f"{name}_length", ">i4"), (name, kind))
    ]
)  # fmt: skip
_COPY_HEAD, _COPY_END = 19, 2  # bytes


class BarRange(NamedTuple):
    """Bars of a symbol in [start, end); `interval` None: the rows as stored."""

    symbol: str
    start: datetime
    end: datetime
    interval: timedelta | None

    @property
    def daily(self) -> bool:
        """Whether these are bars of whole days, which the daily aggregate serves."""
        return self.interval is not None and not self.interval % DAY

    @property
    def whole_days(self) -> tuple[datetime, datetime]:
        """The whole days in the range: the first, and the one after the last."""
        start, end = self.start - EPOCH, self.end - EPOCH
        first = min(-(-start // DAY) * DAY, end)
        return EPOCH + first, EPOCH + max(end // DAY * DAY, first)


async def bars(conn: Connection, wanted: BarRange, limit: int) -> list[pb.Bar]:
    """Return the first bars of a range, in order of time."""
    rows = await conn.fetch(*_bar_query(wanted, limit))
    return [_bar(wanted.symbol, row) for row in rows]


async def bar_columns(
    conn: Connection, wanted: BarRange, limit: int
) -> "np.ndarray[Any, np.dtype[np.void]]":
    """Return the first bars of a range as a record array, -1 and NaN for null."""
    query, *args = _bar_query(wanted, limit)
    out = BytesIO()
    await conn.copy_from_query(
        _FIXED.format(query=query), *args, output=out, format="binary"
    )
    data = memoryview(out.getbuffer())[_COPY_HEAD:-_COPY_END]
    rows = np.frombuffer(data, dtype=_BAR_ROW).copy()
    rows["time_us"] += EPOCH_2000_US
    return rows


def _bar_query(wanted: BarRange, limit: int) -> tuple[Any, ...]:
    symbol, start, end, interval = wanted
    if interval is None:
        return _STORED, symbol, limit, start, end
    if not wanted.daily:
        return _FROM_ROWS, symbol, limit, interval, start, end
    if wanted.whole_days == (start, end):
        return _FROM_DAYS, symbol, limit, interval, start, end
    return _FROM_BOTH, symbol, limit, interval, *wanted.whole_days, start, end


def _bar(symbol: str, row: Any) -> pb.Bar:
    time, *values = row
    bar = pb.Bar(symbol=symbol, **dict(zip(BAR_VALUES, values, strict=True)))
    bar.time.FromDatetime(time)
    return bar


async def first_time(conn: Connection, wanted: BarRange) -> datetime | None:
    """Return the time of the first row in a range."""
    time: datetime | None = await conn.fetchval(
        """
        SELECT time FROM market_data WHERE symbol = $1 AND time >= $2 AND time < $3
         ORDER BY time LIMIT 1
        """,
        wanted.symbol,
        wanted.start,
        wanted.end,
    )
    return time


async def has_data(conn: Connection, symbol: str) -> bool:
    """Tell whether a symbol has rows, or daily bars of rows that are gone."""
    found: bool = await conn.fetchval(
        """
        SELECT EXISTS (SELECT FROM market_data WHERE symbol = $1)
            OR EXISTS (SELECT FROM daily_bars WHERE symbol = $1)
        """,
        symbol,
    )
    return found


# --- Days ---------------------------------------------------------------------------


class PendingDay(NamedTuple):
    """A day's mark: its rows have changed since it was aggregated."""

    symbol: str
    day: datetime
    version: int  # of the mark; every marking makes another


async def mark_days(conn: Connection, days: Iterable[SymbolDay]) -> None:
    """Mark days whose rows this transaction has changed; comes last in it.

    All writers mark in one order, so none can wait for another that waits for it.
    """
    ordered = sorted(days)
    await conn.execute(
        """
        INSERT INTO pending_days (symbol, day)
        SELECT * FROM unnest($1::text[], $2::timestamptz[])
        ON CONFLICT (symbol, day) DO UPDATE SET version = excluded.version
        """,
        [symbol for symbol, _ in ordered],
        [EPOCH + day * DAY for _, day in ordered],
    )


async def pending_day_count(conn: Connection) -> int:
    count: int = await conn.fetchval("SELECT count(*) FROM pending_days")
    return count


async def overdue_day_count(conn: Connection) -> int:
    """Return how many of the pending days have been over for a day."""
    count: int = await conn.fetchval(
        "SELECT count(*) FROM pending_days WHERE day <= now() - INTERVAL '49 hours'"
    )
    return count


# Days are over for good when rows that were under way at midnight are committed.
_OVER = "day <= now() - INTERVAL '25 hours'"


async def pending_by_symbol(
    conn: Connection, since: datetime, after: tuple[str, datetime], limit: int
) -> list[PendingDay]:
    """Return the next marks of days that are over, in order of symbol and day."""
    rows = await conn.fetch(
        f"""
        SELECT symbol, day, version FROM pending_days
         WHERE {_OVER} AND day >= $1 AND (symbol, day) > ($2, $3)
         ORDER BY symbol, day LIMIT $4
        """,
        since,
        *after,
        limit,
    )
    return [PendingDay(*row) for row in rows]


async def pending_by_day(
    conn: Connection, since: datetime, days: int
) -> list[PendingDay]:
    """Return all marks of the first days that are over, in order of day."""
    rows = await conn.fetch(
        f"""
        SELECT symbol, day, version FROM pending_days
         WHERE day IN (SELECT DISTINCT day FROM pending_days
                        WHERE {_OVER} AND day >= $1 ORDER BY day LIMIT $2)
         ORDER BY day
        """,
        since,
        days,
    )
    return [PendingDay(*row) for row in rows]


async def pending_without_rows(
    conn: Connection, before: datetime, limit: int
) -> list[PendingDay]:
    """Return marks of days before a time that have no rows."""
    rows = await conn.fetch(
        """
        SELECT symbol, day, version FROM pending_days AS p
         WHERE day < $1
           AND NOT EXISTS (SELECT FROM market_data AS m
                            WHERE m.symbol = p.symbol AND m.time >= p.day
                              AND m.time < p.day + INTERVAL '24 hours')
         LIMIT $2
        """,
        before,
        limit,
    )
    return [PendingDay(*row) for row in rows]


async def unmark_days(conn: Connection, marks: Sequence[PendingDay]) -> None:
    """Remove the marks that no writer has made again, or is about to.

    A writer holds its marks until it commits: they are passed over, not waited for.
    """
    await conn.execute(
        """
        WITH unchanged AS (
            SELECT symbol, day FROM pending_days AS p
             WHERE (symbol, day, version) IN
                   (SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::bigint[]))
               FOR UPDATE OF p SKIP LOCKED
        )
        DELETE FROM pending_days AS p USING unchanged AS u
         WHERE p.symbol = u.symbol AND p.day = u.day
        """,
        [mark.symbol for mark in marks],
        [mark.day for mark in marks],
        [mark.version for mark in marks],
    )


async def aggregate_days(
    conn: Connection, symbol: str, days: Sequence[datetime]
) -> None:
    """Replace aggregates by what the rows give now, of those days that are marked.

    Another run may have aggregated and unmarked some since the caller looked.
    """
    await conn.execute(
        """
        DELETE FROM aggregated_days AS a USING pending_days AS p
         WHERE a.symbol = $1 AND a.day = ANY($2)
           AND p.symbol = a.symbol AND p.day = a.day
        """,
        symbol,
        days,
    )
    await conn.execute(
        """
        INSERT INTO aggregated_days
        SELECT b.* FROM daily_bars AS b, pending_days AS p
         WHERE b.symbol = $1 AND b.day = ANY($2)
           AND p.symbol = b.symbol AND p.day = b.day
        """,
        symbol,
        days,
    )


async def refresh_days(conn: Connection, first: datetime, end: datetime) -> None:
    """Bring the continuous aggregate of days in [first, end) up to date.

    Not within a transaction: it makes its own.
    """
    await conn.execute(
        """
        CALL refresh_continuous_aggregate(
            'market_data_daily', $1::timestamptz, $2::timestamptz)
        """,
        first,
        end,
    )


# --- Symbols ------------------------------------------------------------------------


async def symbols_after(conn: Connection, symbol: str, limit: int) -> list[pb.Symbol]:
    """Return the next symbols that have rows, by one index probe each."""
    rows = await conn.fetch(
        """
        WITH RECURSIVE found (symbol, n) AS (
            (SELECT symbol, 1 FROM market_data WHERE symbol > $1
              ORDER BY symbol LIMIT 1)
            UNION ALL
            SELECT (SELECT m.symbol FROM market_data AS m WHERE m.symbol > f.symbol
                     ORDER BY m.symbol LIMIT 1), n + 1
              FROM found AS f WHERE f.symbol IS NOT NULL AND n < $2
        )
        SELECT symbol,
               (SELECT time FROM market_data AS m WHERE m.symbol = found.symbol
                 ORDER BY time LIMIT 1) AS first_time,
               (SELECT time FROM market_data AS m WHERE m.symbol = found.symbol
                 ORDER BY time DESC LIMIT 1) AS last_time
          FROM found WHERE symbol IS NOT NULL
        """,
        symbol,
        limit,
    )
    return [_symbol(row) for row in rows]


def _symbol(row: Any) -> pb.Symbol:
    symbol = pb.Symbol(symbol=row["symbol"])
    symbol.first_time.FromDatetime(row["first_time"])
    symbol.last_time.FromDatetime(row["last_time"])
    return symbol
