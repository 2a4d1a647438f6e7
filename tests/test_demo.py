"""The demo against a real server: what it publishes, shows, and leaves behind."""

import asyncio
import io
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from rich.console import Console

import quantplane
from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import TARGET
from quantplane_server import demo
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from quantplane_server.paper import broker as paper
from quantplane_server.paper.book import Commission
from tests.conftest import Server

SYMBOLS = [each.symbol for each in demo.INSTRUMENTS]
ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"
OURS = {Path(demo.__file__), *Path(quantplane.__file__).parent.glob("*.py")}


class Screen(io.StringIO):
    """A console's file, on which a test awaits what it wants to see."""

    def __init__(self) -> None:
        super().__init__()
        self._written = asyncio.Event()

    def write(self, text: str) -> int:
        self._written.set()
        return super().write(text)

    async def until(self, seen: Callable[[str], object]) -> str:
        """Return everything written since the last call, once `seen` is true of it."""
        while not seen(self.getvalue()):
            self._written.clear()
            await self._written.wait()
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


def plain(screen: Screen) -> Console:
    return Console(file=screen)


def terminal(screen: Screen) -> Console:
    return Console(
        file=screen, force_terminal=True, force_interactive=True, width=80, height=24
    )


@asynccontextmanager
async def running(target: str, console: Console) -> AsyncIterator[None]:
    task = asyncio.create_task(demo.run(target, console))
    try:
        yield
    finally:
        task.cancel()
        async with asyncio.timeout(2):
            with suppress(asyncio.CancelledError):
                await task


def figure(name: str, text: str) -> float:
    """Return the figure of this name in the last status line, without its unit."""
    found = re.findall(rf"\b{name} ([\d,.]+)", text)
    return float(found[-1].replace(",", "")) if found else 0


def flows(text: str) -> bool:
    return figure("in", text) > 0 and figure("received", text) > 0


def tasks_of_ours() -> list[asyncio.Task[object]]:
    return [
        task
        for task in asyncio.all_tasks()
        if (code := getattr(task.get_coro(), "cr_code", None))
        and Path(code.co_filename) in OURS
    ]


async def view(target: str, width: int, height: int, log: demo.LogLines) -> list[str]:
    """Return the lines of a view of a thousand quotes, each 1.5 ms old, and a fill."""
    market, screen = demo.Market(), io.StringIO()
    async with Client(target) as client:
        state = demo.Demo(client)
        for _ in range(1_000):
            now_ns = time.time_ns()
            state.take(market.quote(now_ns), now_ns + 1_500_000)
        for number in range(3):
            state.take_order(order_event("CREATED", number, pb.ORDER_STATUS_PENDING))
        state.take_order(order_event("TRADE", 0, pb.ORDER_STATUS_FILLED))
        state.take_portfolio(portfolio())
        Console(file=screen, width=width, height=height).print(demo.View(state, log))
    return screen.getvalue().splitlines()


def order_event(
    kind: str, number: int, status: pb.OrderStatus.ValueType
) -> pb.OrderEvent:
    order = pb.Order(order_id=str(number), status=status)
    return pb.OrderEvent(type=f"ORDER_EVENT_TYPE_{kind}", order=order)


def portfolio() -> pb.WatchPortfolioResponse:
    positions = [
        pb.Position(symbol="SPY", quantity=100, value=60_000, unrealized_pnl=-12.5),
        pb.Position(symbol="NVDA", quantity=-500, value=-72_000, realized_pnl=1_250),
        pb.Position(symbol="TSLA", realized_pnl=7),
    ]
    summary = pb.PortfolioSummary(total_pnl=1_244.5)
    return pb.WatchPortfolioResponse(summary=summary, positions=positions)


# --- the market ---------------------------------------------------------------


