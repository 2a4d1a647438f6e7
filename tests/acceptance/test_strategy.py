"""The whole loop, of processes: a recorded evening of ticks is published, a strategy
trades it, a paper broker fills the orders. What is then stored is what the file gives.
"""

import asyncio
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest

from quantplane import Client
from quantplane import v1 as pb
from tests import acceptance
from tests.acceptance import PATIENCE_S, Tick, needs_data, stamp
from tests.faults import REPOSITORY, Server

pytestmark = needs_data
SYMBOL, STRATEGY = "EURUSD", "crosses"
COUNT = 4_500  # ticks
BATCH, PAUSE_S = 20, 0.01
FAST, SLOW, QUANTITY = 20, 100, 1_000.0
BPS = 0.2
LONG, SHORT = pb.SIGNAL_TYPE_LONG, pb.SIGNAL_TYPE_SHORT
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@cache
def ticks() -> list[Tick]:
    """Return what is published: of late, or retention would take it."""
    read = acceptance.ticks()[:COUNT]
    shift = datetime.now(UTC).date() - timedelta(days=2) - read[0].time.date()
    return [tick._replace(time=tick.time + shift) for tick in read]


class Process:
    """A Python module as a process, which can be killed and started again."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, "-m", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Process":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )

    def kill(self) -> None:
        assert self._process
        assert self._process.poll() is None, "it ended by itself"
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


class Desk(NamedTuple):
    server: Server
    strategy: Process
    broker: Process

    async def restart(self, what: str) -> None:
        if what == "server":
            await self.server.kill()
            await self.server.start()
        else:
            getattr(self, what).restart()


@contextmanager
def desk(server: Server) -> Iterator[Desk]:
    """Run the strategy and the paper broker while the block runs."""
    start, to = f"{ticks()[0].time:%Y-%m-%dT%H:%M:%S}", ("--target", server.target)
    terms = ("--fast", str(FAST), "--slow", str(SLOW), "--quantity", str(QUANTITY))
    strategy = Process(
        *("quantplane.examples.moving_average", SYMBOL, *terms),
        *("--start", start, "--strategy", STRATEGY, *to),
    )
    fee = ("--commission-bps", str(BPS))
    with Process("quantplane_server", "paper", *fee, *to) as broker, strategy:
        yield Desk(server, strategy, broker)


async def publish(client: Client, run: Desk, kills: dict[int, str]) -> None:
    """Publish the ticks; kill and restart at the tick's number what `kills` says."""
    async with client.publish_quotes(feed="ticks") as publisher:
        for first in range(0, COUNT, BATCH):
            following = ticks()[first : first + BATCH]
            await publisher.send([quote(tick) for tick in following])
            await asyncio.sleep(PAUSE_S)  # the market's pace, which the broker needs
            if what := kills.get(first):
                await run.restart(what)
        await publisher.durable()


def quote(tick: Tick) -> pb.Quote:
    made = pb.Quote(symbol=SYMBOL, bid=tick.bid, ask=tick.ask)
    made.time.CopyFrom(stamp(tick.time))
    return made


def expected_signals() -> list[tuple[datetime, int]]:
    """Return time and type of each cross, by sums of whole points."""
    mids = [round(tick.bid * 1e5) + round(tick.ask * 1e5) for tick in ticks()]
    sums = [0, *accumulate(mids)]
    sides = []  # the tick, and which way the averages differ there
    for end in range(SLOW, COUNT + 1):
        fast, slow = sums[end] - sums[end - FAST], sums[end] - sums[end - SLOW]
        if fast * SLOW != slow * FAST:
            sides.append((ticks()[end - 1].time, fast * SLOW > slow * FAST))
    return [
        (time, LONG if above else SHORT)
        for (_, before), (time, above) in pairwise(sides)
        if above != before
    ]


