"""All SQL on orders and order_keys.

Every row of orders is reached by its id and its creation time, which order_keys holds:
by the id alone, each chunk of the hypertable would be searched. The row of order_keys
is also the order's lock.
"""

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server import log
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.db import Connection
from quantplane_server.orders.lifecycle import derived
from quantplane_server.pages import Place
from quantplane_server.portfolio.queries import SIDES

TYPES = {
    pb.ORDER_TYPE_MARKET: "market",
    pb.ORDER_TYPE_LIMIT: "limit",
    pb.ORDER_TYPE_STOP: "stop",
    pb.ORDER_TYPE_STOP_LIMIT: "stop_limit",
}
TIMES_IN_FORCE = {
    pb.TIME_IN_FORCE_DAY: "day",
    pb.TIME_IN_FORCE_GTC: "gtc",
    pb.TIME_IN_FORCE_IOC: "ioc",
    pb.TIME_IN_FORCE_FOK: "fok",
}
STATUSES = {
    pb.ORDER_STATUS_PENDING: "pending",
    pb.ORDER_STATUS_OPEN: "open",
    pb.ORDER_STATUS_FILLED: "filled",
    pb.ORDER_STATUS_CANCELLED: "cancelled",
    pb.ORDER_STATUS_REJECTED: "rejected",
    pb.ORDER_STATUS_EXPIRED: "expired",
}
REQUESTS = {
    pb.PENDING_REQUEST_UNSPECIFIED: None,
    pb.PENDING_REQUEST_CANCEL: "cancel",
    pb.PENDING_REQUEST_REPLACE: "replace",
}
ENUMS: dict[str, dict[Any, Any]] = {
    "side": dict(SIDES),
    "order_type": dict(TYPES),
    "time_in_force": dict(TIMES_IN_FORCE),
    "status": dict(STATUSES),
    "pending_request": dict(REQUESTS),
}
VALUES = {
    column: {text: value for value, text in enum.items()}
    for column, enum in ENUMS.items()
}

# What an order is, and what becomes of it; each column with its type.
FIXED = {
    "order_id": "uuid",
    "created_at": "timestamptz",
    "strategy_id": "text",
    "signal_id": "uuid",
    "symbol": "text",
    "side": "text",
    "order_type": "text",
    "time_in_force": "text",
    "client_order_id": "text",
    "trace_id": "text",
}
CHANGING = {
    "updated_at": "timestamptz",
    "quantity": "float8",
    "price": "float8",
    "stop_price": "float8",
    "status": "text",
    "filled_quantity": "float8",
    "avg_fill_price": "float8",
    "broker_order_id": "text",
    "error_message": "text",
    "version": "bigint",
    "pending_request": "text",
    "pending_version": "bigint",
    "pending_quantity": "float8",
    "pending_price": "float8",
    "pending_stop_price": "float8",
    "outcome_unknown": "bool",
    "reject_code": "text",
    "overfill_quantity": "float8",
    "triggered_at": "timestamptz",
    "submitted_at": "timestamptz",
}
COLUMNS = ", ".join(FIXED | CHANGING)
PAGE = 1_000  # orders that are fetched at once by who reads them all
NAMES = "order_keys_strategy_id_client_order_id_key"

# Beside an append, whose own parameters end with $7.
_ARRAYS = [f"${n}::{kind}[]" for n, kind in enumerate((FIXED | CHANGING).values(), 13)]
STORE = f"""
    named AS (
        INSERT INTO order_keys
               (strategy_id, client_order_id, order_id, created_at, request_hash)
        SELECT * FROM unnest($8::text[], $9::text[], $10::uuid[], $11::timestamptz[],
                             $12::bytea[])
        RETURNING order_id
    ), stored AS (
        INSERT INTO orders ({COLUMNS}) SELECT * FROM unnest({", ".join(_ARRAYS)})
         WHERE (SELECT count(*) FROM named) = cardinality($10)  -- after them
        ON CONFLICT (order_id, created_at)
        DO UPDATE SET ({", ".join(CHANGING)})
            = ROW ({", ".join(f"excluded.{column}" for column in CHANGING)})
        RETURNING order_id
    ), before AS (
        SELECT count(*) FROM stored
    )
"""
LOG = "orders"
LIVE = "status IN ('pending', 'open')"


class NameTaken(Exception):
    """A new order may have the name of another one; nothing was written."""


class Key(NamedTuple):
    """The identity of an order, and of the request that made it."""

    strategy_id: str
    client_order_id: str
    order_id: str
    created_at: datetime
    request_hash: bytes | None


class Working(NamedTuple):
    """The live orders of a strategy in a symbol, on one side."""

    strategy_id: str
    symbol: str
    side: pb.Side.ValueType
    leaves: float
    orders: int


