"""StrategyService: strategies are changed by people, and followed by what runs them."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from quantplane import v1 as pb
from quantplane.v1 import strategies_pb2_grpc as rpc
from quantplane_server.coalescing import Coalescer
from quantplane_server.db import Database
from quantplane_server.errors import UnknownStrategy
from quantplane_server.principal import bound
from quantplane_server.reference import changes, checks, pages, queries
from quantplane_server.reference.queries import STRATEGIES
from quantplane_server.rpc.caller import caller
from quantplane_server.rpc.interceptor import Context
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens
from quantplane_server.watch import Part, State, Watches, WatchStream

STOPPED = "stopped"  # the status of a strategy that is created without one
MOST_READ = 100  # strategies at a time, by the streams of a process
MAX_WAITING = 1_000_000  # strategies to be read


class StrategyService(rpc.StrategyServiceServicer):
    """Kept in the database, announced over the bus."""

    def __init__(
        self, db: Database, watches: Watches, tokens: Tokens, streams: Streams
    ) -> None:
        self._db = db
        self._watches = watches
        self._tokens = tokens
        self._streams = streams
        self._reads = Coalescer[str, State](self._read, MOST_READ, MAX_WAITING)

    async def close(self) -> None:
        """Return once what is being read was."""
        await self._reads.close()

    # --- Changing ---

    async def CreateStrategy(
        self, request: pb.CreateStrategyRequest, context: Context
    ) -> pb.CreateStrategyResponse:
        asked = request.strategy
        asked.status = asked.status or STOPPED
        checks.check_create_strategy(asked)
        strategy = await changes.create(self._db, STRATEGIES, asked, caller(context))
        await self._watches.announce([_topic(asked.strategy_id)])
        return pb.CreateStrategyResponse(strategy=strategy)

    async def UpdateStrategy(
        self, request: pb.UpdateStrategyRequest, context: Context
    ) -> pb.UpdateStrategyResponse:
        checks.check_update_strategy(request)
        asked, fields = request.strategy, request.update_mask.paths
        strategy = await changes.update(
            self._db, STRATEGIES, asked, fields, caller(context)
        )
        if strategy is None:
            raise UnknownStrategy(asked.strategy_id)
        await self._watches.announce([_topic(asked.strategy_id)])
        return pb.UpdateStrategyResponse(strategy=strategy)

    async def DeleteStrategy(
        self, request: pb.DeleteStrategyRequest, context: Context
    ) -> pb.DeleteStrategyResponse:
        checks.check_strategy_id(request)
        id, etag = request.strategy_id, request.etag
        await changes.delete(self._db, STRATEGIES, id, etag, caller(context))
        await self._watches.announce([_topic(id)])
        return pb.DeleteStrategyResponse()

    # --- Reading ---

    async def GetStrategy(
        self, request: pb.GetStrategyRequest, context: Context
    ) -> pb.GetStrategyResponse:
        checks.check_strategy_id(request)
        async with self._db.connection() as conn:
            found = await queries.find(conn, STRATEGIES, [request.strategy_id])
        if request.strategy_id not in found:
            raise UnknownStrategy(request.strategy_id)
        return pb.GetStrategyResponse(strategy=found[request.strategy_id])

    async def ListStrategies(
        self, request: pb.ListStrategiesRequest, context: Context
    ) -> pb.ListStrategiesResponse:
        checks.check_list_strategies(request)
        behind, limit = pages.begin(self._tokens, request)
        async with self._db.transaction(readonly=True) as conn:
            rows = queries.strategies_after(
                conn, behind, request.statuses, request.types, bound(), limit + 1
            )
            page, more = await pages.cut(rows, limit)
        response = pb.ListStrategiesResponse(strategies=page)
        if more:
            response.next_page_token = pages.token_behind(
                self._tokens, request, page[-1].strategy_id
            )
        return response

    async def WatchStrategies(
        self, request: pb.WatchStrategiesRequest, context: Context
    ) -> AsyncIterator[pb.WatchStrategiesResponse]:
        checks.check_watch_strategies(request)
        ids = sorted(set(request.strategy_ids))
        parts = [self._part(id) for id in ids]
        stream = StrategyStream(self._watches, self._tokens, request, parts)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message

    def _part(self, strategy_id: str) -> Part:
        """Return the state of one strategy.

        One of its own for each: they are shared by all streams, a change has only the
        strategy that changed read again, and a response, which is of one part, fits
        a message. What is to be read at the same time is read at once.
        """
        topic = _topic(strategy_id)
        return Part(topic, [topic], partial(self._state, strategy_id))

    async def _state(self, strategy_id: str) -> State:
        (state,) = await self._reads.do([strategy_id])
        return state

    async def _read(self, strategy_ids: Sequence[str]) -> list[State]:
        async with self._db.connection() as conn:
            found = await queries.find(conn, STRATEGIES, strategy_ids)
        return [{id: _response(id, found.get(id))} for id in strategy_ids]


class StrategyStream(WatchStream):
    """The server's side of WatchStrategies: a part for each strategy.

    A state is the response that tells it. That a strategy is not there is told too.
    """

    def statuses(self, states: Sequence[Any]) -> list[pb.KeyStatus]:
        return [
            pb.KeyStatus(
                key=id,
                state=pb.KEY_STATE_ACTIVE if told.strategies else pb.KEY_STATE_NO_DATA,
            )
            for state in states
            for id, told in state.items()
        ]

    def data(self, state: Any, changed: Any, whole: bool) -> pb.WatchStrategiesResponse:
        response = pb.WatchStrategiesResponse()
        for told in changed.values():
            response.MergeFrom(told)
        return response

    def event(self, event: pb.StreamEvent) -> pb.WatchStrategiesResponse:
        return pb.WatchStrategiesResponse(event=event)


def _response(
    strategy_id: str, strategy: pb.Strategy | None
) -> pb.WatchStrategiesResponse:
    if strategy is None:
        return pb.WatchStrategiesResponse(deleted_ids=[strategy_id])
    return pb.WatchStrategiesResponse(strategies=[strategy])


def _topic(strategy_id: str) -> str:
    return f"strategy:{strategy_id}"
