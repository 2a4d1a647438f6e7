"""Helpers: strategies and gateways at work, and watchers that check what they see.

What is wanted of an order, and what becomes of it, follows from its number. So whatever
was killed, what the servers hold can be compared with what should be there, order by
order; and every order that a call returned must be one that the watchers saw.
"""

import asyncio
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane.errors import is_transient
from quantplane.follow import Follower
from quantplane_server.db import UNAVAILABLE
from tests.faults import TICK_S, until

RATE = 200  # orders a second
OPEN = 400  # orders at most; beyond, no more are submitted
SYMBOLS = ("A", "B", "C", "D", "E", "F", "G", "H")
STRATEGIES = ("momentum", "pairs", "value")
QUANTITY = 10.0
REPEAT_S = 0.05  # before a call whose outcome is unknown is made again
BATCH = 16  # fills in a call
PAGE = 10_000  # the largest
COMMIT_US = 20_000

TERMINAL = (
    pb.ORDER_STATUS_FILLED,
    pb.ORDER_STATUS_CANCELLED,
    pb.ORDER_STATUS_REJECTED,
    pb.ORDER_STATUS_EXPIRED,
)
FACTS = (
    pb.ORDER_EVENT_TYPE_TRADE,
    pb.ORDER_EVENT_TYPE_TRADE_CANCEL,
    pb.ORDER_EVENT_TYPE_TRADE_CORRECT,
)

Failure = tuple[grpc.StatusCode, str]  # its reason
Fact = tuple[str, str, float, float]  # order_id, broker_exec_id, quantity, price


# --- Orders by their numbers ----------------------------------------------------------


def new_order(number: int) -> pb.NewOrder:
    return pb.NewOrder(
        client_order_id=f"c{number}",
        strategy_id=STRATEGIES[number % len(STRATEGIES)],
        symbol=SYMBOLS[number % len(SYMBOLS)],
        side=pb.SIDE_BUY if number % 5 < 3 else pb.SIDE_SELL,
        order_type=pb.ORDER_TYPE_LIMIT,
        quantity=QUANTITY,
        price=100 + number % 7,
    )


def number_of(order: pb.Order) -> int:
    return int(order.client_order_id.removeprefix("c"))


def is_cancelled(number: int) -> bool:
    """Tell whether the strategy cancels the order, which is filled in part by then."""
    return number % 9 == 0


def fills_of(number: int) -> list[float]:
    """Return the quantities; the last one of a cancelled order comes late."""
    if is_cancelled(number):
        return [4, 3]
    return [4, 6] if number % 2 else [QUANTITY]


def is_settled(order: pb.Order) -> bool:
    """Tell whether nothing more happens to an order."""
    filled = order.filled_quantity == sum(fills_of(number_of(order)))
    return filled and order.status in TERMINAL


# --- Calls ----------------------------------------------------------------------------


class Journal:
    """Makes calls until it is known what came of them, and notes what they return."""

    def __init__(self) -> None:
        self.orders: list[pb.Order] = []  # as they were returned
        self.failures: Counter[Failure] = Counter()  # after the client's own tries

    async def call(self, method: Any, request: Any) -> Any:
        while True:
            try:
                response = await method(request)
            except grpc.aio.AioRpcError as error:
                if not is_transient(error):
                    raise
                self.failures[error.code(), reason_of(error)] += 1
                await asyncio.sleep(REPEAT_S)
            else:
                self._note(response)
                return response

    def _note(self, response: Any) -> None:
        if response.DESCRIPTOR.fields_by_name.get("results"):
            assert not any(result.reason for result in response.results), response
            self.orders += [result.order for result in response.results]
        else:
            self.orders.append(response.order)


# --- Brokers --------------------------------------------------------------------------


