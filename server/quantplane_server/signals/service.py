"""SignalService: signals are published, change their status once, and are followed."""

from collections.abc import AsyncIterator, Sequence
from hashlib import sha256

from quantplane import v1 as pb
from quantplane.v1 import signals_pb2_grpc as rpc
from quantplane_server.db import Connection, Database
from quantplane_server.errors import (
    IllegalTransition,
    KeyReused,
    ResultTooLarge,
    UnknownSignal,
)
from quantplane_server.fanout import varint
from quantplane_server.log import Entry, Logs, append
from quantplane_server.log_stream import LogStream
from quantplane_server.pages import begin, token_behind
from quantplane_server.principal import may_see
from quantplane_server.rpc.interceptor import Context, Serialised
from quantplane_server.rpc.trace import origin
from quantplane_server.signals import checks, queries
from quantplane_server.signals.events import LOG, log_events
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens

PAGE = 1_000  # where a request names no page_size
PAGE_BYTES = 2 << 20  # where a page, or a part of a snapshot, ends at the latest
MAX_ACTIVE = 100_000  # signals in a snapshot
MAX_ACTIVE_BYTES = 64 << 20

EVENTS = b"\x12"  # the tag of WatchSignalsResponse.events


class SignalService(rpc.SignalServiceServicer):
    """Kept in the database; every change is an event of the log of signals."""

    def __init__(
        self, db: Database, logs: Logs, tokens: Tokens, streams: Streams
    ) -> None:
        self._db = db
        self._logs = logs
        self._tokens = tokens
        self._streams = streams

    # --- Changing ---

    async def PublishSignals(
        self, request: pb.PublishSignalsRequest, context: Context
    ) -> pb.PublishSignalsResponse:
        checks.check_publish(request.signals)
        came = origin(context)
        ids = [signal.signal_id for signal in request.signals]
        async with self._db.transaction() as conn:
            await _claim(conn, request.signals)
            signals = await queries.find(conn, ids)
            missing = (s for s in request.signals if s.signal_id not in signals)
            new = [_new(signal, came.trace_id) for signal in missing]
            if new:
                await queries.insert(conn, new)
                events = log_events(pb.SIGNAL_EVENT_TYPE_PUBLISHED, new, came)
                first = await append(conn, LOG, events)
        if new:
            self._logs.committed(LOG, first, events)
        signals |= {signal.signal_id: signal for signal in new}
        return pb.PublishSignalsResponse(signals=map(signals.__getitem__, ids))

    async def CancelSignal(
        self, request: pb.CancelSignalRequest, context: Context
    ) -> pb.CancelSignalResponse:
        checks.check_id(request)
        async with self._db.transaction() as conn:
            signal = await _found(conn, request.signal_id, lock=True)
            if signal.status == pb.SIGNAL_STATUS_CANCELLED:
                return pb.CancelSignalResponse(signal=signal)
            if signal.status != pb.SIGNAL_STATUS_ACTIVE:
                raise _illegal(signal)
            changed = await queries.set_status(
                conn, [signal], pb.SIGNAL_STATUS_CANCELLED
            )
            kind = pb.SIGNAL_EVENT_TYPE_CANCELLED
            events = log_events(kind, changed, origin(context))
            first = await append(conn, LOG, events)
        self._logs.committed(LOG, first, events)
        return pb.CancelSignalResponse(signal=signal)

    # --- Reading ---

    async def GetSignal(
        self, request: pb.GetSignalRequest, context: Context
    ) -> pb.GetSignalResponse:
        checks.check_id(request)
        async with self._db.connection() as conn:
            signal = await _found(conn, request.signal_id)
        return pb.GetSignalResponse(signal=signal)

    async def ListSignals(
        self, request: pb.ListSignalsRequest, context: Context
    ) -> pb.ListSignalsResponse:
        checks.check_list(request)
        start, place = begin(self._tokens, request)
        limit = request.page_size or PAGE
        async with self._db.transaction(readonly=True) as conn:
            rows = queries.rows_before(
                conn, request.filter, request.statuses, start, place, limit + 1
            )
            part = await anext(_parts(rows, limit), None)
        page, more = part or ([], False)
        response = pb.ListSignalsResponse(signals=page)
        if more:
            last = page[-1]
            response.next_page_token = token_behind(
                self._tokens, request, last.time, last.signal_id
            )
        return response

    async def WatchSignals(
        self, request: pb.WatchSignalsRequest, context: Context
    ) -> AsyncIterator[Serialised]:
        checks.check_watch(request)
        stream = SignalStream(self._db, self._logs, self._tokens, request)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message


