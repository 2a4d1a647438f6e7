"""The demo: a simulated feed, a strategy that trades it, and a live view of it all.

Everything here is an ordinary client; nothing knows how the server works.
"""

import asyncio
import logging
import math
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import grpc
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import TARGET
from quantplane.errors import describe
from quantplane.examples.moving_average import MovingAverageCross, Parameters

SEED = 7
QUOTES_PER_S, BATCHES_PER_S = 200, 40
MAX_LATE = 50  # quotes: a feed that was held back leaves out what is later
WINDOW_S = 5.0  # that rates and latencies are of
SILENT_S = 1.5  # without a quote, and the view says so
FRAMES_PER_S = 4
POINTS, POINT_S = 60, 0.5  # of a sparkline
LEVELS = "▁▂▃▄▅▆▇█"
HOLDS = {
    pb.HOLD_REASON_UNSPECIFIED: "none",
    pb.HOLD_REASON_BUS_FULL: "bus full",
    pb.HOLD_REASON_BUS_UNAVAILABLE: "bus away",
}
LIVE = (pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN)
TRADED = ("SPY", "NVDA")
FAST, SLOW = 30, 150  # quotes, of the strategy's averages
FIGURES = [16, 20, 20, 16]  # characters of a name and its value, in each group
COLUMNS = [  # name, characters, and how wide a terminal is to show it
    *(("symbol", 8, 0), ("bid", 10, 0), ("size", 6, 66), ("ask", 10, 0)),
    *(("size", 6, 66), ("last", 10, 48), ("change", 10, 0), ("/s", 5, 54)),
]


class Instrument(NamedTuple):
    symbol: str
    price: float  # to begin with
    tick: float
    digits: int
    volatility: float  # of a year, about
    lot: int
    activity: int  # relative to the others


INSTRUMENTS = [
    Instrument("SPY", 601.35, 0.01, 2, 0.16, 100, 5),
    Instrument("AAPL", 229.50, 0.01, 2, 0.28, 100, 3),
    Instrument("MSFT", 467.20, 0.01, 2, 0.24, 100, 3),
    Instrument("NVDA", 144.80, 0.01, 2, 0.50, 100, 4),
    Instrument("TSLA", 318.40, 0.01, 2, 0.60, 100, 3),
    Instrument("ES", 6_012.25, 0.25, 2, 0.16, 1, 4),
    Instrument("EUR/USD", 1.14235, 0.00001, 5, 0.08, 500_000, 2),
    Instrument("BTC-USD", 104_250.5, 0.5, 1, 0.55, 1, 2),
]
ACTIVITIES = [each.activity for each in INSTRUMENTS]


class Market:
    """A geometric random walk of every instrument; equal seeds walk alike."""

    def __init__(self, seed: int = SEED) -> None:
        self._random = random.Random(seed)
        self._fair = {each.symbol: each.price for each in INSTRUMENTS}
        self._last: dict[str, float] = {}

    def quote(self, time_ns: int) -> pb.Quote:
        """Move one instrument; return its quote, one to three ticks wide."""
        draw = self._random
        (each,) = draw.choices(INSTRUMENTS, ACTIVITIES)
        self._fair[each.symbol] *= math.exp(draw.gauss(0, each.volatility * 1e-4))
        ticks, spread = self._fair[each.symbol] / each.tick, draw.choice((1, 1, 2, 3))
        bid = math.floor(ticks - (spread - 1) / 2)
        quote = pb.Quote(
            symbol=each.symbol,
            bid=round(bid * each.tick, each.digits),
            ask=round((bid + spread) * each.tick, each.digits),
            bid_size=each.lot * draw.randint(1, 9),
            ask_size=each.lot * draw.randint(1, 9),
        )
        quote.time.FromNanoseconds(time_ns)
        if draw.random() < 0.15:
            self._last[each.symbol] = draw.choice((quote.bid, quote.ask))
            quote.volume = each.lot * draw.randint(1, 5)
        quote.last = self._last.setdefault(each.symbol, quote.bid)
        return quote