class Venue:
    """A broker: the orders that it was sent, and the fills that it made."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.fills: list[pb.ExecutionReport] = []
        self.reported = 0  # of the fills
        self._cancelled: set[str] = set()

    def send(self, order: pb.Order) -> None:
        self.sent[order.order_id] += 1
        fills = fills_of(number_of(order))
        for number in range(len(fills) - is_cancelled(number_of(order))):
            self._fill(order, number)

    def cancel(self, order: pb.Order) -> None:
        if order.order_id not in self._cancelled:
            self._cancelled.add(order.order_id)
            self._fill(order, 1)  # it crosses the cancellation

    def _fill(self, order: pb.Order, number: int) -> None:
        fill = pb.ExecutionReport(
            order_id=order.order_id,
            broker_exec_id=f"x{number}",
            symbol=order.symbol,
            side=order.side,
            quantity=fills_of(number_of(order))[number],
            price=order.price - number,
            commission=0.25,
        )
        fill.time.GetCurrentTime()
        self.fills.append(fill)


class Gateway:
    """Takes orders in its symbols to a venue, and reports what comes of them.

    As protos/quantplane/v1/broker.proto asks: it says SUBMITTED before it sends an
    order, and asks the venue first where a predecessor may have sent it.
    """

    def __init__(
        self, journal: Journal, client: Client, venue: Venue, symbols: Iterable[str]
    ) -> None:
        self.found: list[pb.BrokerCommand] = []  # in the snapshot
        self.ready = asyncio.Event()
        self._journal = journal
        self._client = client
        self._venue = venue
        self._filter = pb.OrderFilter(symbols=symbols)
        self._commands: list[pb.BrokerCommand] = []  # to be done
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                commands, self._commands = self._commands, []
                await self._work(commands)

    async def _read(self) -> None:
        request = pb.WatchBrokerCommandsRequest(filter=self._filter)
        method = self._client.broker.WatchBrokerCommands
        async with self._client.follow(method, request) as stream:
            async for response in stream:
                assert not response.event.HasField("gap")
                self._commands += response.commands
                if response.event.HasField("snapshot_complete"):
                    self.found += self._commands
                    self.ready.set()
                if self.ready.is_set():
                    self._arrived.set()

    async def _work(self, commands: Sequence[pb.BrokerCommand]) -> None:
        """Do all that is to be done, in few calls, and report what is not yet."""
        orders = [command.order for command in commands]
        pending = [o for o in orders if o.status == pb.ORDER_STATUS_PENDING]
        await self._report(pending, pb.ORDER_EVENT_TYPE_SUBMITTED)
        for order in pending:
            if order.order_id not in self._venue.sent:
                self._venue.send(order)
        await self._report(pending, pb.ORDER_EVENT_TYPE_ACKNOWLEDGED)
        await self._report_fills()
        asked = [c.order for c in commands if c.type == pb.BROKER_COMMAND_TYPE_CANCEL]
        for order in asked:
            self._venue.cancel(order)
        await self._report(asked, pb.ORDER_EVENT_TYPE_CANCELLED)
        await self._report_fills()

    async def _report(
        self, orders: Sequence[pb.Order], event: "pb.OrderEventType.ValueType"
    ) -> None:
        reports = [pb.OrderReport(order_id=o.order_id, type=event) for o in orders]
        if event == pb.ORDER_EVENT_TYPE_ACKNOWLEDGED:
            for report in reports:
                report.broker_order_id = f"b{report.order_id[-12:]}"
        if reports:
            request = pb.ReportOrderEventsRequest(reports=reports)
            await self._journal.call(self._client.broker.ReportOrderEvents, request)

    async def _report_fills(self) -> None:
        venue = self._venue
        while reports := venue.fills[venue.reported : venue.reported + BATCH]:
            request = pb.ReportExecutionsRequest(reports=reports)
            await self._journal.call(self._client.broker.ReportExecutions, request)
            venue.reported += len(reports)


# --- Watchers -------------------------------------------------------------------------


class Watcher:
    """Follows all orders from the first on; fails at what should not come next."""

    def __init__(self, client: Client) -> None:
        self.events: list[bytes] = []
        self.orders: dict[str, pb.Order] = {}  # as they are by now
        self._states: dict[tuple[str, int], pb.Order] = {}  # by id and version
        self.executions: list[Fact] = []
        self.settled = 0  # orders
        self.ready = asyncio.Event()
        self.follower: Follower[pb.WatchOrdersResponse] = client.follow(
            client.order.WatchOrders, pb.WatchOrdersRequest()
        )

    async def run(self) -> None:
        async with self.follower as stream:
            async for response in stream:
                assert not response.orders, "it began before the first order"
                assert not response.event.HasField("gap")
                if response.event.HasField("snapshot_complete"):
                    self.ready.set()
                for event in response.events:
                    self._take(event)

    def state_of(self, order: pb.Order) -> pb.Order | None:
        """Return what was seen of an order at its version."""
        return self._states.get((order.order_id, order.version))

    def _take(self, event: pb.OrderEvent) -> None:
        order = event.order
        before = self.orders.get(order.order_id, pb.Order())
        assert event.revision == len(self.events) + 1, f"after {len(self.events)}"
        assert order.version == before.version + 1, f"{event} after {before}"
        if before.status in TERMINAL:
            assert event.type in FACTS, f"{event} after {before}"
        self.events.append(event.SerializeToString(deterministic=True))
        self.orders[order.order_id] = order
        self._states[order.order_id, order.version] = order
        if event.HasField("execution"):
            self.executions.append(_fact(event.execution))
        self.settled += is_settled(order)


# --- All of them ----------------------------------------------------------------------


class Trading:
    """Strategies on all servers; on each server a gateway and a watcher."""

    def __init__(self, *clients: Client, rate: int = RATE) -> None:
        self.rate = rate  # orders a second
        self.submitted = 0  # the number of the last order
        self.acknowledged = 0  # orders
        self.journal = Journal()
        self.clients = clients
        self.watchers = [Watcher(client) for client in clients]
        self.venues = [Venue() for _ in clients]
        self._group = asyncio.TaskGroup()
        self._gateways: list[asyncio.Task[None]] = []

    @property
    def settled(self) -> int:
        """Orders that all watchers saw the end of."""
        return min(watcher.settled for watcher in self.watchers)

    @property
    def reported(self) -> int:
        """Fills that were acknowledged."""
        return sum(venue.reported for venue in self.venues)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Trade while the block runs, then until every order is settled."""
        async with self._group as group:
            watching = [group.create_task(watcher.run()) for watcher in self.watchers]
            self._gateways = [self._gateway(number) for number in range(len(watching))]
            for watcher in self.watchers:
                await watcher.ready.wait()
            submitting = group.create_task(self._submit())
            try:
                yield
            finally:
                submitting.cancel()
            await until(self._is_settled, "all orders are settled")
            for task in (*watching, *self._gateways):
                task.cancel()

    def kill_gateway(self, number: int) -> None:
        """End a gateway wherever it is; another one begins, without a token."""
        self._gateways[number].cancel()
        self._gateways[number] = self._gateway(number)

    def _gateway(self, number: int) -> asyncio.Task[None]:
        client, venue = self.clients[number], self.venues[number]
        symbols = SYMBOLS[number :: len(self.clients)]
        gateway = Gateway(self.journal, client, venue, symbols)
        return self._group.create_task(gateway.run())

    def _is_settled(self) -> bool:
        return self.settled == self.submitted and all(
            venue.reported == len(venue.fills) for venue in self.venues
        )

    async def _submit(self) -> None:
        due, then = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            passed_s, then = time.monotonic() - then, time.monotonic()
            due = due % 1 + passed_s * self.rate
            for _ in range(min(int(due), OPEN - (self.submitted - self.settled))):
                self.submitted += 1
                self._group.create_task(self._trade(self.submitted))

    async def _trade(self, number: int) -> None:
        """Submit an order on one server; if it is to be, cancel it on another."""
        one, other = (self.clients[(number + n) % len(self.clients)] for n in (0, 1))
        new = new_order(number)
        submit = pb.SubmitOrderRequest(order=new)
        await self.journal.call(one.order.SubmitOrder, submit)
        self.acknowledged += 1
        if is_cancelled(number):
            name = pb.ClientOrderId(
                strategy_id=new.strategy_id, client_order_id=new.client_order_id
            )
            cancel = pb.CancelOrderRequest(client_order_id=name)
            await self.journal.call(other.order.CancelOrder, cancel)

    async def agrees(self) -> None:
        """Fail unless what is stored is what was told, and is as it should be."""
        print(f"{self.submitted} orders; failures: {dict(self.journal.failures)}")
        first, *others = self.watchers
        assert all(watcher.events == first.events for watcher in others)
        assert [o for o in self.journal.orders if first.state_of(o) != o] == []
        sent: Counter[str] = Counter()
        fills = []
        for venue in self.venues:
            sent += venue.sent
            fills += venue.fills
        assert sent == dict.fromkeys(first.orders, 1)
        assert sorted(first.executions) == sorted(map(_fact, fills))
        for client in self.clients:
            stored = await stored_orders(client)
            numbers = sorted(map(number_of, stored.values()))
            assert numbers == list(range(1, self.submitted + 1))
            assert stored == first.orders
            assert all(map(_is_as_it_should_be, stored.values()))
            await holds(client, fills)