class SignalStream(LogStream):
    """The server's side of WatchSignals."""

    log = LOG
    response = pb.WatchSignalsResponse

    def __init__(
        self, db: Database, logs: Logs, tokens: Tokens, request: pb.WatchSignalsRequest
    ) -> None:
        super().__init__(db, logs, tokens, request)
        self._filter = request.filter
        self._strategy_ids = set(request.filter.strategy_ids)
        self._symbols = set(request.filter.symbols)
        self._types = set(request.filter.signal_types)

    async def snapshot(self, conn: Connection) -> Sequence[pb.WatchSignalsResponse]:
        responses, count, size = [], 0, 0
        rows = queries.active(conn, self._filter, MAX_ACTIVE + 1)
        async for part, _ in _parts(rows, PAGE):
            response = pb.WatchSignalsResponse(signals=part)
            responses.append(response)
            count += len(part)
            size += response.ByteSize()
            if count > MAX_ACTIVE:
                raise ResultTooLarge(MAX_ACTIVE, "active signals")
            if size > MAX_ACTIVE_BYTES:
                raise ResultTooLarge(MAX_ACTIVE_BYTES, "bytes of active signals")
        return responses

    def data(self, entries: Sequence[Entry]) -> bytes:
        return b"".join(
            EVENTS + varint(len(entry.wire)) + entry.wire for entry in entries
        )

    def wants(self, event: pb.SignalEvent) -> bool:
        """Tell what the query of the snapshot tells."""
        signal = event.signal
        return (
            signal.strength >= self._filter.min_strength
            and (not self._strategy_ids or signal.strategy_id in self._strategy_ids)
            and (not self._symbols or signal.symbol in self._symbols)
            and (not self._types or signal.signal_type in self._types)
        )


async def _claim(conn: Connection, signals: Sequence[pb.Signal]) -> None:
    """Take the ids of signals for them. Raises KeyReused where they are another's."""
    hashes = {
        signal.signal_id: sha256(signal.SerializeToString(deterministic=True)).digest()
        for signal in signals
    }
    taken = await queries.claim(conn, signals, hashes)
    for signal_id, hash in hashes.items():
        if taken[signal_id] != hash:
            raise KeyReused("signal_id", signal_id)


async def _found(conn: Connection, signal_id: str, lock: bool = False) -> pb.Signal:
    """Return a signal. Raises UnknownSignal, also for one that is not the caller's."""
    found = await queries.find(conn, [signal_id], lock)
    if signal_id not in found or not may_see(found[signal_id].strategy_id):
        raise UnknownSignal(signal_id)
    return found[signal_id]


def _new(sent: pb.Signal, trace: str) -> pb.Signal:
    """Return a signal as it is once it is published."""
    signal = pb.Signal()
    signal.CopyFrom(sent)
    signal.status = pb.SIGNAL_STATUS_ACTIVE
    signal.trace_id = trace
    for field in ("time", "expiration"):
        if signal.HasField(field):  # the database keeps microseconds
            stamp = getattr(signal, field)
            stamp.nanos -= stamp.nanos % 1_000
    return signal


def _illegal(signal: pb.Signal) -> IllegalTransition:
    status = pb.SignalStatus.Name(signal.status).removeprefix("SIGNAL_STATUS_")
    return IllegalTransition(
        f"the signal is {status}: only an active one can be cancelled",
        status=status,
        event="CANCELLED",
    )


async def _parts(
    signals: AsyncIterator[pb.Signal], most: int
) -> AsyncIterator[tuple[list[pb.Signal], bool]]:
    """Yield signals by parts that fit a message, and whether more follow."""
    part, size = list[pb.Signal](), 0
    async for signal in signals:
        if len(part) == most or size >= PAGE_BYTES:
            yield part, True
            part, size = [], 0
        part.append(signal)
        size += signal.ByteSize()
    if part:
        yield part, False
