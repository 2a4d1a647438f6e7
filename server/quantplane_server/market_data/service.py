"""MarketDataService: one method per RPC; the long ones are told in their own files."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

from quantplane import v1 as pb
from quantplane.v1 import market_data_pb2_grpc as rpc
from quantplane_server.bus import Bus
from quantplane_server.checks import (
    FIRST,
    LAST,
    check_order,
    time_given,
    to_datetime,
    to_us,
)
from quantplane_server.db import Connection, Database
from quantplane_server.errors import (
    InvalidResumeToken,
    QuantplaneError,
    UnknownSymbol,
)
from quantplane_server.fanout import Fanout, framed
from quantplane_server.market_data import checks, queries
from quantplane_server.market_data.columns import bar_columns
from quantplane_server.market_data.durability import Durability
from quantplane_server.market_data.feed import Feed
from quantplane_server.market_data.history import (
    bar_range,
    read_page,
)
from quantplane_server.market_data.latest import LatestQuotes
from quantplane_server.market_data.queries import BarRange
from quantplane_server.market_data.subscription import Request, Subscription
from quantplane_server.rpc.interceptor import Context, Serialised
from quantplane_server.streams import Batches, Streams
from quantplane_server.tasks import end
from quantplane_server.tokens import Tokens, list_purpose, purpose

PAGE = 1_000  # where a request names no page_size
CHUNK_ROWS = 16_384  # of StreamBars
LEAVE_S = 1.0
_START = struct.Struct("!q")  # of the next page, in us
_PLACE = struct.Struct("!Iq")  # index of the symbol, start of its next chunk in us


class MarketDataService(rpc.MarketDataServiceServicer):
    """Quotes by way of the bus, bars straight into the database and out of it."""

    def __init__(
        self, bus: Bus, fanout: Fanout, db: Database, tokens: Tokens, streams: Streams
    ) -> None:
        self._bus = bus
        self._fanout = fanout
        self._db = db
        self._tokens = tokens
        self._streams = streams
        self._durability = Durability(bus)

    async def run(self) -> None:
        """Do what the service does beside its calls, until cancelled."""
        await self._durability.run()

    # --- Quotes ---

    async def PublishQuotes(
        self, requests: AsyncIterator[pb.PublishQuotesRequest], context: Context
    ) -> AsyncIterator[pb.PublishQuotesResponse]:
        feed = Feed(self._bus, self._db, self._durability)
        with self._streams.held(feed):
            async for progress in feed.run(requests):
                yield progress

    async def StreamQuotes(
        self, requests: AsyncIterator[pb.StreamQuotesRequest], context: Context
    ) -> AsyncIterator[Serialised]:
        first = await anext(aiter(requests), pb.StreamQuotesRequest())
        subscription = self._subscription(first)
        with self._streams.held(subscription):
            reading = asyncio.create_task(_steer(subscription, requests))
            try:
                async for message in subscription.messages():
                    yield message
                # To write to a call that has ended costs a client in Python what it has
                # not read yet: here the Goodbye. So it may leave first.
                await asyncio.wait([reading], timeout=LEAVE_S)
            finally:
                await end(reading)

    async def SubscribeQuotes(
        self, request: pb.SubscribeQuotesRequest, context: Context
    ) -> AsyncIterator[Serialised]:
        subscription = self._subscription(request)
        with self._streams.held(subscription):
            async for message in subscription.messages():
                yield message

    def _subscription(self, request: Request) -> Subscription:
        checks.check_subscription(request)
        return Subscription(self._bus, self._fanout, self._db, self._tokens, request)

    async def GetLatestQuotes(
        self, request: pb.GetLatestQuotesRequest, context: Context
    ) -> pb.GetLatestQuotesResponse:
        checks.check_latest(request)
        symbols = list(dict.fromkeys(request.symbols))
        as_of = time_given(request, "as_of", LAST)
        found = await LatestQuotes(self._bus, self._db)(symbols, as_of)
        return pb.GetLatestQuotesResponse(
            quotes=[found[symbol] for symbol in symbols if symbol in found],
            unknown_symbols=[symbol for symbol in symbols if symbol not in found],
        )

    # --- Bars ---

    async def PublishBars(
        self, requests: AsyncIterator[pb.PublishBarsRequest], context: Context
    ) -> AsyncIterator[pb.PublishBarsResponse]:
        expected = 1
        batches = Batches(requests)
        with self._streams.held(batches):
            async for request in batches:
                check_order(request.batch, expected)
                checks.check_bars(request.bars, request.batch)
                async with self._db.transaction() as conn:
                    await queries.store_bars(conn, request.bars)
                yield pb.PublishBarsResponse(durable_through=request.batch)
                expected += 1

    async def ListBars(
        self, request: pb.ListBarsRequest, context: Context
    ) -> pb.ListBarsResponse:
        checks.check_list_bars(request)
        wanted = bar_range(request.symbol, request)
        query = list_purpose(request)
        if request.page_token:
            (start,) = _START.unpack(self._tokens.open_page(query, request.page_token))
            wanted = wanted._replace(start=to_datetime(start))
        async with self._db.connection() as conn:
            limit = request.page_size or PAGE
            page = await read_page(conn, queries.bars, wanted, limit)
            if not page.rows and not request.page_token:
                await _require_data(conn, request.symbol)
        response = pb.ListBarsResponse(bars=page.rows, source=_source(wanted))
        if page.next_start:
            token = _START.pack(to_us(page.next_start))
            response.next_page_token = self._tokens.page_token(query, token)
        return response

    async def StreamBars(
        self, request: pb.StreamBarsRequest, context: Context
    ) -> AsyncIterator[Serialised]:
        checks.check_stream_bars(request)
        query = purpose(request, "resume_token")
        symbols = sorted(set(request.symbols))
        index, start = 0, None
        if request.resume_token:
            payload = self._tokens.open(query, request.resume_token)
            if payload is None:
                raise InvalidResumeToken
            index, start_us = _PLACE.unpack(payload)
            start = to_datetime(start_us)
        else:
            async with self._db.connection() as conn:
                for symbol in symbols:
                    await _require_data(conn, symbol)
        states = [pb.KeyStatus(key=s, state=pb.KEY_STATE_ACTIVE) for s in symbols]
        yield _bars_event(subscribed=pb.Subscribed(keys=states))
        for at, symbol in enumerate(symbols[index:], index):
            wanted = bar_range(symbol, request)
            while True:
                wanted = wanted._replace(start=start or wanted.start)
                async with self._db.connection() as conn:
                    page = await read_page(
                        conn, queries.bar_columns, wanted, CHUNK_ROWS
                    )
                start = page.next_start
                place = (at, to_us(start)) if start else (at + 1, to_us(FIRST))
                token = self._tokens.seal(query, _PLACE.pack(*place))
                if len(page.rows):
                    source = _source(wanted)
                    rest = pb.StreamBarsResponse(resume_token=token, source=source)
                    columns = framed(bar_columns(symbol, page.rows))
                    yield columns + rest.SerializeToString()
                if not start:
                    break
        yield _bars_event(complete=pb.Complete())

    async def ListSymbols(
        self, request: pb.ListSymbolsRequest, context: Context
    ) -> pb.ListSymbolsResponse:
        checks.check_list_symbols(request)
        limit = request.page_size or PAGE
        after = ""
        if request.page_token:
            after = self._tokens.open_page(b"ListSymbols", request.page_token).decode()
        async with self._db.connection() as conn:
            symbols = await queries.symbols_after(conn, after, limit + 1)
        response = pb.ListSymbolsResponse(symbols=symbols[:limit])
        if len(symbols) > limit:
            last = symbols[limit - 1].symbol.encode()
            response.next_page_token = self._tokens.page_token(b"ListSymbols", last)
        return response


async def _steer(
    subscription: Subscription, requests: AsyncIterator[pb.StreamQuotesRequest]
) -> None:
    """Hand the requests after the first to their subscription."""
    try:
        async for request in requests:
            subscription.receive(request)
    except QuantplaneError as error:
        subscription.fail(error)


async def _require_data(conn: Connection, symbol: str) -> None:
    if not await queries.has_data(conn, symbol):
        raise UnknownSymbol(symbol, "ListSymbols lists what has data")


def _source(wanted: BarRange) -> pb.BarSource.ValueType:
    return pb.BAR_SOURCE_DAILY if wanted.daily else pb.BAR_SOURCE_ROWS


def _bars_event(**event: Any) -> bytes:
    response = pb.StreamBarsResponse(event=pb.StreamEvent(**event))
    return response.SerializeToString()
