"""The client around the book: follows commands and quotes, reports what comes of them.

WatchBrokerCommands  →  latency  ↘
                                   Book  →  Outbox  →  ReportOrderEvents,
                   StreamQuotes  ↗                     ReportExecutions
"""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

import grpc

from quantplane import Client
from quantplane import v1 as pb
from quantplane.errors import describe
from quantplane.follow import Follower
from quantplane.retry import answered
from quantplane_server.paper.book import Book, Commission, rejected
from quantplane_server.paper.outbox import Outbox

MAX_SYMBOLS = 10_000  # of one stream of quotes
ON_THEIR_WAY = 100  # responses with commands, while the latency passes

Arrival = tuple[float, Sequence[pb.BrokerCommand]]  # when they are due, and they


class Terms(NamedTuple):
    """How a paper broker works."""

    commission: Commission
    latency_s: float = 0.0  # from a command to its effect
    symbols: Sequence[str] = ()  # whose orders are its own; none: all


async def run(target: str, terms: Terms) -> None:
    """Be a broker at the server at `target` until cancelled.

    Raises RuntimeError if the server refuses it.
    """
    async with Client(target) as client:
        outbox = Outbox(client)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(outbox.run())
                while True:
                    await Session(client, outbox, group, terms).run()
                    await outbox.empty()
        except* grpc.aio.AioRpcError as refused:
            error = refused.exceptions[0]
            assert isinstance(error, grpc.aio.AioRpcError)
            text = f"the paper broker was refused: {describe(error)}"
            raise RuntimeError(text) from None


class Session:
    """From a snapshot of the live orders on, as long as no command is missed."""

    def __init__(
        self, client: Client, outbox: Outbox, group: asyncio.TaskGroup, terms: Terms
    ) -> None:
        self._client = client
        self._outbox = outbox
        self._group = group
        self._terms = terms
        self._book = Book(terms.commission)
        self._arrivals: asyncio.Queue[Arrival | None] = asyncio.Queue(ON_THEIR_WAY)
        self._watched: set[str] = set()
        self._quotes: Follower[pb.StreamQuotesResponse] | None = None
        self._seeing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Return when commands were missed: only a new snapshot tells what is live."""
        self._group.create_task(self._receive())
        try:
            while arrival := await self._arrivals.get():
                due_s, commands = arrival
                await asyncio.sleep(max(0.0, due_s - monotonic()))
                await self._watch({command.order.symbol for command in commands})
                for command in commands:
                    await self._outbox.room()
                    await self._obey(command)
        finally:
            if self._seeing:
                self._seeing.cancel()

    async def _receive(self) -> None:
        request = pb.WatchBrokerCommandsRequest()
        request.filter.symbols.extend(self._terms.symbols)
        watch = self._client.broker.WatchBrokerCommands
        async with self._client.follow(watch, request) as commands:
            async for response in commands:
                if response.event.HasField("gap"):
                    break
                due_s = monotonic() + self._terms.latency_s
                if response.commands:
                    await self._arrivals.put((due_s, response.commands))
        await self._arrivals.put(None)

    async def _obey(self, command: pb.BrokerCommand) -> None:
        order = command.order
        self._outbox.caused(command)
        if order.symbol not in self._watched:
            text = f"orders in {MAX_SYMBOLS:,} symbols are live"
            self._outbox.add([rejected(order, "TOO_MANY_SYMBOLS", text)])
            return
        rebuilt = not command.revision and order.filled_quantity > 0
        fills = await self._fills(order) if rebuilt else 0
        self._outbox.add(self._book.take(command, fills))

    async def _fills(self, order: pb.Order) -> int:
        """Return how many executions the order has: the next one is named after it."""
        request = pb.ListExecutionsRequest(order_id=order.order_id, page_size=10_000)
        count = 0
        while True:
            response = await answered(self._client.order.ListExecutions, request)
            count += len(response.executions)
            request.page_token = response.next_page_token
            if not request.page_token:
                return count

    async def _watch(self, symbols: set[str]) -> None:
        """Follow the quotes of more symbols, as far as there is room."""
        new = sorted(symbols - self._watched)
        full = len(self._watched) + len(new) > MAX_SYMBOLS
        if full:
            for idle in self._watched - self._book.symbols - symbols:
                self._watched.remove(idle)
                self._book.forget(idle)
            new = new[: MAX_SYMBOLS - len(self._watched)]
        self._watched.update(new)
        if self._quotes is None:
            request = pb.StreamQuotesRequest(symbols=new)
            stream = self._client.market_data.StreamQuotes
            self._quotes = self._client.follow(stream, request)
            self._seeing = self._group.create_task(self._see(self._quotes))
        elif full:
            await self._quotes.update(symbols=sorted(self._watched))
        elif new:
            await self._quotes.update(add_symbols=new)

    async def _see(self, quotes: Follower[pb.StreamQuotesResponse]) -> None:
        async with quotes:
            async for response in quotes:
                for quote in response.quotes:
                    await self._outbox.room()
                    if quote.symbol in self._watched:
                        self._outbox.add(self._book.see(quote))