class Window:
    """The values of the last seconds."""

    def __init__(self) -> None:
        self._begun = monotonic()
        self._values: deque[tuple[float, float]] = deque()

    def add(self, value: float = 0.0) -> None:
        self._values.append((monotonic(), value))
        self._forget()

    def per_second(self) -> float:
        self._forget()
        span_s = min(WINDOW_S, monotonic() - self._begun)
        return len(self._values) / max(span_s, 0.2)

    def quantile(self, q: float) -> float | None:
        self._forget()
        values = sorted(value for _, value in self._values)
        return values[math.ceil(q * len(values)) - 1] if values else None

    def _forget(self) -> None:
        oldest = monotonic() - WINDOW_S
        while self._values and self._values[0][0] < oldest:
            self._values.popleft()


class Row:
    """What the follower knows of one symbol."""

    def __init__(self, first: pb.Quote) -> None:
        self.quote = first
        self.rate = Window()
        self.trend = 0.0  # which way the price of trades went last
        self._start = (first.bid + first.ask) / 2
        self._mids: deque[float] = deque(maxlen=POINTS)
        self._next_point = 0.0

    @property
    def change(self) -> float:
        """Of the mid since the start, in percent."""
        return round(100 * (self._mids[-1] / self._start - 1), 2)

    def take(self, quote: pb.Quote) -> None:
        self.trend = quote.last - self.quote.last or self.trend
        self.quote = quote
        self.rate.add()
        if monotonic() < self._next_point:
            self._mids.pop()
        else:
            self._next_point = monotonic() + POINT_S
        self._mids.append((quote.bid + quote.ask) / 2)

    def sparkline(self, width: int) -> str:
        mids = list(self._mids)[-width:]
        low, high = min(mids), max(mids)
        scale = (len(LEVELS) - 1) / ((high - low) or math.inf)
        return "".join(LEVELS[round((mid - low) * scale)] for mid in mids)


