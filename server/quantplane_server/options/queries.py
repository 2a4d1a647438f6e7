"""All SQL on options_chains and option_chain_times."""

import asyncio
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import date, datetime
from math import inf
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.db import Connection

TYPES = {pb.OPTION_TYPE_CALL: "call", pb.OPTION_TYPE_PUT: "put"}
NUMBERS = {name: number for number, name in TYPES.items()}
YIELD_ROWS = 512

_VALUES = (
    "bid", "ask", "last_price", "volume", "open_interest", "implied_vol", "delta",
    "gamma", "theta", "vega", "rho",
)  # fmt: skip


# --- Publishing ---------------------------------------------------------------------


async def note_chain(
    conn: Connection, underlying: str, time: datetime, whole: bool
) -> None:
    """Note that a chain is published; who publishes the same one waits for the end.

    A part that is published later does not make a whole chain less whole.
    """
    await conn.execute(
        """
        INSERT INTO option_chain_times AS t (underlying, time, whole)
        VALUES ($1, $2, $3)
        ON CONFLICT (underlying, time) DO UPDATE SET whole = t.whole OR excluded.whole
        """,
        underlying,
        time,
        whole,
    )


async def delete_contracts(conn: Connection, underlying: str, time: datetime) -> None:
    """Delete the chain of one time."""
    await conn.execute(
        "DELETE FROM options_chains WHERE underlying = $1 AND time = $2",
        underlying,
        time,
    )


async def store_contracts(
    conn: Connection,
    underlying: str,
    time: datetime,
    contracts: Sequence[pb.OptionQuote],
) -> None:
    """Store contracts; each replaces the row of its key and time."""
    columns: list[list[Any]] = [
        [date.fromisoformat(quote.expiration) for quote in contracts],
        [quote.strike for quote in contracts],
        [TYPES.get(quote.option_type, "") for quote in contracts],
    ]
    for name in _VALUES:
        columns.append([_value(quote, name) for quote in contracts])
    await conn.execute(
        """
        INSERT INTO options_chains (underlying, time, expiration, strike, option_type,
                                    bid, ask, last_price, volume, open_interest,
                                    implied_vol, delta, gamma, theta, vega, rho)
        SELECT $1, $2, *
          FROM unnest($3::date[], $4::float8[], $5::text[], $6::float8[], $7::float8[],
                      $8::float8[], $9::int[], $10::int[], $11::float8[],
                      $12::float8[], $13::float8[], $14::float8[], $15::float8[],
                      $16::float8[])
        ON CONFLICT (time, underlying, expiration, strike, option_type) DO UPDATE
           SET bid = excluded.bid, ask = excluded.ask,
               last_price = excluded.last_price, volume = excluded.volume,
               open_interest = excluded.open_interest,
               implied_vol = excluded.implied_vol, delta = excluded.delta,
               gamma = excluded.gamma, theta = excluded.theta, vega = excluded.vega,
               rho = excluded.rho
        """,
        underlying,
        time,
        *columns,
    )


def _value(quote: pb.OptionQuote, field: Any) -> float | None:
    value: float = getattr(quote, field)
    return value if value or quote.HasField(field) else None


# --- Reading ------------------------------------------------------------------------


class Span(NamedTuple):
    """When the rows of a chain were quoted: from its base to its newest row."""

    underlying: str
    base: datetime
    newest: datetime


async def span(conn: Connection, underlying: str, as_of: datetime) -> Span | None:
    """Return where the chain as of a time lies, if there is one.

    Its base is the last whole chain. Where none was published it is the last one that
    something else than publishing has put before the first part, or this part.
    """
    row = await conn.fetchrow(
        """
        SELECT coalesce(
                   (SELECT max(time) FROM option_chain_times
                     WHERE underlying = $1 AND whole AND time <= $2),
                   (SELECT max(time) FROM options_chains
                     WHERE underlying = $1 AND time <= $2
                       AND time < coalesce((SELECT min(time) FROM option_chain_times
                                             WHERE underlying = $1), 'infinity')),
                   (SELECT min(time) FROM option_chain_times WHERE underlying = $1)
               ) AS base,
               (SELECT max(time) FROM options_chains
                 WHERE underlying = $1 AND time <= $2) AS newest
        """,
        underlying,
        as_of,
    )
    base, newest = row
    return Span(underlying, base, newest) if newest else None