def test_a_seed_determines_the_market():
    first, second, other = demo.Market(1), demo.Market(1), demo.Market(2)
    quotes = [first.quote(n) for n in range(500)]
    assert quotes == [second.quote(n) for n in range(500)]
    assert quotes != [other.quote(n) for n in range(500)]


def test_quotes_are_plausible():
    market, ticks = demo.Market(), {each.symbol: each for each in demo.INSTRUMENTS}
    for n in range(20_000):
        quote = market.quote(n)
        each = ticks[quote.symbol]
        assert 0 < each.price / 2 < quote.bid < quote.ask < each.price * 2
        assert 1 <= round((quote.ask - quote.bid) / each.tick, 6) <= 3
        for price in (quote.bid, quote.ask, quote.last):
            assert price / each.tick == pytest.approx(round(price / each.tick))
        assert quote.bid_size > 0 and quote.ask_size > 0
        assert quote.HasField("last")
        assert not quote.HasField("volume") or quote.volume > 0


# --- against a server ---------------------------------------------------------


async def test_without_a_terminal_it_prints_a_status_line_a_second(
    server: Server, client: Client
):
    screen = Screen()
    async with running(server.target, plain(screen)):
        text = await screen.until(flows)
        latest = await client.market_data.GetLatestQuotes(
            pb.GetLatestQuotesRequest(symbols=SYMBOLS)
        )
    assert not latest.unknown_symbols
    assert all(quote.bid < quote.ask for quote in latest.quotes)
    assert "\x1b" not in text
    assert figure("latency p50", text) > 0
    assert figure("accepted", text) >= figure("durable", text)
    assert "hold none" in text
    assert all(line.startswith("demo: in ") for line in text.splitlines())
    summary = await screen.until(bool)
    assert re.fullmatch(r"demo: [\d,]+ quotes sent, [\d,]+ received in .*\n", summary)


async def test_what_is_ordered_and_filled_is_counted(server: Server, client: Client):
    screen = Screen()
    broker = asyncio.create_task(paper.run(server.target, paper.Terms(Commission())))
    async with running(server.target, plain(screen)):
        await screen.until(flows)
        order = pb.NewOrder(
            client_order_id="1",
            strategy_id="test",
            symbol="SPY",
            side=pb.SIDE_BUY,
            order_type=pb.ORDER_TYPE_MARKET,
            quantity=10,
        )
        await client.order.SubmitOrder(pb.SubmitOrderRequest(order=order))
        text = await screen.until(lambda text: figure("fills", text) == 1)
    broker.cancel()
    assert figure("0, orders", text) > 0  # the last of before is what is conflated
    assert figure("open orders", text) == 0


async def test_the_demos_strategy_publishes_signals_and_trades_them(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo, "FAST", 2)
    monkeypatch.setattr(demo, "SLOW", 4)
    screen = Screen()
    trading = asyncio.create_task(demo.trade(server.target, int(time.time())))
    async with running(server.target, plain(screen)):
        await screen.until(lambda text: figure("open orders", text) >= 3)
        listed = await client.signal.ListSignals(pb.ListSignalsRequest())
    trading.cancel()
    assert {signal.symbol for signal in listed.signals} <= set(demo.TRADED)
    assert len(listed.signals) >= 3


async def test_it_leaves_no_task_behind(server: Server):
    screen = Screen()
    async with running(server.target, plain(screen)):
        await screen.until(flows)
        assert tasks_of_ours()
    assert not tasks_of_ours()


async def test_it_can_be_cancelled_before_it_is_connected():
    screen = Screen()
    async with running("127.0.0.1:1", plain(screen)):
        await screen.until(lambda text: "in 0/s" in text)
    assert not tasks_of_ours()


async def test_it_goes_on_after_a_restart_of_the_server(settings: Settings):
    screen = Screen()
    async with recording(settings), AsyncExitStack() as stack:
        async with serving(settings) as target:
            await stack.enter_async_context(running(target, plain(screen)))
            await screen.until(flows)
        async with serving(settings.model_copy(update={"listen": target})):
            text = await screen.until(lambda text: figure("reconnects", text) >= 4)
            accepted = figure("accepted", text)
            text = await screen.until(lambda text: figure("accepted", text) > accepted)
    assert figure("received", text) > 0
    assert figure("gaps", text) == 0