class Demo:
    """The feed and the follower, and how they fare."""

    def __init__(self, client: Client) -> None:
        self.target = client.target
        self.rows: dict[str, Row] = {}
        self.heard_s = self._started_s = monotonic()
        self._started_ns = time.time_ns()
        self._publisher = client.publish_quotes(feed="demo")
        request = pb.StreamQuotesRequest(symbols=[each.symbol for each in INSTRUMENTS])
        self._follower = client.follow(client.market_data.StreamQuotes, request)
        self._orders = client.follow(client.order.WatchOrders, pb.WatchOrdersRequest())
        self._portfolio = client.follow(
            client.portfolio.WatchPortfolio, pb.WatchPortfolioRequest()
        )
        self._sent = self._received = self._conflated = self._fills = 0
        self._sending, self._latency_ms, self._ordering = Window(), Window(), Window()
        self._live: set[str] = set()  # orders
        self._profit = 0.0
        self.positions: dict[str, pb.Position] = {}

    @property
    def uptime(self) -> timedelta:
        return timedelta(seconds=int(monotonic() - self._started_s))

    async def feed(self) -> None:
        """Publish until cancelled."""
        market, pace = Market(), random.Random(SEED)
        due, before = 0.0, monotonic()
        async with self._publisher:
            while True:
                await asyncio.sleep(pace.expovariate(BATCHES_PER_S))
                now = monotonic()
                due += min((now - before) * QUOTES_PER_S, MAX_LATE)
                before, count = now, int(due)
                due -= count
                if batch := [market.quote(time.time_ns()) for _ in range(count)]:
                    await self._publisher.send(batch)
                for _ in batch:
                    self._sending.add()
                self._sent += count

    def followers(self) -> list[Coroutine[Any, Any, None]]:
        return [self.follow(), self.follow_orders(), self.follow_portfolio()]

    async def follow(self) -> None:
        """Take what is published, until cancelled."""
        async for response in self._follower:
            now_ns = time.time_ns()
            self._conflated += response.conflated_count
            for quote in response.quotes:
                self.take(quote, now_ns)

    def take(self, quote: pb.Quote, now_ns: int) -> None:
        """Note a quote that arrived at `now_ns`."""
        quoted_ns = quote.time.ToNanoseconds()
        if quoted_ns < self._started_ns or quote.bid <= 0 or quote.ask <= 0:
            return  # an earlier demo's, or some other feed's
        self.heard_s = monotonic()
        self._received += 1
        self._latency_ms.add((now_ns - quoted_ns) / 1e6)
        if quote.symbol not in self.rows:
            self.rows[quote.symbol] = Row(quote)
        self.rows[quote.symbol].take(quote)

    async def follow_orders(self) -> None:
        """Count what becomes of orders, until cancelled."""
        async for response in self._orders:
            if response.event.HasField("gap"):
                self._live.clear()  # a snapshot follows
            self._live.update(order.order_id for order in response.orders)
            for event in response.events:
                self.take_order(event)

    def take_order(self, event: pb.OrderEvent) -> None:
        if event.order.status in LIVE:
            self._live.add(event.order.order_id)
        else:
            self._live.discard(event.order.order_id)
        if event.type == pb.ORDER_EVENT_TYPE_CREATED:
            self._ordering.add()
        self._fills += event.type == pb.ORDER_EVENT_TYPE_TRADE

    async def follow_portfolio(self) -> None:
        """Keep the positions of the account, until cancelled."""
        async for response in self._portfolio:
            self.take_portfolio(response)

    def take_portfolio(self, response: pb.WatchPortfolioResponse) -> None:
        if response.HasField("summary"):
            self._profit = response.summary.total_pnl
        for position in response.positions:
            self.positions[position.symbol] = position

    def figures(self) -> list[tuple[str, str]]:
        """Return (name, value) of what tells how it goes, in groups of four."""
        accepted = self._publisher.accepted_through
        durable = self._publisher.durable_through
        followers = (self._follower, self._orders, self._portfolio)
        reconnects = sum(each.reconnects for each in (self._publisher, *followers))
        return [
            ("in", f"{self._sending.per_second():,.0f}/s"),
            ("received", f"{self._latency_ms.per_second():,.0f}/s"),
            ("conflated", f"{self._conflated:,}"),
            ("orders", f"{self._ordering.per_second():,.1f}/s"),
            ("latency p50", _duration(self._latency_ms.quantile(0.5))),
            ("latency p99", _duration(self._latency_ms.quantile(0.99))),
            ("latency max", _duration(self._latency_ms.quantile(1))),
            ("fills", f"{self._fills:,}"),
            ("accepted", f"{accepted:,}"),
            ("durable", f"{durable:,}"),
            ("recorder lag", f"{accepted - durable:,}"),
            ("open orders", f"{len(self._live):,}"),
            ("reconnects", f"{reconnects}"),
            ("gaps", f"{sum(follower.gaps for follower in followers)}"),
            ("hold", HOLDS.get(self._publisher.hold, "yes")),
            ("P&L", f"{self._profit:+,.2f}"),
        ]

    def summary(self) -> str:
        return (
            f"demo: {self._sent:,} quotes sent, {self._received:,} received in "
            f"{self.uptime}; {self._conflated:,} conflated, {self._follower.gaps} gaps;"
            f" {self._fills:,} fills, P&L {self._profit:+,.2f}"
        )


