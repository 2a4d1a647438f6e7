"""A strategy: trades where a fast moving average of the mid crosses a slow one.

    python -m quantplane.examples.moving_average SPY NVDA --fast 20 --slow 100

It reads every quote from its start time on: first the recorded ones, then live ones,
without hole or duplicate. Where the fast average crosses above the slow one it goes
long, where it crosses below it goes short, each time by a signal and a market order
that names it.

It trades each cross once, however often it is killed and started again, and keeps
nothing on disk for it: run again with the same start time it reads the same quotes,
finds the same crosses, and publishes and submits the same, which changes nothing of
what is there. For that, everything in a signal and its order follows from the quotes,
and their names too. (A feed whose quotes of a symbol share a microsecond, or come out
of the order of their times, is recorded otherwise than it came.)
"""

import argparse
import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import grpc

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane.errors import describe
from quantplane.retry import answered

LONG, SHORT = 1, -1
REPORT_S = 5.0


class MovingAverage:
    """Of the latest values. Sums of decimals are exact, so they may run on for ever."""

    def __init__(self, length: int) -> None:
        self._values: deque[Decimal] = deque(maxlen=length)
        self._sum = Decimal(0)

    def add(self, value: Decimal) -> Decimal | None:
        """Return the average once there are enough values."""
        full = len(self._values) == self._values.maxlen
        self._sum += value - (self._values[0] if full else 0)
        self._values.append(value)
        if len(self._values) < (self._values.maxlen or 0):
            return None
        return self._sum / len(self._values)


class Crosses:
    """Tells where the fast average of a symbol's mids crosses the slow one."""

    def __init__(self, fast: int, slow: int) -> None:
        self._fast = MovingAverage(fast)
        self._slow = MovingAverage(slow)
        self._side = 0  # of the slow average that the fast one was on last

    def add(self, mid: Decimal) -> int:
        """Return LONG or SHORT where there is a cross, else 0."""
        fast, slow = self._fast.add(mid), self._slow.add(mid)
        if fast is None or slow is None or fast == slow:
            return 0
        before, self._side = self._side, LONG if fast > slow else SHORT
        return self._side if before == -self._side else 0


@dataclass(frozen=True)
class Parameters:
    """What there is to choose. `fast` and `slow` count quotes."""

    symbols: Sequence[str]
    start: datetime  # of the quotes; with its time zone
    fast: int = 20
    slow: int = 100
    quantity: float = 100.0
    strategy_id: str = "moving-average"


