"""All SQL on signals and signal_keys.

An id is looked up in signal_keys first: only with its time is its row found at once,
whatever the number of chunks. The key is also the signal's lock: who changes a signal
first locks its key, then reads the row, in a transaction that is read committed.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.db import Connection
from quantplane_server.pages import Place
from quantplane_server.structs import to_json, to_struct

COLUMNS = (
    "signal_id, time, strategy_id, symbol, signal_type, strength, confidence,"
    " target_price, stop_loss, expiration, metadata, status, trace_id"
)
# The bounds keep the planner to the chunks that it needs.
BY_PLACES = "signal_id = ANY ($1) AND time BETWEEN $2 AND $3"
FETCH = 500  # rows read ahead


async def claim(
    conn: Connection, signals: Sequence[pb.Signal], hashes: Mapping[str, bytes]
) -> dict[str, bytes | None]:
    """Take the ids that are free; return the hash of what each was taken for.

    Ids are locked in their order, so that two who publish the same ones do not wait for
    each other.
    """
    signals = sorted(signals, key=lambda signal: signal.signal_id)
    rows = await conn.fetch(
        """
        INSERT INTO signal_keys AS k (signal_id, time, request_hash)
        SELECT * FROM unnest($1::uuid[], $2::timestamptz[], $3::bytea[])
        ON CONFLICT (signal_id) DO UPDATE SET request_hash = k.request_hash
        RETURNING signal_id, request_hash
        """,
        [signal.signal_id for signal in signals],
        [_time(signal.time) for signal in signals],
        [hashes[signal.signal_id] for signal in signals],
    )
    return {str(row["signal_id"]): row["request_hash"] for row in rows}


async def insert(conn: Connection, signals: Sequence[pb.Signal]) -> None:
    """Store signals, whose ids are claimed, as active ones."""
    await conn.execute(
        f"""
        INSERT INTO signals ({COLUMNS})
        SELECT id, time, strategy_id, symbol, signal_type, strength, confidence,
               target_price, stop_loss, expiration, metadata, 'active',
               nullif(trace_id, '')
          FROM unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[],
                      $5::text[], $6::float8[], $7::float8[], $8::float8[],
                      $9::float8[], $10::timestamptz[], $11::jsonb[], $12::text[])
               AS signal (id, time, strategy_id, symbol, signal_type, strength,
                          confidence, target_price, stop_loss, expiration, metadata,
                          trace_id)
        """,
        [signal.signal_id for signal in signals],
        [_time(signal.time) for signal in signals],
        [signal.strategy_id for signal in signals],
        [signal.symbol for signal in signals],
        [type_name(signal.signal_type) for signal in signals],
        [signal.strength for signal in signals],
        [signal.confidence for signal in signals],
        [_price(signal, "target_price") for signal in signals],
        [_price(signal, "stop_loss") for signal in signals],
        [_expiration(signal) for signal in signals],
        [_json(signal) for signal in signals],
        [signal.trace_id for signal in signals],
    )


async def find(
    conn: Connection, signal_ids: Sequence[str], lock: bool = False
) -> dict[str, pb.Signal]:
    """Return the signals that there are of these ids, locked if wanted."""
    locking = "FOR NO KEY UPDATE" if lock else ""
    return await _rows(conn, await _places(conn, signal_ids, locking))


async def lock_due(conn: Connection, limit: int) -> list[pb.Signal]:
    """Lock active signals that are past their expiration, passing over locked ones."""
    rows = await conn.fetch(
        """
        SELECT signal_id FROM signals
         WHERE status = 'active' AND expiration <= now() LIMIT $1
        """,
        limit,
    )
    ids = [row["signal_id"] for row in rows]
    places = await _places(conn, ids, "FOR NO KEY UPDATE SKIP LOCKED")
    return _active(await _rows(conn, places))


async def _places(
    conn: Connection, signal_ids: Sequence[str | UUID], locking: str
) -> list[Place]:
    """Return where signals are, in order of their ids, in which they are locked."""
    rows = await conn.fetch(
        f"""
        SELECT time, signal_id FROM signal_keys
         WHERE signal_id = ANY ($1) ORDER BY signal_id {locking}
        """,
        signal_ids,
    )
    return [(row["time"], row["signal_id"]) for row in rows]


async def _rows(conn: Connection, places: Sequence[Place]) -> dict[str, pb.Signal]:
    if not places:
        return {}
    times, ids = zip(*places, strict=True)
    rows = await conn.fetch(
        f"SELECT {COLUMNS} FROM signals WHERE {BY_PLACES}", ids, min(times), max(times)
    )
    return {str(row["signal_id"]): _signal(row) for row in rows}


async def mark_executed(conn: Connection, signal_ids: Sequence[str]) -> list[pb.Signal]:
    """Execute those of the signals that are active; return them as they are then."""
    active = _active(await find(conn, signal_ids, lock=True))
    return await set_status(conn, active, pb.SIGNAL_STATUS_EXECUTED)


async def set_status(
    conn: Connection,
    signals: Sequence[pb.Signal],
    status: "pb.SignalStatus.ValueType",
) -> list[pb.Signal]:
    """Change locked signals; return them as they are then."""
    if not signals:
        return []
    times = [_time(signal.time) for signal in signals]
    await conn.execute(
        f"UPDATE signals SET status = $4 WHERE {BY_PLACES}",
        [signal.signal_id for signal in signals],
        min(times),
        max(times),
        status_name(status),
    )
    for signal in signals:
        signal.status = status
    return list(signals)


def _active(signals: Mapping[str, pb.Signal]) -> list[pb.Signal]:
    return [s for s in signals.values() if s.status == pb.SIGNAL_STATUS_ACTIVE]


async def active(
    conn: Connection, wanted: pb.SignalFilter, limit: int
) -> AsyncIterator[pb.Signal]:
    """Yield the active signals of a filter, the earliest first; in a transaction."""
    args: list[Any] = [limit]
    query = f"""
        SELECT {COLUMNS} FROM signals
         WHERE status = 'active' AND {_conditions(wanted, args)}
         ORDER BY time, signal_id LIMIT $1
    """
    async for row in conn.cursor(query, *args, prefetch=FETCH):
        yield _signal(row)


async def rows_before(
    conn: Connection,
    wanted: pb.SignalFilter,
    statuses: "Sequence[pb.SignalStatus.ValueType]",
    start: datetime,
    place: Place,
    limit: int,
) -> AsyncIterator[pb.Signal]:
    """Yield signals behind a place, the latest first, to `start`; in a transaction."""
    args: list[Any] = [limit, start, *place]
    conditions = _conditions(wanted, args)
    if statuses:
        names = _parameter(args, list(map(status_name, statuses)))
        conditions += f" AND status = ANY ({names}::text[])"
    query = f"""
        SELECT {COLUMNS} FROM signals
         WHERE time >= $2 AND time <= $3 AND (time < $3 OR signal_id > $4)
           AND {conditions}
    """
    order = "ORDER BY time DESC, signal_id LIMIT $1"
    if by := _index(wanted):
        # The latest of each, of which the latest: the index has them in this order.
        column, values = by
        names = _parameter(args, list(dict.fromkeys(values)))
        query = f"""
            SELECT found.*
              FROM unnest({names}::text[]) AS name,
                   LATERAL ({query} AND {column} = name {order}) AS found
        """
    async for row in conn.cursor(f"{query} {order}", *args, prefetch=FETCH):
        yield _signal(row)


def _index(wanted: pb.SignalFilter) -> tuple[str, Sequence[str]] | None:
    """Return the column, and its values, whose index leads to the wanted signals."""
    if wanted.strategy_ids:
        return "strategy_id", wanted.strategy_ids
    if wanted.symbols:
        return "symbol", wanted.symbols
    return None


def _conditions(wanted: pb.SignalFilter, args: list[Any]) -> str:
    """Return what a filter asks of a row; its values are added to the arguments."""
    conditions = [f"strength >= {_parameter(args, wanted.min_strength)}"]
    for column, values in {
        "strategy_id": list(wanted.strategy_ids),
        "symbol": list(wanted.symbols),
        "signal_type": list(map(type_name, wanted.signal_types)),
    }.items():
        if values:
            conditions.append(f"{column} = ANY ({_parameter(args, values)}::text[])")
    return " AND ".join(conditions)


def _parameter(args: list[Any], value: Any) -> str:
    args.append(value)
    return f"${len(args)}"


# --- Values -------------------------------------------------------------------------


def type_name(type: "pb.SignalType.ValueType") -> str:
    return pb.SignalType.Name(type).removeprefix("SIGNAL_TYPE_")


def status_name(status: "pb.SignalStatus.ValueType") -> str:
    return pb.SignalStatus.Name(status).removeprefix("SIGNAL_STATUS_").lower()


def _time(stamp: Timestamp) -> datetime:
    return to_datetime(time_us(stamp))


def _expiration(signal: pb.Signal) -> datetime | None:
    return _time(signal.expiration) if signal.HasField("expiration") else None


def _price(signal: pb.Signal, field: Literal["target_price", "stop_loss"]) -> Any:
    return getattr(signal, field) if signal.HasField(field) else None


def _json(signal: pb.Signal) -> str | None:
    return to_json(signal.metadata) if signal.HasField("metadata") else None


def _signal(row: Any) -> pb.Signal:
    signal = pb.Signal(
        signal_id=str(row["signal_id"]),
        strategy_id=row["strategy_id"],
        symbol=row["symbol"],
        signal_type=pb.SignalType.Value(f"SIGNAL_TYPE_{row['signal_type']}"),
        strength=row["strength"],
        confidence=row["confidence"],
        target_price=row["target_price"],
        stop_loss=row["stop_loss"],
        metadata=to_struct(row["metadata"]),
        trace_id=row["trace_id"],
    )
    signal.time.FromDatetime(row["time"])
    if row["expiration"] is not None:
        signal.expiration.FromDatetime(row["expiration"])
    if row["status"] is not None:
        name = f"SIGNAL_STATUS_{row['status'].upper()}"
        signal.status = pb.SignalStatus.Value(name)
    return signal