class LogLines(logging.Handler):
    """The latest log records, as lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=8)
        self.errors: deque[logging.LogRecord] = deque(maxlen=20)

    def emit(self, record: logging.LogRecord) -> None:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = " ".join(record.getMessage().split())
        self.lines.append(f"{at} {record.levelname[0]} {text}")
        if record.levelno >= logging.ERROR:
            self.errors.append(record)


@contextmanager
def log_lines() -> Iterator[LogLines]:
    """Keep log records off the terminal; errors reach it once the block has ended."""
    root, lines = logging.getLogger(), LogLines()
    handlers, root.handlers = root.handlers, [lines]
    try:
        yield lines
    finally:
        root.handlers = handlers
        for record in lines.errors:
            logging.getLogger(record.name).handle(record)


class View:
    """The demo as one screen; what matters least is lowest, where it is cut off."""

    def __init__(self, demo: Demo, log: LogLines) -> None:
        self._demo = demo
        self._log = log

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        width = options.max_width
        above = [self._title(width), *self._table(width), _rule(width)]
        above += [*self._figures(width), self._positions()]
        below = _footer(self._demo.target, width)
        room = max(1, console.height - len(above) - len(below))
        log = [
            Text(line, "yellow", overflow="ellipsis") for line in self._log.lines
        ] or [Text()]
        for line in [*above, *log[-room:]]:
            line.no_wrap = True
            yield line
        yield from below

    def _title(self, width: int) -> Text:
        silent_s = monotonic() - self._demo.heard_s
        alive = silent_s < SILENT_S
        title = Text.assemble(
            ("● ", "green" if alive else "red"),
            ("quantplane", "bold"),
            (f"  {self._demo.target}", "cyan"),
            ("" if alive else f"  no quotes for {silent_s:.0f} s", "red"),
        )
        uptime = f"up {self._demo.uptime}"
        return title.append(uptime.rjust(width - title.cell_len), "dim")

    def _table(self, width: int) -> Iterator[Text]:
        room = width - sum(cell for _, cell, least in COLUMNS if width >= least) - 3
        chart = min(room, POINTS) if room >= 8 else 0
        heading = _line([(name, "dim") for name, _, _ in COLUMNS], width)
        yield heading.append("   mid" if chart else "", "dim")
        for each in INSTRUMENTS:
            if row := self._demo.rows.get(each.symbol):
                line = _line(_cells(each, row), width)
                yield line.append(f"   {row.sparkline(chart)}" if chart else "", "cyan")
            else:
                yield Text(each.symbol, "dim")

    def _figures(self, width: int) -> Iterator[Text]:
        """Lay out the groups side by side; half of them where there is no room."""
        figures = self._demo.figures()
        abreast = 4 if width >= sum(FIGURES) + 6 else 2
        gap = Text(" " * max(2, min((width - sum(FIGURES)) // 3, 6)))
        for first in range(0, 4, abreast):
            for line in range(4):
                yield gap.join(
                    _figure(*figures[4 * group + line], FIGURES[group])
                    for group in range(first, first + abreast)
                )

    def _positions(self) -> Text:
        """Show the open ones, the largest first; what has no room is cut off."""
        positions = [each for each in self._demo.positions.values() if each.quantity]
        line = Text("positions", "dim", overflow="ellipsis")
        for each in sorted(positions, key=lambda p: abs(p.value), reverse=True):
            profit = each.realized_pnl + each.unrealized_pnl
            line.append(f"  {each.symbol}", "bold")
            line.append(f" {each.quantity:+,.0f}", "")
            line.append(f" {profit:+,.2f}", _colour(profit))
        return line


def _cells(instrument: Instrument, row: Row) -> list[tuple[str, str]]:
    """Return (text, style) for each column."""
    quote, change = row.quote, row.change
    prices = (quote.bid, quote.ask, quote.last)
    bid, ask, last = (f"{price:,.{instrument.digits}f}" for price in prices)
    arrow = "▲ " if change > 0 else "▼ " if change < 0 else ""
    return [
        (instrument.symbol, "bold"),
        (bid, ""),
        (_units(quote.bid_size), "dim"),
        (ask, ""),
        (_units(quote.ask_size), "dim"),
        (last, _colour(row.trend)),
        (f"{arrow}{abs(change):.2f}%", _colour(change)),
        (f"{row.rate.per_second():.0f}", "dim"),
    ]


def _line(cells: list[tuple[str, str]], width: int) -> Text:
    line = Text()
    for (text, style), (_, cell, least) in zip(cells, COLUMNS, strict=True):
        if width >= least:
            line.append(text.rjust(cell) if line else text.ljust(cell), style)
    return line


def _figure(name: str, value: str, width: int) -> Text:
    return Text.assemble((name, "dim"), value.rjust(width - len(name)))


def _footer(target: str, width: int) -> list[Text]:
    shell, python = connect_lines(target)
    return [
        _rule(width, "connect from another terminal"),
        *map(Text, shell),
        _rule(width, f"or from {_installed('python')}"),
        *map(Text, python),
    ]


def connect_lines(target: str) -> tuple[list[str], list[str]]:
    """Return what a newcomer types in a shell, and what in Python."""
    command, known = _installed("quantplane"), target == TARGET
    option, argument = ("", "") if known else (f" --target {target}", f'"{target}"')
    return [
        f"{command} quotes watch SPY NVDA{option}",
        f"{command} orders watch{option}",
        f"{command} portfolio --watch{option}",
    ], [
        f"from quantplane import sync, v1 as pb; client = sync.Client({argument})",
        'client.market_data.GetLatestQuotes(pb.GetLatestQuotesRequest(symbols=["SPY"]))',
    ]


def _installed(name: str) -> str:
    """Return how to call what is installed beside this Python, from this folder."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return os.path.relpath(path) if Path.cwd() in path.parents else str(path)