async def all_filled(client: Client, count: int) -> list[pb.Order]:
    """Return the orders once there are so many and all are filled."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        response = await client.order.ListOrders(pb.ListOrdersRequest(page_size=10_000))
        filled = sum(o.status == pb.ORDER_STATUS_FILLED for o in response.orders)
        if filled == len(response.orders) >= count:
            return list(response.orders)
        assert time.monotonic() < deadline, f"{filled} of {count} orders are filled"
        await asyncio.sleep(0.1)


async def executions(client: Client) -> list[pb.Execution]:
    """Return all, in the order in which they were booked."""
    request = pb.ListExecutionsRequest(page_size=10_000)
    response = await client.order.ListExecutions(request)
    return sorted(response.executions, key=lambda each: each.execution_id)


def check_fills(orders: list[pb.Order], fills: list[pb.Execution]) -> None:
    """Fail unless fills are at quotes of the file, and add up to their orders."""
    quotes = {int((t.time - EPOCH).total_seconds() * 1e3): t for t in ticks()}
    of_order: dict[str, list[pb.Execution]] = defaultdict(list)
    for fill in fills:
        of_order[fill.order_id].append(fill)
        at_ns = int(fill.broker_exec_id.partition("@")[2])
        named = quotes[at_ns // 10**6]
        assert fill.time.ToNanoseconds() == at_ns
        assert fill.price == (named.ask if fill.side == pb.SIDE_BUY else named.bid)
        assert fill.commission == pytest.approx(fill.quantity * fill.price * BPS / 1e4)
    for order in orders:
        booked = of_order.pop(order.order_id)
        numbers = [int(fill.broker_exec_id.partition("@")[0]) for fill in booked]
        assert numbers == list(range(1, len(booked) + 1))
        assert sum(fill.quantity for fill in booked) == order.quantity
    assert not of_order


class Account(NamedTuple):
    quantity: float = 0.0
    average_cost: float = 0.0
    realized: float = 0.0
    cash: float = 0.0

    def after(self, fill: pb.Execution) -> "Account":
        """Return the account by average cost after a fill."""
        signed = fill.quantity if fill.side == pb.SIDE_BUY else -fill.quantity
        quantity, cost, realized = self.quantity + signed, self.average_cost, 0.0
        if self.quantity * signed >= 0:
            notional = self.quantity * cost + signed * fill.price
            cost = notional / quantity
        else:
            closed = min(abs(signed), abs(self.quantity))
            gain = fill.price - cost
            realized = closed * (gain if self.quantity > 0 else -gain)
            if self.quantity * quantity <= 0:
                cost = fill.price if quantity else 0.0
        return Account(
            quantity,
            cost,
            self.realized + realized - fill.commission,
            self.cash - signed * fill.price - fill.commission,
        )


async def check_portfolio(client: Client, fills: list[pb.Execution]) -> None:
    """Fail unless positions, cash and P&L are what the executions give."""
    account = Account()
    for fill in fills:
        account = account.after(fill)
    last = ticks()[-1]
    value = account.quantity * (last.bid + last.ask) / 2
    for strategy_id in ("", STRATEGY):
        request = pb.GetPortfolioRequest(strategy_id=strategy_id)
        portfolio = await client.portfolio.GetPortfolio(request)
        (position,), summary = portfolio.positions, portfolio.summary
        assert position.quantity == pytest.approx(account.quantity)
        assert position.average_cost == pytest.approx(account.average_cost)
        assert position.realized_pnl == pytest.approx(account.realized)
        assert summary.cash - summary.initial_cash == pytest.approx(account.cash)
        assert summary.total_pnl == pytest.approx(account.cash + value)
    audit = await client.portfolio.AuditPositions(pb.AuditPositionsRequest())
    assert (list(audit.drifts), audit.n_executions) == ([], len(fills))


KILLS = {
    "nothing is killed": {},
    "all are killed": {
        1_000: "strategy",
        1_500: "server",
        2_200: "broker",
        2_800: "server",
        3_200: "broker",
        3_800: "strategy",
    },
}


@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS.keys())
async def test_a_strategy_trades_each_cross_of_the_file_once(
    dsn: str, redis_url: str, kills: dict[int, str]
):
    wanted = expected_signals()
    server = Server(dsn, redis_url, {"maintenance_s": 3600})
    try:
        await server.start()
        with desk(server) as run:
            async with Client(server.target) as client:
                await publish(client, run, kills)
                orders = await all_filled(client, len(wanted))
                request = pb.ListSignalsRequest(page_size=10_000)
                listed = (await client.signal.ListSignals(request)).signals
                fills = await executions(client)
                await check_portfolio(client, fills)
    finally:
        await server.close()
    signals = sorted(listed, key=lambda signal: signal.time.ToNanoseconds())
    found = [(s.time.ToDatetime(tzinfo=UTC), s.signal_type) for s in signals]
    assert found == wanted
    assert len(wanted) > 50
    check_orders(signals, orders)
    check_fills(orders, fills)


def check_orders(signals: list[Any], orders: list[pb.Order]) -> None:
    """Fail unless each signal has its one order, which turns the position round."""
    named = {order.signal_id: order for order in orders}
    assert len(named) == len(orders) == len(signals)
    for number, signal in enumerate(signals):
        order = named[signal.signal_id]
        side = pb.SIDE_BUY if signal.signal_type == LONG else pb.SIDE_SELL
        quantity = 2 * QUANTITY if number else QUANTITY
        assert (order.side, order.quantity) == (side, quantity)
        assert signal.status == pb.SIGNAL_STATUS_EXECUTED
