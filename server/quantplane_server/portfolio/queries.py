"""All SQL on executions, positions and snapshots of the portfolio."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from quantplane import v1 as pb
from quantplane_server.checks import TICK, time_us, to_datetime
from quantplane_server.db import Connection, try_lock
from quantplane_server.pages import Place
from quantplane_server.portfolio.positions import Book, Fill, Position, fill_of

SIDES = {pb.SIDE_BUY: "buy", pb.SIDE_SELL: "sell"}
SIDE_OF = {text: side for side, text in SIDES.items()}
BATCH = 200  # rows that are fetched, and so worked on, at once by who reads many

Pair = tuple[str, str]

# --- Executions ---------------------------------------------------------------------

_EXECUTION = """
    execution_id, time, order_id, symbol, side, quantity, price, commission, venue,
    broker_exec_id, ref_execution_id, late, position_quantity, realized_pnl, strategy_id
"""

# Rows by their keys, which know the time: without it every chunk would be searched.
_BY_KEY = f"""
    SELECT {_EXECUTION}, position_number
      FROM (SELECT k.execution_id AS id, k.time AS at FROM {{keys}}) AS keys,
           LATERAL (SELECT * FROM executions
                     WHERE execution_id = id AND time = at LIMIT 1) AS execution
"""

# An execution that takes another back, or that was taken back, is not live.
_LIVE = """
    NOT (ref_execution_id IS NOT NULL AND quantity < 0)
    AND execution_id NOT IN (SELECT ref_execution_id FROM executions
                              WHERE ref_execution_id IS NOT NULL AND quantity < 0
                                    {of_symbol})