def _rule(width: int, title: str = "") -> Text:
    line = f"── {title} " if title else ""
    return Text(line.ljust(width, "─"), "dim")


def _units(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1e6:g}M" if count >= 1_000_000 else f"{count / 1e3:g}k"


def _colour(direction: float) -> str:
    return "green" if direction > 0 else "red" if direction < 0 else ""


def _duration(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f} ms" if ms < 1_000 else f"{ms / 1e3:.1f} s"


async def run(
    target: str, console: Console | None = None, api_key: str | None = None
) -> None:
    """Run the demo against the server at `target` until cancelled.

    On a terminal it fills the screen; elsewhere it prints a line a second. Raises
    RuntimeError if the server refuses the feed or a follower.
    """
    if console is None:
        console = Console(force_interactive=None if sys.stdout.isatty() else False)
    show = _draw if console.is_interactive and not console.options.ascii_only else _tell
    async with Client(target, token=api_key) as client:
        demo = Demo(client)
        try:
            with _in_words("the demo"):
                async with asyncio.TaskGroup() as group:
                    for work in (demo.feed(), *demo.followers(), show(demo, console)):
                        group.create_task(work)
        finally:
            _print(console, demo.summary())


async def trade(target: str, started_s: int) -> None:
    """Run the strategy of the demo that started at this Unix time, until cancelled.

    Raises RuntimeError if the server refuses it.
    """
    start = datetime.fromtimestamp(started_s, UTC)
    parameters = Parameters(
        *(TRADED, start, FAST, SLOW), strategy_id=f"demo {start:%Y-%m-%d %H:%M:%S}"
    )
    async with Client(target) as client:
        with _in_words("the demo's strategy"):
            await MovingAverageCross(client, parameters).run()


@contextmanager
def _in_words(who: str) -> Iterator[None]:
    """Turn a server's refusal of one of several tasks into a RuntimeError."""
    try:
        yield
    except* grpc.aio.AioRpcError as refused:
        error = refused.exceptions[0]
        assert isinstance(error, grpc.aio.AioRpcError)
        raise RuntimeError(f"{who} was refused: {describe(error)}") from None


async def _draw(demo: Demo, console: Console) -> None:
    with log_lines() as log:
        view = View(demo, log)
        with Live(view, console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.refresh()
                await asyncio.sleep(1 / FRAMES_PER_S)


async def _tell(demo: Demo, console: Console) -> None:
    while True:
        await asyncio.sleep(1)
        status = ", ".join(f"{name} {value}" for name, value in demo.figures())
        _print(console, f"demo: {status}")


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
