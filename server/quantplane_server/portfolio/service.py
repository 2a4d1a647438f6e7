"""PortfolioService: positions from the database, marks from the bus."""

import struct
from collections.abc import AsyncIterator, Hashable, Sequence
from functools import partial

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane.v1 import portfolio_pb2_grpc as rpc
from quantplane_server.checks import (
    FIRST,
    LAST,
    seconds,
    time_given,
    time_us,
    to_datetime,
)
from quantplane_server.db import Database
from quantplane_server.portfolio import checks, queries
from quantplane_server.portfolio.audit import Audit, OrderDrifts
from quantplane_server.portfolio.snapshots import Snapshots
from quantplane_server.portfolio.valuation import LatestQuotes, Valuation
from quantplane_server.rpc.interceptor import Context
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens, list_purpose
from quantplane_server.watch import Part, State, Watches, WatchStream

TOPIC = "portfolio"  # announced by whoever has booked executions
PAGE = 1_000  # where a request names no page_size
INTERVAL_S = 1.0  # where a request names none
REST_S = 0.1  # between two reads, however many fills there are
_START = struct.Struct("!q")  # of the next page, in us


class PortfolioService(rpc.PortfolioServiceServicer):
    """The account and its strategies, as they are now and as they were."""

    def __init__(
        self,
        db: Database,
        reference: Database,
        latest_quotes: LatestQuotes,
        watches: Watches,
        tokens: Tokens,
        streams: Streams,
        order_drifts: OrderDrifts,
    ) -> None:
        self._db = db
        self._valuation = Valuation(db, reference, latest_quotes)
        self._snapshots = Snapshots(db, reference, latest_quotes)
        self._audit = Audit(db, order_drifts)
        self._watches = watches
        self._tokens = tokens
        self._streams = streams

    # --- Now ---

    async def GetPortfolio(
        self, request: pb.GetPortfolioRequest, context: Context
    ) -> pb.GetPortfolioResponse:
        checks.check_get(request)
        return await self._valuation.portfolio(request.strategy_id)

    async def ListPositions(
        self, request: pb.ListPositionsRequest, context: Context
    ) -> pb.ListPositionsResponse:
        checks.check_list(request)
        query = list_purpose(request)
        after = ""
        if request.page_token:
            after = self._tokens.open_page(query, request.page_token).decode()
        limit = request.page_size or PAGE
        async with self._db.connection() as conn:
            positions = await queries.positions(
                conn, request.strategy_id, after, limit + 1, request.open_only
            )
        more = len(positions) > limit
        del positions[limit:]
        await self._valuation.mark(positions)
        response = pb.ListPositionsResponse(positions=positions)
        if more:
            last = positions[-1].symbol.encode()
            response.next_page_token = self._tokens.page_token(query, last)
        return response

    async def WatchPortfolio(
        self, request: pb.WatchPortfolioRequest, context: Context
    ) -> AsyncIterator[pb.WatchPortfolioResponse]:
        checks.check_watch(request)
        part = _part(self._valuation, request)
        stream = PortfolioStream(self._watches, self._tokens, request, [part])
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message

    # --- Snapshots ---

    async def TakeSnapshot(
        self, request: pb.TakeSnapshotRequest, context: Context
    ) -> pb.TakeSnapshotResponse:
        return pb.TakeSnapshotResponse(snapshot=await self._snapshots.take())

    async def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: Context
    ) -> pb.ListSnapshotsResponse:
        checks.check_snapshots(request)
        query = list_purpose(request)
        start = time_given(request, "start_time", FIRST)
        if request.page_token:
            payload = self._tokens.open_page(query, request.page_token)
            start = to_datetime(*_START.unpack(payload))
        end = time_given(request, "end_time", LAST)
        limit = request.page_size or PAGE
        async with self._db.connection() as conn:
            snapshots = await queries.snapshots(conn, start, end, limit + 1)
        response = pb.ListSnapshotsResponse(snapshots=snapshots[:limit])
        if len(snapshots) > limit:
            following = _START.pack(time_us(snapshots[limit - 1].time) + 1)
            response.next_page_token = self._tokens.page_token(query, following)
        return response

    # --- The audit ---

    async def AuditPositions(
        self, request: pb.AuditPositionsRequest, context: Context
    ) -> pb.AuditPositionsResponse:
        return await self._audit.run()


class PortfolioStream(WatchStream):
    """The server's side of WatchPortfolio: one state, of the summary and positions."""

    def statuses(self, states: Sequence[State]) -> list[pb.KeyStatus]:
        return []

    def data(
        self, state: State, changed: State, whole: bool
    ) -> pb.WatchPortfolioResponse:
        response = pb.WatchPortfolioResponse()
        for row in changed.values():
            if isinstance(row, pb.PortfolioSummary):
                response.summary.CopyFrom(row)
            elif isinstance(row, pb.Position):
                response.positions.append(row)
        return response

    def event(self, event: pb.StreamEvent) -> pb.WatchPortfolioResponse:
        return pb.WatchPortfolioResponse(event=event)


def _part(valuation: Valuation, request: pb.WatchPortfolioRequest) -> Part:
    interval_s = seconds(request.interval) or INTERVAL_S
    return Part(
        (TOPIC, request.strategy_id, interval_s),
        [TOPIC],
        partial(_read, valuation, request.strategy_id),
        interval_s,
        REST_S,
    )


async def _read(valuation: Valuation, strategy_id: str) -> State:
    portfolio = await valuation.portfolio(strategy_id)
    state: dict[Hashable, Message] = {"summary": portfolio.summary}
    for position in portfolio.positions:
        state["position", position.symbol] = position
    return state