# --- Identity -----------------------------------------------------------------------


async def keys_of(
    conn: Connection, names: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Key]:
    """Return the keys of orders by (strategy_id, client_order_id)."""
    rows = await conn.fetch(
        """
        SELECT k.* FROM unnest($1::text[], $2::text[]) AS name (strategy_id, client)
          JOIN order_keys AS k
            ON k.strategy_id = name.strategy_id AND k.client_order_id = client
        """,
        *map(list, zip(*names, strict=True)),
    )
    keys = [
        Key(
            row["strategy_id"],
            row["client_order_id"],
            str(row["order_id"]),
            row["created_at"],
            row["request_hash"],
        )
        for row in rows
    ]
    return {(key.strategy_id, key.client_order_id): key for key in keys}


async def lock(conn: Connection, order_ids: Iterable[str]) -> dict[str, datetime]:
    """Lock orders until the end of the transaction; return when each was created.

    In the order of their ids, so that two who lock the same ones do not wait for each
    other.
    """
    rows = await conn.fetch(
        """
        SELECT order_id, created_at FROM order_keys WHERE order_id = ANY ($1)
         ORDER BY order_id FOR NO KEY UPDATE
        """,
        list(order_ids),
    )
    return {str(row["order_id"]): row["created_at"] for row in rows}


async def lock_strategies(conn: Connection, strategy_ids: Iterable[str]) -> None:
    """Let no other transaction check the limits of these strategies until the end."""
    await conn.execute(
        """
        SELECT pg_advisory_xact_lock(hashtextextended('quantplane risk ' || id, 0))
          FROM (SELECT id FROM unnest($1::text[]) AS id ORDER BY id) AS ordered
        """,
        sorted(strategy_ids),
    )


# --- Orders -------------------------------------------------------------------------


async def orders_at(
    conn: Connection, created: dict[str, datetime]
) -> dict[str, pb.Order]:
    """Return orders by their ids, given when each was created."""
    if not created:
        return {}
    rows = await conn.fetch(
        f"""
        SELECT {COLUMNS}
          FROM unnest($1::uuid[], $2::timestamptz[]) AS key (id, time),
               LATERAL (SELECT * FROM orders
                         WHERE order_id = id AND created_at = time OFFSET 0) AS o
        """,
        list(created.keys()),
        list(created.values()),
    )
    return {order.order_id: order for order in map(_order, rows)}


async def order(conn: Connection, order_id: str) -> pb.Order | None:
    created_at = await conn.fetchval(
        "SELECT created_at FROM order_keys WHERE order_id = $1", order_id
    )
    if created_at is None:
        return None
    return (await orders_at(conn, {order_id: created_at})).get(order_id)


async def of_signal(conn: Connection, signal_id: str, limit: int) -> list[pb.Order]:
    """Return the orders that name a signal, oldest first."""
    rows = await conn.fetch(
        f"""
        SELECT {COLUMNS} FROM orders WHERE signal_id = $1
         ORDER BY created_at, order_id LIMIT $2
        """,
        signal_id,
        limit,
    )
    return [_order(row) for row in rows]


async def live(conn: Connection, wanted: pb.OrderFilter, limit: int) -> list[pb.Order]:
    """Return orders that are pending or open, oldest first."""
    rows = await conn.fetch(
        f"""
        SELECT {COLUMNS} FROM orders
         WHERE {LIVE}
           AND (cardinality($1::text[]) = 0 OR strategy_id = ANY ($1))
           AND (cardinality($2::text[]) = 0 OR symbol = ANY ($2))
         ORDER BY created_at, order_id LIMIT $3
        """,
        list(wanted.strategy_ids),
        list(wanted.symbols),
        limit,
    )
    return [_order(row) for row in rows]


async def live_for_the_day(conn: Connection, before: datetime, limit: int) -> list[str]:
    """Return the ids of live DAY orders from before a time."""
    rows = await conn.fetch(
        f"""
        SELECT order_id FROM orders
         WHERE {LIVE} AND time_in_force = 'day' AND created_at < $1 LIMIT $2
        """,
        before,
        limit,
    )
    return [str(row["order_id"]) for row in rows]


async def page(
    conn: Connection,
    request: pb.ListOrdersRequest,
    start: datetime,
    place: Place,
    limit: int,
) -> list[pb.Order]:
    """Return orders behind a place down to `start`, the latest first."""
    rows = await conn.fetch(
        f"""
        SELECT {COLUMNS} FROM orders
         WHERE created_at >= $1 AND created_at <= $2
           AND (created_at < $2 OR order_id > $3)
           AND (cardinality($4::text[]) = 0 OR strategy_id = ANY ($4))
           AND (cardinality($5::text[]) = 0 OR symbol = ANY ($5))
           AND (cardinality($6::text[]) = 0 OR status = ANY ($6))
           AND ($7::uuid IS NULL OR signal_id = $7)
         ORDER BY created_at DESC, order_id LIMIT $8
        """,
        start,
        *place,
        list(request.filter.strategy_ids),
        list(request.filter.symbols),
        [STATUSES[status] for status in request.statuses],
        request.signal_id or None,
        limit,
    )
    return [_order(row) for row in rows]