def _is_as_it_should_be(order: pb.Order) -> bool:
    over = pb.ORDER_STATUS_FILLED
    if is_cancelled(number_of(order)):
        over = pb.ORDER_STATUS_CANCELLED
    known = order.HasField("submitted_at") and order.broker_order_id
    return bool(known and order.status == over and is_settled(order))


async def stored_orders(client: Client) -> dict[str, pb.Order]:
    """Return all orders by their ids; fail if one comes twice."""
    request = pb.ListOrdersRequest(page_size=PAGE)
    orders = await listed(client.order.ListOrders, request, "orders")
    stored = {order.order_id: order for order in orders}
    assert len(stored) == len(orders)
    return stored


async def holds(client: Client, fills: Sequence[pb.ExecutionReport]) -> None:
    """Fail unless exactly these fills are stored, with the positions they give."""
    request = pb.ListExecutionsRequest(page_size=PAGE)
    executions = await listed(client.order.ListExecutions, request, "executions")
    assert sorted(map(_fact, executions)) == sorted(map(_fact, fills))
    audit = await client.portfolio.AuditPositions(pb.AuditPositionsRequest())
    assert not audit.drifts
    assert audit.n_executions == len(fills)
    bought: dict[str, float] = defaultdict(float)
    paid = 0.0
    for fill in fills:
        signed = fill.quantity if fill.side == pb.SIDE_BUY else -fill.quantity
        bought[fill.symbol] += signed
        paid += signed * fill.price + fill.commission
    found = await client.portfolio.GetPortfolio(pb.GetPortfolioRequest())
    assert {p.symbol: p.quantity for p in found.positions} == bought
    assert found.summary.initial_cash - found.summary.cash == paid