async def contracts(
    conn: Connection, span: Span, wanted: pb.OptionFilter, limit: int
) -> list[pb.OptionQuote]:
    """Return the first contracts that a filter admits, each with the time of its row.

    Bounds on a contract's key choose rows; those on what changes, its latest row.
    """
    low, high = strikes(wanted)
    rows = await conn.fetch(
        """
        SELECT * FROM (
            SELECT DISTINCT ON (expiration, strike, option_type)
                   expiration, strike, option_type, time, bid, ask, last_price, volume,
                   open_interest, implied_vol, delta, gamma, theta, vega, rho
              FROM options_chains
             WHERE underlying = $1 AND time >= $2 AND time <= $3
               AND expiration >= $4 AND expiration <= $5
               AND strike >= $6 AND strike <= $7
               AND option_type = ANY($8)
             ORDER BY expiration, strike, option_type, time DESC
        ) AS latest
         WHERE ($9::float8 IS NULL OR delta >= $9)
           AND ($10::float8 IS NULL OR delta <= $10)
         ORDER BY expiration, strike, option_type
         LIMIT $11
        """,
        *span,
        max(_date(wanted.min_expiration, date.min), span.newest.date()),
        _date(wanted.max_expiration, date.max),
        low,
        high,
        [TYPES[wanted.option_type]] if wanted.option_type else list(TYPES.values()),
        wanted.min_delta if wanted.HasField("min_delta") else None,
        wanted.max_delta if wanted.HasField("max_delta") else None,
        limit,
    )
    return await _quotes(rows)


async def expirations(conn: Connection, span: Span) -> list[pb.Expiration]:
    """Return the expirations of a chain, in order."""
    rows = await conn.fetch(
        """
        SELECT expiration,
               count(*) FILTER (WHERE option_type = 'call') AS calls,
               count(*) FILTER (WHERE option_type = 'put') AS puts,
               min(strike) AS min_strike, max(strike) AS max_strike
          FROM (SELECT DISTINCT expiration, strike, option_type
                  FROM options_chains
                 WHERE underlying = $1 AND time >= $2 AND time <= $3
                   AND expiration >= $4) AS contracts
         GROUP BY expiration ORDER BY expiration
        """,
        *span,
        span.newest.date(),
    )
    return [_expiration(*row) for row in rows]


def _expiration(
    expiration: date, calls: int, puts: int, min_strike: float, max_strike: float
) -> pb.Expiration:
    return pb.Expiration(
        date=expiration.isoformat(),
        calls=calls,
        puts=puts,
        min_strike=min_strike,
        max_strike=max_strike,
    )


def _date(text: str, default: date) -> date:
    return date.fromisoformat(text) if text else default


async def _quotes(rows: Sequence[Any]) -> list[pb.OptionQuote]:
    """Return rows as messages, letting others run now and then."""
    quotes = []
    stamps: dict[datetime, Timestamp] = {}  # they are few, and slow to make
    for number, (expiration, strike, option_type, time, *values) in enumerate(rows):
        if time not in stamps:
            stamps[time] = Timestamp()
            stamps[time].FromDatetime(time)
        quote = pb.OptionQuote(
            expiration=expiration.isoformat(),
            strike=strike,
            option_type=NUMBERS[option_type],
            time=stamps[time],
            **dict(zip(_VALUES, values, strict=True)),
        )
        quotes.append(quote)
        if number % YIELD_ROWS == 0:
            await asyncio.sleep(0)
    return quotes


def strikes(wanted: pb.OptionFilter) -> tuple[float, float]:
    """Return the least and the greatest strike that strike and moneyness admit."""
    low = wanted.min_strike if wanted.HasField("min_strike") else 0.0
    high = wanted.max_strike if wanted.HasField("max_strike") else inf
    moneyness = wanted.moneyness
    price = moneyness.underlying_price
    if moneyness.HasField("min"):
        low = max(low, _least(moneyness.min, price))
    if moneyness.HasField("max"):
        high = min(high, _greatest(moneyness.max, price))
    return low, high


# A product would be another number than a quotient, and lose a strike on the bound;
# and PostgreSQL refuses a quotient that overflows. So the strike is looked for among
# all there are: as integers, floats from 0 on have the same order.


def _least(bound: float, price: float) -> float:
    """Return the least strike with strike / price >= bound."""
    return _float(bisect_left(_FLOATS, bound, key=lambda n: _float(n) / price))


def _greatest(bound: float, price: float) -> float:
    """Return the greatest strike with strike / price <= bound, or 0."""
    after = bisect_right(_FLOATS, bound, key=lambda n: _float(n) / price)
    return _float(max(after - 1, 0))


_INTEGER, _DOUBLE = struct.Struct("!q"), struct.Struct("!d")
_FLOATS = range(_INTEGER.unpack(_DOUBLE.pack(inf))[0] + 1)


def _float(number: int) -> float:
    value: float = _DOUBLE.unpack(_INTEGER.pack(number))[0]
    return value
