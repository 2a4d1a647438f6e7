"""Log lines: JSON that says whose call it is, text on its line, and no secrets."""

import asyncio
import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from hypothesis import given
from hypothesis import settings as terms
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.streams import OUTLET, Outlet
from quantplane_server.telemetry import logs, metrics
from quantplane_server.telemetry.logs import JsonLines, TextLines, masked, set_up
from tests.conftest import Server
from tests.market_data import until
from tests.orders import UNKNOWN_ID
from tests.postgres import KEY
from tests.telemetry.lines import Lines, lines_of
from tests.telemetry.receiver import Receiver

SYMBOLS = "quantplane.v1.MarketDataService/ListSymbols"
PASSWORD = "correct horse battery staple"


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What a server logs that writes JSON."""
    with lines_of() as lines:
        yield lines


async def list_symbols(client: Client) -> None:
    await client.market_data.ListSymbols(pb.ListSymbolsRequest())


async def until_logged(lines: Lines, **fields: Any) -> dict[str, Any]:
    """Return the line of a call, which comes when its caller has been answered."""
    async with asyncio.timeout(10):
        while not (found := lines.of("quantplane.calls", **fields)):
            await asyncio.sleep(0.01)
    return found[0]


async def all_ended() -> None:
    """Wait until each call has its line: a caller is answered before its call ends."""
    while metrics.CALLS.total():
        await asyncio.sleep(0.01)


# --- Calls --------------------------------------------------------------------------


async def test_a_finished_call_is_a_line(lines: Lines, client: Client):
    await list_symbols(client)
    line = await until_logged(lines, method=SYMBOLS)
    assert line["level"] == "info"
    assert line["code"] == "OK"
    assert 0 < line["duration_ms"] < 60_000
    assert line["principal"] == "test"
    assert line["key_id"]
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert re.fullmatch(r"ListSymbols OK in [\d.]+ ms", line["message"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


async def test_a_line_of_a_sampled_call_says_in_which_trace(
    lines: Lines, client: Client, receiver: Receiver
):
    await list_symbols(client)
    line = await until_logged(lines, method=SYMBOLS)
    assert re.fullmatch("[0-9a-f]{32}", line["trace_id"])
    assert re.fullmatch("[0-9a-f]{16}", line["span_id"])


async def test_a_call_that_fails_is_a_line_with_its_code(lines: Lines, client: Client):
    with pytest.raises(grpc.aio.AioRpcError):
        await client.order.GetOrder(pb.GetOrderRequest(order_id=UNKNOWN_ID))
    line = await until_logged(lines, code="NOT_FOUND")
    assert line["method"] == "quantplane.v1.OrderService/GetOrder"


async def test_a_stream_is_a_line_when_it_begins_and_one_when_it_ends(
    lines: Lines, client: Client
):
    request = pb.SubscribeQuotesRequest(symbols=["A"])
    call = client.market_data.SubscribeQuotes(request)
    await until(aiter(call), "snapshot_complete")
    method = "quantplane.v1.MarketDataService/SubscribeQuotes"
    begun = await until_logged(lines, method=method)
    assert begun["message"] == "SubscribeQuotes begins"
    assert "code" not in begun
    call.cancel()
    ended = await until_logged(lines, method=method, code="CANCELLED")
    assert ended["responses"] >= 2
    assert ended["principal"] == "test"


async def test_of_hot_calls_some_are_lines_and_the_others_counted(
    lines: Lines, client: Client, monkeypatch: pytest.MonkeyPatch
):
    now = time.monotonic() + 10
    monkeypatch.setattr(logs, "monotonic", lambda: now)
    for _ in range(logs.LINES_PER_S + 5):
        await list_symbols(client)
    await all_ended()
    now += 1
    await list_symbols(client)
    line = await until_logged(lines, left_out=5)
    assert line["message"].endswith("(5 more before it)")
    assert len(lines.of("quantplane.calls", method=SYMBOLS)) == logs.LINES_PER_S + 1


async def test_errors_have_a_share_of_their_own(
    lines: Lines, client: Client, monkeypatch: pytest.MonkeyPatch
):
    now = time.monotonic() + 20
    monkeypatch.setattr(logs, "monotonic", lambda: now)
    monkeypatch.setattr(logs, "LINES_PER_S", 1)
    request = pb.ListOrdersRequest(page_size=-1)
    await client.order.ListOrders(pb.ListOrdersRequest())
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await client.order.ListOrders(request)
    await all_ended()
    assert len(lines.of("quantplane.calls", code="INVALID_ARGUMENT")) == 3


async def test_a_line_within_a_call_says_whose_it_is(
    lines: Lines, client: Client, dsn: str
):
    conn = await asyncpg.connect(dsn)
    try:
        await conn.execute("ALTER TABLE market_data RENAME TO elsewhere")
    finally:
        await conn.close()
    with pytest.raises(grpc.aio.AioRpcError):
        await list_symbols(client)
    (line,) = lines.of("quantplane_server.rpc.errors", method=SYMBOLS)
    assert line["principal"] == "test"
    assert line["level"] == "error"
    assert "UndefinedTableError" in line["exception"]


async def test_what_a_call_leaves_running_is_not_of_its_caller(lines: Lines):
    class Caller:
        def peer(self) -> str:
            return "ipv4:10.0.0.7:51234"

    async def go_on() -> None:
        logging.getLogger("later").warning("for others too")

    OUTLET.set(Outlet(f"/{SYMBOLS}", Caller()))
    logs.begin_call()
    logging.getLogger("now").warning("for the caller")
    await asyncio.create_task(go_on())
    assert lines.of("now", method=SYMBOLS, peer="ipv4:10.0.0.7:51234")
    assert "method" not in lines.of("later")[0]


# --- Secrets ------------------------------------------------------------------------


async def test_no_line_has_a_secret(lines: Lines, server: Server):
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger("asyncio").setLevel(logging.DEBUG)
    wrong = "qp_" + 43 * "w"
    async with Client(server.target) as client:
        await list_symbols(client)
        with pytest.raises(grpc.aio.AioRpcError):
            await client.login("test", PASSWORD)
    async with Client(server.target, token=wrong) as stranger:
        with pytest.raises(grpc.aio.AioRpcError):
            await list_symbols(stranger)
    await until_logged(lines, code="UNAUTHENTICATED")
    text = lines.text.getvalue()
    for secret in (KEY, wrong, PASSWORD):
        assert secret not in text


@pytest.mark.parametrize(
    "text, told",
    [
        (f"the key {KEY} is wrong", "the key qp_*** is wrong"),
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("redis://:secret@host:6379", "redis://:***@host:6379"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("eyJhbGciOiJF.eyJzdWIi.c2ln is old", "*** is old"),
        ("nothing at http://host:80/path", "nothing at http://host:80/path"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, told: str):
    assert masked(text) == told


# --- Lines --------------------------------------------------------------------------


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("a", logging.INFO, "", 0, message, (), info)


def caught(message: str) -> BaseException:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


@terms(deadline=None)
@given(st.text())
def test_no_message_breaks_its_line(message: str):
    for formatter in (JsonLines(), TextLines()):
        line = formatter.format(record(message))
        assert len(line.splitlines()) == 1
        assert line.isprintable()


@terms(deadline=None)
@given(st.text())
def test_json_says_what_was_said(message: str):
    line = json.loads(JsonLines().format(record(message)))
    assert line["message"] == masked(message)


@terms(deadline=None)
@given(st.text())
def test_a_traceback_is_one_field_or_indented_lines(message: str):
    error = caught(message)
    assert len(JsonLines().format(record("x", error)).splitlines()) == 1
    first, *others = TextLines().format(record("x", error)).split("\n")
    assert first.endswith(" I a: x")
    assert all(line.startswith("    ") and line.isprintable() for line in others)


# --- Where they go ------------------------------------------------------------------


@contextmanager
def fresh() -> Iterator[logging.Logger]:
    """The root logger as a process begins with it."""
    root = logging.getLogger()
    level, handlers, calls = root.level, root.handlers, logs.calls.level
    root.handlers = []
    try:
        yield root
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logs.calls.setLevel(calls)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream, told, formatter",
    [
        (Terminal(), None, TextLines),
        (io.StringIO(), None, JsonLines),
        (Terminal(), "json", JsonLines),
        (io.StringIO(), "text", TextLines),
    ],
)
def test_a_terminal_gets_text_and_a_file_json_unless_told(
    monkeypatch: pytest.MonkeyPatch, stream: Any, told: Any, formatter: type
):
    monkeypatch.setattr(sys, "stderr", stream)
    with fresh() as root:
        set_up(told, "info")
        (handler,) = root.handlers
    assert isinstance(handler.formatter, formatter)


@pytest.mark.parametrize(
    "told, level, shown",
    [("text", "info", False), ("text", "debug", True), ("json", "info", True)],
)
def test_calls_do_not_bury_a_terminal(told: Any, level: Any, shown: bool):
    with fresh():
        set_up(told, level)
        assert logs.calls.isEnabledFor(logging.INFO) == shown