async def listed(method: Any, request: Any, field: str) -> list[Any]:
    """Return what all pages of a list have."""
    rows: list[Any] = []
    while True:
        response = await method(request)
        rows += getattr(response, field)
        request.page_token = response.next_page_token
        if not request.page_token:
            return rows


def _fact(execution: pb.ExecutionReport | pb.Execution) -> Fact:
    return (
        *(execution.order_id, execution.broker_exec_id),
        *(execution.quantity, execution.price),
    )


# --- PostgreSQL -----------------------------------------------------------------------


async def slow_commits(dsn: str) -> None:
    """Have each commit wait before it is written, as for a slow disk."""
    connection = await asyncpg.connect(dsn)
    for setting in (f"commit_delay = {COMMIT_US}", "commit_siblings = 0"):
        database = urlsplit(dsn).path[1:]
        await connection.execute(f"ALTER DATABASE {database} SET {setting}")
    await connection.close()


async def kill_a_commit(dsn: str) -> None:
    """Send SIGKILL to a backend that is committing.

    PostgreSQL ends all others at once, for they share memory, and recovers.
    """
    pid = None
    while pid is None:
        with suppress(*UNAVAILABLE):  # it recovers from the last time
            pid = await _committing(dsn)
    os.kill(pid, signal.SIGKILL)


async def _committing(dsn: str) -> int | None:
    connection = await asyncpg.connect(dsn)
    try:
        pid: int | None = await connection.fetchval(
            """
            SELECT pid FROM pg_stat_activity
             WHERE datname = current_database() AND state = 'active'
               AND query = 'COMMIT;'
            """
        )
        return pid
    finally:
        connection.terminate()
