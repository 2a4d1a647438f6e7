"""OptionsService: one method per RPC, and the state that subscribers follow."""

from collections.abc import AsyncIterator, Hashable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane.v1 import options_pb2_grpc as rpc
from quantplane_server.checks import LAST, check_order, time_given, time_us, to_datetime
from quantplane_server.db import Database
from quantplane_server.errors import ResultTooLarge, UnknownSymbol
from quantplane_server.options import checks, queries
from quantplane_server.options.checks import MAX_CONTRACTS
from quantplane_server.rpc.interceptor import Context
from quantplane_server.streams import Batches, Streams
from quantplane_server.tokens import Tokens
from quantplane_server.watch import Part, State, Watches, WatchStream

HEADER = "chain"  # the key of a state's chain without contracts


class OptionsService(rpc.OptionsServiceServicer):
    """Kept in the database, announced over the bus."""

    def __init__(
        self, db: Database, watches: Watches, tokens: Tokens, streams: Streams
    ) -> None:
        self._db = db
        self._watches = watches
        self._tokens = tokens
        self._streams = streams

    async def PublishOptionChain(
        self, requests: AsyncIterator[pb.PublishOptionChainRequest], context: Context
    ) -> AsyncIterator[pb.PublishOptionChainResponse]:
        expected = 1
        batches = Batches(requests)
        with self._streams.held(batches):
            async for request in batches:
                check_order(request.batch, expected)
                checks.check_publish(request)
                await self._store(request.chain)
                await self._watches.announce([_topic(request.chain.underlying)])
                yield pb.PublishOptionChainResponse(durable_through=request.batch)
                expected += 1

    async def _store(self, chain: pb.OptionChain) -> None:
        key = chain.underlying, to_datetime(time_us(chain.time))
        async with self._db.transaction() as conn:
            await queries.note_chain(conn, *key, whole=not chain.partial)
            if not chain.partial:
                await queries.delete_contracts(conn, *key)
            await queries.store_contracts(conn, *key, chain.contracts)

    async def GetOptionChain(
        self, request: pb.GetOptionChainRequest, context: Context
    ) -> pb.GetOptionChainResponse:
        checks.check_get(request)
        wanted = request.underlying, _as_of(request), request.filter
        state = await self._read(*wanted)
        if not state:
            raise _unknown(request.underlying)
        return pb.GetOptionChainResponse(chain=_chain(state, state))

    async def ListExpirations(
        self, request: pb.ListExpirationsRequest, context: Context
    ) -> pb.ListExpirationsResponse:
        checks.check_expirations(request)
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            span = await queries.span(conn, request.underlying, _as_of(request))
            if span is None:
                raise _unknown(request.underlying)
            response = pb.ListExpirationsResponse(
                expirations=await queries.expirations(conn, span)
            )
        response.time.FromDatetime(span.newest)
        return response

    async def SubscribeOptionChain(
        self, request: pb.SubscribeOptionChainRequest, context: Context
    ) -> AsyncIterator[pb.SubscribeOptionChainResponse]:
        checks.check_subscription(request)
        underlyings = list(dict.fromkeys(request.underlyings))
        parts = [self._part(underlying, request.filter) for underlying in underlyings]
        stream = ChainStream(self._watches, self._tokens, request, parts, underlyings)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message

    def _part(self, underlying: str, wanted: pb.OptionFilter) -> Part:
        terms = wanted.SerializeToString(deterministic=True)
        return Part(
            key=("options", underlying, terms),
            topics=[_topic(underlying)],
            read=partial(self._read, underlying, LAST, wanted),
        )

    async def _read(
        self, underlying: str, as_of: datetime, wanted: pb.OptionFilter
    ) -> State:
        """Return the chain without contracts under HEADER, and each contract, timed.

        Empty if there is no chain.
        """
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            span = await queries.span(conn, underlying, as_of)
            if span is None:
                return {}
            contracts = await queries.contracts(conn, span, wanted, MAX_CONTRACTS + 1)
        if len(contracts) > MAX_CONTRACTS:
            raise ResultTooLarge(MAX_CONTRACTS, "contracts")
        header = pb.OptionChain(underlying=underlying)
        header.time.FromDatetime(span.newest)
        state: dict[Hashable, Message] = {HEADER: header}
        for quote in contracts:
            state[quote.expiration, quote.strike, quote.option_type] = quote
        return state


class ChainStream(WatchStream):
    """One reader of chains; its parts are those of the underlyings, in this order."""

    def __init__(
        self,
        watches: Watches,
        tokens: Tokens,
        request: pb.SubscribeOptionChainRequest,
        parts: Sequence[Part],
        underlyings: Sequence[str],
    ) -> None:
        super().__init__(watches, tokens, request, parts)
        self._underlyings = underlyings

    def statuses(self, states: Sequence[State]) -> list[pb.KeyStatus]:
        return [
            pb.KeyStatus(
                key=underlying,
                state=pb.KEY_STATE_ACTIVE if state else pb.KEY_STATE_NO_DATA,
            )
            for underlying, state in zip(self._underlyings, states, strict=True)
        ]

    def data(
        self, state: State, changed: State, whole: bool
    ) -> pb.SubscribeOptionChainResponse:
        chain = _chain(state, changed)
        if not state:  # its rows were deleted: nobody but its place says whose it is
            sent = zip(self._underlyings, self._sent, strict=True)
            chain.underlying = next(name for name, one in sent if one.state is state)
        return pb.SubscribeOptionChainResponse(chains=[chain])

    def event(self, event: pb.StreamEvent) -> pb.SubscribeOptionChainResponse:
        return pb.SubscribeOptionChainResponse(event=event)


def _chain(state: State, rows: State) -> pb.OptionChain:
    """Return rows of a state as a chain, partial unless they are all of it."""
    contracts: Any = [row for key, row in rows.items() if key != HEADER]
    chain = pb.OptionChain(contracts=contracts, partial=len(rows) < len(state))
    header: Any = state.get(HEADER)
    if header is not None:
        chain.MergeFrom(header)
    for quote in chain.contracts:
        if quote.time == chain.time:
            quote.ClearField("time")
    return chain


def _as_of(request: pb.GetOptionChainRequest | pb.ListExpirationsRequest) -> datetime:
    return time_given(request, "as_of", LAST)


def _topic(underlying: str) -> str:
    return f"options:{underlying}"


def _unknown(underlying: str) -> UnknownSymbol:
    return UnknownSymbol(underlying, "check its spelling, or ask for a later as_of")
