"""ModelService: the same few steps for each of the three models."""

import struct
from collections.abc import AsyncIterator, Hashable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

from quantplane import v1 as pb
from quantplane.v1 import models_pb2_grpc as rpc
from quantplane_server.checks import FIRST, LAST, time_given, to_us
from quantplane_server.db import Connection, Database
from quantplane_server.errors import ResultTooLarge
from quantplane_server.models import checks, queries
from quantplane_server.models.queries import HESTON, OU, SABR, Model
from quantplane_server.rpc.interceptor import Context
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens, list_purpose
from quantplane_server.watch import Part, State, Watches, WatchStream

PAGE = 1_000  # where a request names no page_size
MAX_ROWS = 20_000  # of the latest parameters, in one answer


class ModelService(rpc.ModelServiceServicer):
    """Kept in the database, announced over the bus."""

    def __init__(
        self, db: Database, watches: Watches, tokens: Tokens, streams: Streams
    ) -> None:
        self._db = db
        self._watches = watches
        self._tokens = tokens
        self._streams = streams

    # --- Publishing ---

    async def PublishHeston(
        self, request: pb.PublishHestonRequest, context: Context
    ) -> pb.PublishHestonResponse:
        checks.check_heston(request.parameters)
        await self._publish(HESTON, request.parameters)
        return pb.PublishHestonResponse()

    async def PublishSabr(
        self, request: pb.PublishSabrRequest, context: Context
    ) -> pb.PublishSabrResponse:
        checks.check_sabr(request.parameters)
        await self._publish(SABR, request.parameters)
        return pb.PublishSabrResponse()

    async def PublishOu(
        self, request: pb.PublishOuRequest, context: Context
    ) -> pb.PublishOuResponse:
        checks.check_ou(request.parameters)
        await self._publish(OU, request.parameters)
        return pb.PublishOuResponse()

    async def _publish(self, model: Model, rows: Sequence[Any]) -> None:
        async with self._db.transaction() as conn:
            await queries.store(conn, model, rows)
        await self._watches.announce(model.topic(model.name_of(row)) for row in rows)

    # --- The latest ---

    async def GetLatestHeston(
        self, request: pb.GetLatestHestonRequest, context: Context
    ) -> pb.GetLatestHestonResponse:
        checks.check_latest(request, "symbols")
        rows, unknown = await self._latest(HESTON, request.symbols, request)
        return pb.GetLatestHestonResponse(parameters=rows, unknown_symbols=unknown)

    async def GetLatestSabr(
        self, request: pb.GetLatestSabrRequest, context: Context
    ) -> pb.GetLatestSabrResponse:
        checks.check_latest(request, "symbols")
        rows, unknown = await self._latest(SABR, request.symbols, request)
        return pb.GetLatestSabrResponse(parameters=rows, unknown_symbols=unknown)

    async def GetLatestOu(
        self, request: pb.GetLatestOuRequest, context: Context
    ) -> pb.GetLatestOuResponse:
        checks.check_latest(request, "pair_ids")
        rows, unknown = await self._latest(OU, request.pair_ids, request)
        return pb.GetLatestOuResponse(parameters=rows, unknown_pair_ids=unknown)

    async def _latest(
        self, model: Model, names: Iterable[str], request: Any
    ) -> tuple[list[Any], list[str]]:
        """Return the rows of the names, and the names that have none."""
        names = list(dict.fromkeys(names))
        as_of_us = to_us(time_given(request, "as_of", LAST))
        async with self._db.connection() as conn:
            rows = await _latest(conn, model, names, as_of_us)
        known = {model.name_of(row) for row in rows}
        return rows, [name for name in names if name not in known]

    # --- History ---

    async def ListHeston(
        self, request: pb.ListHestonRequest, context: Context
    ) -> pb.ListHestonResponse:
        checks.check_list(request, "symbol")
        rows, token = await self._page(HESTON, request.symbol, request)
        return pb.ListHestonResponse(parameters=rows, next_page_token=token)

    async def ListSabr(
        self, request: pb.ListSabrRequest, context: Context
    ) -> pb.ListSabrResponse:
        checks.check_list(request, "symbol")
        rows, token = await self._page(SABR, request.symbol, request)
        return pb.ListSabrResponse(parameters=rows, next_page_token=token)

    async def ListOu(
        self, request: pb.ListOuRequest, context: Context
    ) -> pb.ListOuResponse:
        checks.check_list(request, "pair_id")
        rows, token = await self._page(OU, request.pair_id, request)
        return pb.ListOuResponse(parameters=rows, next_page_token=token)

    async def _page(
        self, model: Model, name: str, request: Any
    ) -> tuple[list[Any], str]:
        """Return the rows of a page, and the token of the next if there is one."""
        query = list_purpose(request)
        if request.page_token:
            payload = self._tokens.open_page(query, request.page_token)
            after = _layout(model).unpack(payload)
        else:  # behind all that is before the start
            start = to_us(time_given(request, "start_time", FIRST))
            after = (start - 1, *(inf for _ in model.place[1:]))
        end = to_us(time_given(request, "end_time", LAST))
        limit = request.page_size or PAGE
        async with self._db.connection() as conn:
            rows = await queries.rows_after(conn, model, name, after, end, limit + 1)
        if len(rows) <= limit:
            return rows, ""
        last = _layout(model).pack(*model.place_of(rows[limit - 1]))
        return rows[:limit], self._tokens.page_token(query, last)

    # --- Streaming ---

    async def WatchModels(
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncIterator[pb.WatchModelsResponse]:
        checks.check_watch(request)
        stream = ModelStream(self._db, self._watches, self._tokens, request)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message


class ModelStream(WatchStream):
    """The server's side of WatchModels: one state with a part of it for each key."""

    def __init__(
        self,
        db: Database,
        watches: Watches,
        tokens: Tokens,
        request: pb.WatchModelsRequest,
    ) -> None:
        wanted = {
            HESTON: sorted(set(request.heston_symbols)),
            SABR: sorted(set(request.sabr_symbols)),
            OU: sorted(set(request.ou_pair_ids)),
        }
        self._keys = [
            model.topic(name) for model, names in wanted.items() for name in names
        ]
        part = Part(tuple(self._keys), self._keys, partial(_read, db, wanted))
        super().__init__(watches, tokens, request, [part])

    def statuses(self, states: Sequence[State]) -> list[pb.KeyStatus]:
        (state,) = states
        return [
            pb.KeyStatus(
                key=key,
                state=pb.KEY_STATE_ACTIVE if key in state else pb.KEY_STATE_NO_DATA,
            )
            for key in self._keys
        ]

    def data(self, state: State, changed: State, whole: bool) -> pb.WatchModelsResponse:
        response = pb.WatchModelsResponse()
        for part in changed.values():
            response.MergeFrom(part)  # type: ignore[arg-type]
        return response

    def event(self, event: pb.StreamEvent) -> pb.WatchModelsResponse:
        return pb.WatchModelsResponse(event=event)


async def _read(db: Database, wanted: Mapping[Model, Sequence[str]]) -> State:
    """Return what each key has: a response of its own, with all its maturities."""
    state: dict[Hashable, pb.WatchModelsResponse] = {}
    async with db.connection() as conn:
        for model, names in wanted.items():
            for row in await _latest(conn, model, names, to_us(LAST)):
                key = model.topic(model.name_of(row))
                of_key = state.setdefault(key, pb.WatchModelsResponse())
                getattr(of_key, model.kind).append(row)
    return state


async def _latest(
    conn: Connection, model: Model, names: Sequence[str], as_of_us: int
) -> list[Any]:
    rows = await queries.latest(conn, model, names, as_of_us, MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise ResultTooLarge(MAX_ROWS, "rows")
    return rows


def _layout(model: Model) -> struct.Struct:
    """Return how a place is packed: its time, and the maturity where there are any."""
    return struct.Struct("!q" + "d" * (len(model.place) - 1))