"""


async def executions_by_broker_id(
    conn: Connection, keys: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], pb.Execution]:
    """Return what is known of (order_id, broker_exec_id), by that."""
    wanted = """
        execution_keys AS k JOIN unnest($1::uuid[], $2::text[])
            AS wanted (order_id, broker_exec_id) USING (order_id, broker_exec_id)
    """
    rows = await conn.fetch(
        _BY_KEY.format(keys=wanted),
        [order_id for order_id, _ in keys],
        [broker_exec_id for _, broker_exec_id in keys],
    )
    found = [_execution(row) for row in rows]
    return {(found.order_id, found.broker_exec_id): found for found in found}


class Sums(NamedTuple):
    """Over the executions of an order that count."""

    quantity: float = 0.0
    notional: float = 0.0  # of quantity * price
    gross: float = 0.0  # of its absolute value


async def filled(conn: Connection, order_ids: Sequence[str]) -> dict[str, Sums]:
    """Return the sums of each order that has any.

    What was taken back is left out, not subtracted: it would leave its rounding behind.
    """
    keys = "execution_keys AS k WHERE order_id = ANY ($1)"
    rows = await conn.fetch(
        f"""
        WITH found AS MATERIALIZED ({_BY_KEY.format(keys=keys)}), taken_back AS (
            SELECT ref_execution_id AS id FROM found
             WHERE ref_execution_id IS NOT NULL AND quantity < 0
        )
        SELECT order_id, sum(quantity), sum(quantity * price),
               sum(abs(quantity * price))
          FROM found
         WHERE (ref_execution_id IS NULL OR quantity > 0)
           AND execution_id NOT IN (SELECT id FROM taken_back)
         GROUP BY order_id
        """,
        order_ids,
    )
    return {str(order_id): Sums(*sums) for order_id, *sums in rows}


async def executions_of(
    conn: Connection, order_ids: Sequence[str], limit: int
) -> list[pb.Execution]:
    """Return the executions of orders in one symbol, in the order of booking.

    A correction has the place of what it corrects; it was booked with the reversal.
    """
    keys = "execution_keys AS k WHERE order_id = ANY ($1)"
    rows = await conn.fetch(
        f"""
        SELECT {_EXECUTION} FROM ({_BY_KEY.format(keys=keys)}) AS found
         ORDER BY CASE WHEN ref_execution_id IS NULL THEN position_number
                       ELSE max(position_number) OVER (PARTITION BY ref_execution_id)
                  END, quantity, time, execution_id
         LIMIT $2
        """,
        order_ids,
        limit,
    )
    return [_execution(row) for row in rows]


async def list_executions(
    conn: Connection,
    filter: pb.OrderFilter,
    order_id: str,
    start: datetime,
    place: Place,
    limit: int,
) -> list[pb.Execution]:
    """Return executions behind a place down to `start`, the latest first."""
    conditions = {
        "strategy_id = ANY ({})": list(filter.strategy_ids),
        "symbol = ANY ({})": list(filter.symbols),
        "order_id = {}": order_id,
    }
    given = {text: value for text, value in conditions.items() if value}
    more = "".join(f" AND {text.format(f'${i}')}" for i, text in enumerate(given, 5))
    rows = await conn.fetch(
        f"""
        SELECT {_EXECUTION} FROM executions
         WHERE time >= $1 AND time <= $2 AND (time < $2 OR execution_id > $3) {more}
         ORDER BY time DESC, execution_id LIMIT $4
        """,
        start,
        *place,
        limit,
        *given.values(),
    )
    return [_execution(row) for row in rows]


async def insert_executions(
    conn: Connection, executions: Sequence[pb.Execution], numbers: Sequence[int]
) -> None:
    """Store executions with their position_numbers."""
    await conn.execute(
        """
        INSERT INTO executions
               (execution_id, time, order_id, symbol, side, quantity, price, commission,
                venue, broker_exec_id, strategy_id, ref_execution_id, late,
                position_quantity, realized_pnl, position_number)
        SELECT execution_id, time, order_id, symbol, side, quantity, price, commission,
               nullif(venue, ''), nullif(broker_exec_id, ''), nullif(strategy_id, ''),
               nullif(ref_execution_id, '')::uuid, late, position_quantity,
               realized_pnl, position_number
          FROM unnest($1::uuid[], $2::timestamptz[], $3::uuid[], $4::text[],
                      $5::text[], $6::float8[], $7::float8[], $8::float8[], $9::text[],
                      $10::text[], $11::text[], $12::text[], $13::bool[],
                      $14::float8[], $15::float8[], $16::bigint[])
               AS new (execution_id, time, order_id, symbol, side, quantity, price,
                       commission, venue, broker_exec_id, strategy_id,
                       ref_execution_id, late, position_quantity, realized_pnl,
                       position_number)
        """,
        [e.execution_id for e in executions],
        [to_datetime(time_us(e.time)) for e in executions],
        [e.order_id for e in executions],
        [e.symbol for e in executions],
        [SIDES[e.side] for e in executions],
        [e.quantity for e in executions],
        [e.price for e in executions],
        [e.commission for e in executions],
        [e.venue for e in executions],
        [e.broker_exec_id for e in executions],
        [e.strategy_id for e in executions],
        [e.ref_execution_id for e in executions],
        [e.late for e in executions],
        [e.position_quantity for e in executions],
        [e.realized_pnl for e in executions],
        numbers,
    )


async def position_numbers(
    conn: Connection, execution_ids: Sequence[str]
) -> dict[str, int]:
    """Return the position_number of each execution that has one."""
    keys = "execution_keys AS k WHERE execution_id = ANY ($1)"
    rows = await conn.fetch(_BY_KEY.format(keys=keys), execution_ids)
    return {
        str(row["execution_id"]): row["position_number"]
        for row in rows
        if row["position_number"] is not None
    }


class Live(NamedTuple):
    """An execution that counts."""

    number: int  # position_number
    execution_id: str
    fill: Fill


async def live_executions(conn: Connection, symbol: str) -> AsyncIterator[Live]:
    """Yield the booked executions of a symbol that count, in the order in which."""
    live = _LIVE.format(of_symbol="AND symbol = $1")
    cursor = conn.cursor(
        f"""
        SELECT {_EXECUTION}, position_number FROM executions
         WHERE symbol = $1 AND position_number IS NOT NULL AND {live}
         ORDER BY position_number
        """,
        symbol,
        prefetch=BATCH,
    )
    async for row in cursor:
        execution = _execution(row)
        yield Live(row["position_number"], execution.execution_id, fill_of(execution))


def _execution(row: Any) -> pb.Execution:
    execution = pb.Execution(
        execution_id=str(row["execution_id"]),
        order_id=_id(row["order_id"]),
        symbol=row["symbol"],
        side=SIDE_OF[row["side"]],
        quantity=row["quantity"],
        price=row["price"],
        commission=row["commission"],
        venue=row["venue"],
        broker_exec_id=row["broker_exec_id"],
        ref_execution_id=_id(row["ref_execution_id"]),
        late=row["late"],
        position_quantity=row["position_quantity"],
        realized_pnl=row["realized_pnl"],
        strategy_id=row["strategy_id"],
    )
    execution.time.FromDatetime(row["time"])
    return execution


def _id(value: Any) -> str:
    return "" if value is None else str(value)


# --- Booking ------------------------------------------------------------------------


class Locked(NamedTuple):
    """A position of the account that no other transaction can change now."""

    position: Position
    n_executions: int


async def lock_positions(
    conn: Connection, new: Mapping[str, tuple[int, datetime]]
) -> dict[str, Locked]:
    """Lock the positions in symbols until the end of the transaction.

    `new` says by symbol how many more executions get a number, and when the position
    is opened if there is none yet.
    """
    # In one order, creating what is missing: who opens the same symbols waits here,
    # and nobody waits for who waits for him.
    symbols = sorted(new)
    rows = await conn.fetch(
        """
        INSERT INTO positions AS p (symbol, quantity, average_cost, realized_pnl,
                                    n_executions, opened_at, updated_at)
        SELECT symbol, 0, 0, 0, n_executions, opened_at, opened_at
          FROM unnest($1::text[], $2::bigint[], $3::timestamptz[])
               AS new (symbol, n_executions, opened_at)
        ON CONFLICT (symbol) DO UPDATE
           SET n_executions = p.n_executions + excluded.n_executions
        RETURNING symbol, quantity, average_cost, coalesce(realized_pnl, 0), 0, 0,
                  coalesce(strategy_id, ''), opened_at, updated_at, n_executions
        """,
        symbols,
        [new[symbol][0] for symbol in symbols],
        [new[symbol][1] for symbol in symbols],
    )
    return {symbol: Locked(Position(*held), n) for symbol, *held, n in rows}


async def strategy_positions(
    conn: Connection, pairs: Sequence[Pair]
) -> dict[Pair, Position]:
    """Return the positions by (strategy_id, symbol), of those that exist."""
    rows = await conn.fetch(
        """
        SELECT strategy_id, symbol, quantity, average_cost, realized_pnl, cash_flow,
               commission, strategy_id, opened_at, updated_at
          FROM strategy_positions
               JOIN unnest($1::text[], $2::text[]) AS wanted (strategy_id, symbol)
               USING (strategy_id, symbol)
        """,
        [strategy_id for strategy_id, _ in pairs],
        [symbol for _, symbol in pairs],
    )
    return {(strategy, symbol): Position(*held) for strategy, symbol, *held in rows}


async def quantities(
    conn: Connection, strategy_ids: Sequence[str]
) -> dict[Pair, float]:
    """Return what strategies hold, by (strategy_id, symbol)."""
    rows = await conn.fetch(
        """
        SELECT strategy_id, symbol, quantity FROM strategy_positions
         WHERE strategy_id = ANY ($1)
        """,
        strategy_ids,
    )
    return {(strategy, symbol): quantity for strategy, symbol, quantity in rows}


async def write_positions(conn: Connection, held: Mapping[str, Position]) -> None:
    """Write positions that are locked, by symbol."""
    await conn.execute(
        """
        UPDATE positions AS p
           SET quantity = new.quantity, average_cost = new.average_cost,
               realized_pnl = new.realized_pnl,
               strategy_id = nullif(new.strategy_id, ''),
               opened_at = new.opened_at, updated_at = new.updated_at
          FROM unnest($1::text[], $2::float8[], $3::float8[], $4::float8[], $5::text[],
                      $6::timestamptz[], $7::timestamptz[])
               AS new (symbol, quantity, average_cost, realized_pnl, strategy_id,
                       opened_at, updated_at)
         WHERE p.symbol = new.symbol
        """,
        list(held),
        [position.quantity for position in held.values()],
        [position.average_cost for position in held.values()],
        [position.realized_pnl for position in held.values()],
        [position.strategy_id for position in held.values()],
        [position.opened_at for position in held.values()],
        [position.updated_at for position in held.values()],
    )


async def write_strategy_positions(
    conn: Connection, held: Mapping[Pair, Position]
) -> None:
    """Write positions by (strategy_id, symbol); those in their symbols are locked."""
    await conn.execute(
        """
        INSERT INTO strategy_positions (strategy_id, symbol, quantity, average_cost,
                                        realized_pnl, cash_flow, commission, opened_at,
                                        updated_at)
        SELECT * FROM unnest($1::text[], $2::text[], $3::float8[], $4::float8[],
                             $5::float8[], $6::float8[], $7::float8[],
                             $8::timestamptz[], $9::timestamptz[])
        ON CONFLICT (strategy_id, symbol) DO UPDATE
           SET quantity = excluded.quantity, average_cost = excluded.average_cost,
               realized_pnl = excluded.realized_pnl, cash_flow = excluded.cash_flow,
               commission = excluded.commission, opened_at = excluded.opened_at,
               updated_at = excluded.updated_at
        """,
        [strategy_id for strategy_id, _ in held],
        [symbol for _, symbol in held],
        [position.quantity for position in held.values()],
        [position.average_cost for position in held.values()],
        [position.realized_pnl for position in held.values()],
        [position.cash_flow for position in held.values()],
        [position.commission for position in held.values()],
        [position.opened_at for position in held.values()],
        [position.updated_at for position in held.values()],
    )


# --- Portfolios ---------------------------------------------------------------------


async def positions(
    conn: Connection,
    strategy_id: str,
    after: str,
    limit: int | None,
    open_only: bool,
) -> list[pb.Position]:
    """Return the first positions behind a symbol, in order of it, without marks.

    Of a strategy; of the account if it is empty. Without limit: all.
    """
    rows = await conn.fetch(
        f"""
        SELECT symbol, quantity, average_cost, coalesce(realized_pnl, 0), strategy_id,
               opened_at, updated_at
          FROM {_of(strategy_id)} AND symbol > $2 AND (quantity <> 0 OR NOT $3)
         ORDER BY symbol LIMIT $4
        """,
        strategy_id,
        after,
        open_only,
        limit,
    )
    return [_position(row) for row in rows]


def _of(strategy_id: str) -> str:
    if strategy_id:
        return "strategy_positions WHERE strategy_id = $1"
    return "positions WHERE $1 = ''"


def _position(row: Any) -> pb.Position:
    symbol, quantity, cost, realized_pnl, strategy_id, opened_at, updated_at = row
    position = pb.Position(
        symbol=symbol, quantity=quantity, average_cost=cost,
        realized_pnl=realized_pnl, strategy_id=strategy_id,
    )  # fmt: skip
    position.opened_at.FromDatetime(opened_at)
    position.updated_at.FromDatetime(updated_at)
    return position


class Totals(NamedTuple):
    """What positions, flat ones too, have come to."""

    realized_pnl: float
    cash_flow: float
    commission: float
    updated_at: datetime | None  # the latest; None: there are no positions


async def totals(conn: Connection, strategy_id: str) -> Totals:
    """Return the totals of a strategy; of the account if it is empty."""
    # Sums of floats depend on the order.
    of_strategies = "strategy_positions WHERE $1 IN ('', strategy_id)"
    row = await conn.fetchrow(
        f"""
        SELECT coalesce(sum(realized_pnl ORDER BY symbol), 0),
               (SELECT coalesce(sum(cash_flow ORDER BY strategy_id, symbol), 0)
                  FROM {of_strategies}),
               (SELECT coalesce(sum(commission ORDER BY strategy_id, symbol), 0)
                  FROM {of_strategies}),
               max(updated_at)
          FROM {_of(strategy_id)}
        """,
        strategy_id,
    )
    return Totals(*row)


# --- Snapshots ----------------------------------------------------------------------

_SNAPSHOT = (
    "total_value", "cash", "positions_value", "total_pnl", "unrealized_pnl",
    "realized_pnl", "total_exposure", "net_exposure", "n_positions",
)  # fmt: skip


async def claim_snapshots(conn: Connection) -> bool:
    """Be the one who takes snapshots while the connection lives, if there is none."""
    return await try_lock(conn, "quantplane.snapshots")


async def insert_snapshot(conn: Connection, snapshot: pb.PortfolioSnapshot) -> None:
    """Store a snapshot; where there is one of its microsecond, move it behind that."""
    time = to_datetime(time_us(snapshot.time))
    values = [getattr(snapshot, name) for name in _SNAPSHOT]
    while not await conn.fetchval(
        f"""
        INSERT INTO portfolio_snapshots (time, {", ".join(_SNAPSHOT)})
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        ON CONFLICT (time) DO NOTHING RETURNING true
        """,
        time,
        *values,
    ):
        time += TICK
    snapshot.time.FromDatetime(time)


async def snapshots(
    conn: Connection, start: datetime, end: datetime, limit: int
) -> list[pb.PortfolioSnapshot]:
    """Return the first snapshots in [start, end), in order of time."""
    rows = await conn.fetch(
        f"""
        SELECT time, {", ".join(_SNAPSHOT)} FROM portfolio_snapshots
         WHERE time >= $1 AND time < $2 ORDER BY time LIMIT $3
        """,
        start,
        end,
        limit,
    )
    return [_snapshot(row) for row in rows]


def _snapshot(row: Any) -> pb.PortfolioSnapshot:
    time, *values = row
    snapshot = pb.PortfolioSnapshot(**dict(zip(_SNAPSHOT, values, strict=True)))
    snapshot.time.FromDatetime(time)
    return snapshot


# --- The audit ----------------------------------------------------------------------


async def audited_executions(
    conn: Connection,
) -> AsyncIterator[tuple[str, Fill, bool]]:
    """Yield the symbol and fill of every execution, and whether it counts.

    In order of symbol, then as they count; what was never booked counts last.
    """
    live = _LIVE.format(of_symbol="")
    cursor = conn.cursor(
        f"""
        SELECT {_EXECUTION}, {live} AS live FROM executions
         ORDER BY symbol, position_number, time, execution_id
        """,
        prefetch=BATCH,
    )
    async for row in cursor:
        execution = _execution(row)
        yield execution.symbol, fill_of(execution), row["live"]


async def stored_books(conn: Connection, symbols: Iterable[str]) -> dict[str, Book]:
    """Return what is stored of symbols, of those that have anything."""
    symbols = list(symbols)
    accounts = await conn.fetch(
        """
        SELECT symbol, quantity, average_cost, coalesce(realized_pnl, 0)
          FROM positions WHERE symbol = ANY ($1)
        """,
        symbols,
    )
    strategies = await conn.fetch(
        """
        SELECT symbol, strategy_id, quantity, average_cost, realized_pnl, cash_flow,
               commission
          FROM strategy_positions WHERE symbol = ANY ($1)
        """,
        symbols,
    )
    books = {symbol: Book(Position(*held), {}) for symbol, *held in accounts}
    for symbol, strategy_id, *held in strategies:
        book = books.setdefault(symbol, Book(Position(), {}))
        book.strategies[strategy_id] = Position(*held)
    return books


async def symbols_without_executions(conn: Connection) -> AsyncIterator[str]:
    """Yield the symbols that have positions, and no execution."""
    cursor = conn.cursor(
        """
        SELECT symbol FROM (SELECT symbol FROM positions
                             UNION SELECT symbol FROM strategy_positions) AS held
         WHERE NOT EXISTS (SELECT FROM executions AS e WHERE e.symbol = held.symbol)
        """,
        prefetch=BATCH,
    )
    async for row in cursor:
        yield row["symbol"]


async def position_count(conn: Connection) -> int:
    count: int = await conn.fetchval("SELECT count(*) FROM positions")
    return count
