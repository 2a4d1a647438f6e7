"""Whether there are spans, which are sampled, and what becomes of them on their way."""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import opentelemetry.sdk.trace
import opentelemetry.trace
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from quantplane_server.telemetry import tracing
from tests.market_data import quote, until
from tests.orders import submit, watching
from tests.telemetry.receiver import receiving
from tests.telemetry.tracing import traced

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
NOBODY = "http://127.0.0.1:1"  # listens there


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    """A client of a server that is traced as the test has begun it."""
    async with recording(settings), serving(settings) as target:
        async with Client(target) as client:
            yield client


# --- On or off ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: NOBODY, "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: NOBODY, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_SAMPLER": "always_on"},
    ],
)
async def test_nothing_is_traced_unless_the_variables_say_so(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not tracing.start("serve")
    assert tracing.tracer is None


@pytest.mark.parametrize(
    "variables",
    [
        {ENDPOINT: NOBODY},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": NOBODY},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
async def test_each_of_the_variables_is_enough(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing.start("serve")
    await tracing.stop()
    assert tracing.tracer is None


async def trade(client: Client) -> None:
    """Do something of everything: a unary call, a log stream, quotes."""
    request = pb.StreamQuotesRequest(symbols=["A"])
    quotes = client.follow(client.market_data.StreamQuotes, request)
    async with watching(client) as orders, quotes, client.publish_quotes() as feed:
        await until(quotes, "snapshot_complete")
        await submit(client)
        await anext(orders)
        await feed.send([quote("A", 1)])
        await until(quotes, "data")


async def test_where_nothing_is_traced_no_span_is_ever_made(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    made = []
    for kind in (
        opentelemetry.sdk.trace._Span,
        opentelemetry.sdk.trace.ReadableSpan,
        opentelemetry.trace.NonRecordingSpan,
    ):

        def begin(*_: Any, kind: Any = kind, **__: Any) -> None:
            made.append(kind)
            raise AssertionError("a span is made")

        monkeypatch.setattr(kind, "__init__", begin)
    await trade(client)
    assert not made


def test_where_nothing_is_traced_the_sdk_is_not_even_loaded():
    program = """
import sys
import quantplane_server.main, quantplane_server.cli
from quantplane_server.telemetry import tracing
assert not tracing.start("serve")
parts = ("opentelemetry.sdk.trace", "opentelemetry.exporter")
loaded = [name for name in sys.modules if name.startswith(parts)]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_client_neither_loads_nor_needs_opentelemetry():
    program = """
import sys
from quantplane import Client, tracing, v1 as pb
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry"] = None  # as if it were not installed
event = pb.OrderEvent(trace_id="a" * 32, span_id="b" * 16)
assert tracing.context_of(event) is None
assert tracing.UnaryTrace.begin("method", ()) is None
with tracing.caused_by([event]):
    pass
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- Which are sampled --------------------------------------------------------------


@pytest.fixture
async def none_sampled(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Trace only what a caller has sampled."""
    variables = {
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0",
    }
    async with (
        receiving() as receiver,
        traced(monkeypatch, receiver.endpoint, **variables),
    ):
        yield receiver


async def test_what_is_not_sampled_is_not_sent(none_sampled: Any, client: Client):
    await trade(client)
    sampled = ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")
    await client.auth.WhoAmI(pb.WhoAmIRequest(), metadata=(sampled,))
    await none_sampled.one("AuthService/WhoAmI")
    spans = {span.trace for span in none_sampled.spans}
    assert spans == {"a" * 32}


async def test_all_deliveries_of_a_sampled_stream_are_sampled(
    none_sampled: Any, settings: Settings
):
    settings = settings.model_copy(update={"trace_stream_s": 0.05})
    request = pb.StreamQuotesRequest(symbols=["A"])
    header = ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")
    async with (
        serving(settings) as target,
        Client(target) as client,
        client.publish_quotes() as feed,
    ):
        call = client.market_data.StreamQuotes(metadata=(header,))
        await call.write(request)
        for number in range(40):
            await feed.send([quote("A", number)])
            await asyncio.sleep(0.02)
            await call.read()
        name = "MarketDataService/StreamQuotes"
        delivers = await none_sampled.some(f"{name} deliver", 4)
        call.cancel()
        summary = await none_sampled.one(f"{name} summary")
    subscribe = await none_sampled.one(f"{name} subscribe")
    assert all(span.links == [subscribe.id] for span in [*delivers, summary])


# --- On their way -------------------------------------------------------------------


def call(client: Client) -> Any:
    """Make a call that has one span: it asks no backend."""
    return client.order.GetOrderLifecycle(pb.GetOrderLifecycleRequest())


FEW = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}


async def test_calls_go_on_where_nobody_takes_the_spans(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    async with (
        traced(monkeypatch, NOBODY, **FEW),
        serving(settings) as target,
        Client(target) as client,
    ):
        for _ in range(100):
            await call(client)
        assert tracing.sent() == 0
        # 16 may wait, and 8 be on their way.
        assert 100 - 16 - 8 <= tracing.dropped() <= 100


async def test_all_spans_are_counted_as_sent_or_as_dropped(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    port = free_port()
    async with (
        traced(monkeypatch, f"http://127.0.0.1:{port}", **FEW),
        serving(settings) as target,
        Client(target) as client,
    ):
        for _ in range(100):
            await call(client)
        assert tracing.dropped() > 0  # nobody takes them yet
        async with receiving(port) as receiver, asyncio.timeout(30):
            while tracing.sent() + tracing.dropped() < 100:
                await asyncio.sleep(0.01)
            assert tracing.sent() == len(receiver.spans) == 100 - tracing.dropped()


async def test_spans_are_sent_again_once_somebody_takes_them(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO, "quantplane_server.telemetry.export")
    port = free_port()
    # What waits for a try to end is lost after it; the default is 10 s.
    short = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    async with (
        traced(monkeypatch, f"http://127.0.0.1:{port}", **short),
        serving(settings) as target,
        Client(target) as client,
    ):
        while not tracing.dropped():
            await client.auth.WhoAmI(pb.WhoAmIRequest())
            await asyncio.sleep(0.05)
        async with receiving(port) as receiver:
            while not receiver.spans:
                await client.auth.WhoAmI(pb.WhoAmIRequest())
                await asyncio.sleep(0.05)
            await receiver.until(lambda: tracing.sent() > 0, "span")
            said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("spans can't be sent to 127.0.0.1")
    assert said[1].startswith("spans are sent again, after")
    assert len([line for line in said if "can't be sent" in line]) == 1


async def test_what_is_left_is_sent_at_the_end(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    later = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    async with receiving() as receiver:
        async with traced(monkeypatch, receiver.endpoint, **later):
            async with serving(settings) as target, Client(target) as client:
                await client.auth.WhoAmI(pb.WhoAmIRequest())
            assert not receiver.spans
        assert receiver.named("AuthService/WhoAmI")


async def test_a_server_ends_though_nobody_takes_the_spans(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    silent = grpc.aio.server()  # it never answers
    port = silent.add_insecure_port("127.0.0.1:0")
    stuck = asyncio.Event()

    async def never(request: Any, context: Any) -> None:
        await stuck.wait()

    method = "opentelemetry.proto.collector.trace.v1.TraceService"
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(never)}
    handler = grpc.method_handlers_generic_handler(method, handlers)
    silent.add_generic_rpc_handlers([handler])
    await silent.start()
    async with traced(monkeypatch, f"http://127.0.0.1:{port}"):
        async with serving(settings) as target, Client(target) as client:
            await client.auth.WhoAmI(pb.WhoAmIRequest())
    stuck.set()
    await silent.stop(None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