async def test_a_second_demo_ends_the_first_in_words(server: Server):
    screen = Screen()
    first = asyncio.create_task(demo.run(server.target, plain(screen)))
    await screen.until(flows)
    async with running(server.target, plain(Screen())):
        with pytest.raises(RuntimeError, match="FEED_REPLACED"):
            await first


async def test_the_view_keeps_log_records_from_the_terminal(server: Server):
    screen, root = Screen(), logging.getLogger()
    elsewhere = io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    root.addHandler(handler)
    before = list(root.handlers)
    try:
        async with running(server.target, terminal(screen)):
            opening = await screen.until(lambda text: "104," in text)
            root.error("the disk is full")
            root.warning("the disk is\nslow")
            await screen.until(lambda text: "the disk is slow" in text)
            assert not elsewhere.getvalue()
        assert root.handlers == before
    finally:
        root.removeHandler(handler)
    assert opening.startswith(ENTER)
    assert elsewhere.getvalue() == "the disk is full\n"
    closing = await screen.until(bool)
    assert closing.index(SHOW_CURSOR) < closing.index(LEAVE)
    assert closing[closing.index(LEAVE) :].startswith(f"{LEAVE}demo: ")


# --- the view -----------------------------------------------------------------


async def test_the_view_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QUANTPLANE_API_KEY")  # which would not go there in plaintext
    lines = await view("10.0.0.7:50051", 80, 24, demo.LogLines())
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert all(symbol in text for symbol in SYMBOLS)
    assert "latency p99   1.5 ms" in text
    shell, python = demo.connect_lines("10.0.0.7:50051")
    assert set(shell + python) <= {line.rstrip() for line in lines}


async def test_the_view_shows_orders_fills_and_profit_and_open_positions():
    text = "\n".join(await view(TARGET, 80, 24, demo.LogLines()))
    found = [re.search(rf"{name} +(\S+)", text) for name in ("fills", "open orders")]
    assert [match and match[1] for match in found] == ["1", "2"]
    assert re.search(r"orders +\d+\.\d/s", text)
    assert re.search(r"P&L +\+1,244\.50", text)
    assert "positions  NVDA -500 +1,250.00  SPY +100 -12.50" in text


@pytest.mark.parametrize(("width", "height"), [(30, 8), (50, 20), (66, 24), (200, 60)])
async def test_the_view_has_no_line_too_long(width: int, height: int):
    lines = await view(TARGET, width, height, demo.LogLines())
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("SPY") for line in lines)


async def test_log_lines_take_only_the_room_there_is():
    log = demo.LogLines()
    for n in range(20):
        log.emit(logging.makeLogRecord({"msg": f"record {n}", "levelno": logging.INFO}))
    small = await view(TARGET, 80, 24, log)
    large = await view(TARGET, 80, 40, log)
    assert len(small) == 24 and "record 19" in "\n".join(small)
    assert sum("record 1" in line for line in large) == 8


def test_the_default_target_is_left_out_of_the_connect_lines():
    assert "50051" not in str(demo.connect_lines(TARGET))
    shell, python = demo.connect_lines("10.0.0.7:50051")
    assert all(line.endswith(" --target 10.0.0.7:50051") for line in shell)
    assert python[0].endswith('client = sync.Client("10.0.0.7:50051")')


def test_the_connect_lines_show_quotes_orders_and_the_portfolio():
    shell, _ = demo.connect_lines(TARGET)
    commands = [line.partition("quantplane ")[2] for line in shell]
    assert commands == ["quotes watch SPY NVDA", "orders watch", "portfolio --watch"]