async def working(conn: Connection, strategy_ids: Iterable[str]) -> list[Working]:
    """Return what live orders of strategies may still trade."""
    rows = await conn.fetch(
        f"""
        SELECT strategy_id, symbol, side, count(*) AS orders,
               sum(greatest(quantity, pending_quantity) - filled_quantity) AS leaves
          FROM orders
         WHERE {LIVE} AND strategy_id = ANY ($1)
         GROUP BY strategy_id, symbol, side
        """,
        list(strategy_ids),
    )
    return [
        Working(
            row["strategy_id"],
            row["symbol"],
            VALUES["side"][row["side"]],
            row["leaves"],
            row["orders"],
        )
        for row in rows
    ]


class Amounts(NamedTuple):
    """What is wanted and filled of an order; 0 for what there is not."""

    order_id: str
    quantity: float
    filled_quantity: float
    avg_fill_price: float


async def amounts(conn: Connection) -> AsyncIterator[list[Amounts]]:
    """Yield the amounts of all orders, page by page."""
    cursor = await conn.cursor(
        """
        SELECT order_id::text, quantity, coalesce(filled_quantity, 0),
               coalesce(avg_fill_price, 0)
          FROM orders
        """
    )
    while rows := await cursor.fetch(PAGE):
        yield [Amounts(*row) for row in rows]


async def store(
    conn: Connection,
    created: Iterable[Key],
    orders: Sequence[pb.Order],
    events: Sequence[log.Event],
) -> int:
    """Write the names of new orders, all that is new or changed of orders, and what
    happened to them, in one statement; return the first revision.

    Raises NameTaken after waiting for who takes a name at the same time. Names go in
    their order, so that two who take the same ones do not wait for each other. New and
    changed orders go by one INSERT: it finds its chunk by the time, where an UPDATE
    would be planned for every chunk.
    """
    keys = _columns(len(Key._fields), sorted(created))
    columns = _columns(len(_ARRAYS), map(_row, orders))
    try:
        return await log.append(conn, LOG, events, STORE, [*keys, *columns])
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == NAMES:
            raise NameTaken from error
        raise


def _columns(count: int, rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return list(map(list, zip(*rows, strict=True))) or [[] for _ in range(count)]


# --- Rows ---------------------------------------------------------------------------

TIMES = ("created_at", "updated_at", "submitted_at", "triggered_at")
TERMS = re.compile("pending_(quantity|price|stop_price)")


def _row(order: pb.Order) -> tuple[Any, ...]:
    """Return what the database keeps of an order, in the order of the columns."""
    terms = order.pending_terms if order.HasField("pending_terms") else None
    return (
        order.order_id,
        _time(order.created_at),
        order.strategy_id or None,
        order.signal_id or None,
        order.symbol,
        SIDES[order.side],
        TYPES[order.order_type],
        TIMES_IN_FORCE[order.time_in_force],
        order.client_order_id or None,
        order.trace_id or None,
        _time(order.updated_at),
        order.quantity,
        order.price if order.HasField("price") else None,
        order.stop_price if order.HasField("stop_price") else None,
        STATUSES[order.status],
        order.filled_quantity,
        order.avg_fill_price if order.HasField("avg_fill_price") else None,
        order.broker_order_id or None,
        order.error_message or None,
        order.version,
        REQUESTS[order.pending_request],
        order.pending_version or None,
        terms.quantity if terms else None,
        terms.price if terms and terms.HasField("price") else None,
        terms.stop_price if terms and terms.HasField("stop_price") else None,
        order.outcome_unknown,
        order.reject_code or None,
        order.overfill_quantity,
        _time(order.triggered_at) if order.HasField("triggered_at") else None,
        _time(order.submitted_at) if order.HasField("submitted_at") else None,
    )


def _time(stamp: Timestamp) -> datetime:
    return to_datetime(time_us(stamp))


def _order(row: asyncpg.Record) -> pb.Order:
    order = pb.Order()
    for column, value in row.items():
        if value is None:
            continue
        if term := TERMS.fullmatch(column):
            setattr(order.pending_terms, term[1], value)
        elif column in TIMES:
            getattr(order, column).FromDatetime(value.astimezone(UTC))
        elif column in VALUES:
            setattr(order, column, VALUES[column][value])
        else:
            setattr(order, column, str(value) if isinstance(value, UUID) else value)
    return derived(order)