class MovingAverageCross:
    """The strategy: reads quotes, publishes signals, submits orders."""

    def __init__(self, client: Client, parameters: Parameters) -> None:
        self._client = client
        self._parameters = parameters
        self._crosses: dict[str, Crosses] = {}
        self._traded: set[str] = set()  # symbols, which are long or short since

    async def run(self) -> None:
        """Trade until cancelled."""
        async with asyncio.TaskGroup() as group:
            for work in (self._trade(), self._tell_fills(), self._tell_profit()):
                group.create_task(work)

    async def _trade(self) -> None:
        request = pb.StreamQuotesRequest(
            symbols=self._parameters.symbols, delivery=pb.DELIVERY_LOSSLESS
        )
        request.start_time.FromDatetime(self._parameters.start)
        stream = self._client.market_data.StreamQuotes
        while True:  # once more from the start if quotes were missed
            self._crosses.clear()
            self._traded.clear()
            async with self._client.follow(stream, request) as responses:
                async for response in responses:
                    if response.event.HasField("gap"):
                        break
                    for quote in response.quotes:
                        if decision := self.decide(quote):
                            await self._act(*decision)

    def decide(self, quote: pb.Quote) -> tuple[pb.Signal, pb.NewOrder] | None:
        """Return a signal and its order where the quote makes the averages cross."""
        if not (quote.HasField("bid") and quote.HasField("ask")):
            return None
        mid = (Decimal(str(quote.bid)) + Decimal(str(quote.ask))) / 2
        if quote.symbol not in self._crosses:
            fast, slow = self._parameters.fast, self._parameters.slow
            self._crosses[quote.symbol] = Crosses(fast, slow)
        if not (side := self._crosses[quote.symbol].add(mid)):
            return None
        decision = self._signal(quote, side), self._order(quote, side)
        self._traded.add(quote.symbol)
        return decision

    def _signal(self, quote: pb.Quote, side: int) -> pb.Signal:
        signal = pb.Signal(
            signal_id=self._name(quote, side),
            strategy_id=self._parameters.strategy_id,
            symbol=quote.symbol,
            signal_type=pb.SIGNAL_TYPE_LONG if side == LONG else pb.SIGNAL_TYPE_SHORT,
            strength=1.0,
            confidence=0.5,
        )
        signal.time.FromMicroseconds(quote.time.ToMicroseconds())
        return signal

    def _order(self, quote: pb.Quote, side: int) -> pb.NewOrder:
        name, quantity = self._name(quote, side), self._parameters.quantity
        return pb.NewOrder(
            client_order_id=name,
            strategy_id=self._parameters.strategy_id,
            signal_id=name,
            symbol=quote.symbol,
            side=pb.SIDE_BUY if side == LONG else pb.SIDE_SELL,
            order_type=pb.ORDER_TYPE_MARKET,
            # from long to short, or back, takes twice as much
            quantity=2 * quantity if quote.symbol in self._traded else quantity,
        )

    def _name(self, quote: pb.Quote, side: int) -> str:
        """Return the UUID of a cross. The database keeps microseconds of a time."""
        parts = (
            self._parameters.strategy_id,
            quote.symbol,
            quote.time.ToMicroseconds(),
            "LONG" if side == LONG else "SHORT",
        )
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(map(str, parts))))

    async def _act(self, signal: pb.Signal, order: pb.NewOrder) -> None:
        publish = pb.PublishSignalsRequest(signals=[signal])
        submit = pb.SubmitOrderRequest(order=order)
        await answered(self._client.signal.PublishSignals, publish)
        try:
            response = await answered(self._client.order.SubmitOrder, submit)
        except grpc.aio.AioRpcError as error:
            if reason_of(error) != "RISK_LIMIT":
                raise
            say("refused", signal.symbol, describe(error))
            return
        if not response.duplicate:
            kind = pb.SignalType.Name(signal.signal_type).removeprefix("SIGNAL_TYPE_")
            say("signal", signal.symbol, f"{kind} {order.quantity:g}")

    async def _tell_fills(self) -> None:
        request = pb.WatchOrdersRequest()
        request.filter.strategy_ids.append(self._parameters.strategy_id)
        async for response in self._client.follow(
            self._client.order.WatchOrders, request
        ):
            for event in response.events:
                if event.type == pb.ORDER_EVENT_TYPE_TRADE:
                    fill = event.execution
                    side = "bought" if fill.side == pb.SIDE_BUY else "sold"
                    say("fill", fill.symbol, f"{side} {fill.quantity:g} {fill.price:g}")

    async def _tell_profit(self) -> None:
        request = pb.GetPortfolioRequest(strategy_id=self._parameters.strategy_id)
        while True:
            await asyncio.sleep(REPORT_S)
            portfolio = await answered(self._client.portfolio.GetPortfolio, request)
            for each in portfolio.positions:
                profit = each.realized_pnl + each.unrealized_pnl
                say("position", each.symbol, f"{each.quantity:+g}, P&L {profit:+,.2f}")


def say(what: str, symbol: str, text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {what:<8} {symbol:<8} {text}", flush=True)


def parsed() -> tuple[str | None, Parameters]:
    """Return the target and the parameters that the command line gives."""
    parser = argparse.ArgumentParser(description="Trades crosses of moving averages.")
    parser.add_argument("symbols", nargs="+", metavar="SYMBOL")
    parser.add_argument("--fast", type=int, default=20, help="quotes")
    parser.add_argument("--slow", type=int, default=100, help="quotes")
    parser.add_argument("--quantity", type=float, default=100.0, help="long or short")
    parser.add_argument("--strategy", default="moving-average", metavar="ID")
    parser.add_argument("--start", metavar="TIME", help="ISO; omitted: now")
    parser.add_argument("--target", metavar="HOST:PORT")
    given = parser.parse_args()
    if not 0 < given.fast < given.slow:
        parser.error("--fast must be above 0 and below --slow")
    start = datetime.fromisoformat(given.start) if given.start else datetime.now(UTC)
    return given.target, Parameters(
        given.symbols,
        start if start.tzinfo else start.replace(tzinfo=UTC),
        given.fast,
        given.slow,
        given.quantity,
        given.strategy,
    )


async def main(target: str | None, parameters: Parameters) -> None:
    async with Client(target) as client:
        await MovingAverageCross(client, parameters).run()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname).1s %(message)s")
    asyncio.run(main(*parsed()))
