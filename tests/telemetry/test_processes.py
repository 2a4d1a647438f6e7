"""One trace through several processes, as Jaeger would show it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.processes import Child, running
from tests.admin.test_subscriptions import becomes, states
from tests.market_data import quote
from tests.orders import submit, watching
from tests.postgres import KEY
from tests.telemetry.receiver import Received, Receiver, receiving
from tests.telemetry.test_export import free_port
from tests.telemetry.test_streams import traded
from tests.telemetry.tracing import VARIABLES, strategy


async def test_the_trace_of_an_order_goes_through_three_processes(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    target = f"127.0.0.1:{free_port()}"
    settings = settings.model_copy(update={"listen": target})
    async with receiving() as receiver:
        variables = VARIABLES | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        server = Child("serve", "--listen", target, settings=settings)
        paper = ("paper", "--target", target)
        broker = Child(*paper, settings=settings, api_key=KEY)
        async with kept(server), kept(broker), strategy(monkeypatch, receiver) as it:
            trace = await trade(target, it)
    # Each has sent all it had before it ended.
    spans = [span for span in receiver.spans if span.trace == trace]
    services = {span.service for span in spans}
    assert services == {"strategy", "quantplane", "quantplane-paper"}
    known = {span.id: span for span in spans}
    assert [span.name for span in spans if span.parent not in known] == ["decide"]
    (root,) = [span for span in spans if span.name == "decide"]
    lines = [*shown(receiver, root, root.span.start_time_unix_nano)]
    print(*lines, sep="\n")
    booked = "BrokerService/ReportExecutions"
    (call,) = [s for s in receiver.named(booked) if s.service == "quantplane-paper"]
    assert [one.name for one in receiver.children(call)] == [booked]
    assert "PUBLISH" in {span.name for span in spans}


def shown(
    receiver: Receiver, span: Received, began_ns: int, depth: int = 0
) -> Iterator[str]:
    """Yield the lines of a trace: when each span began, how long it took, of whom."""
    began_ms = (span.span.start_time_unix_nano - began_ns) / 1e6
    name = "  " * depth + span.name
    took_ms = span.seconds * 1e3
    yield f"{began_ms:8.1f} {took_ms:8.1f}  {name:50} {span.kind:8} {span.service}"
    for child in receiver.children(span):
        yield from shown(receiver, child, began_ns, depth + 1)


@asynccontextmanager
async def kept(child: Child) -> AsyncIterator[None]:
    """Keep a process while the block runs, from when it is ready."""
    async with running(child):
        await child.ready()
        yield


async def trade(target: str, tracer: Any) -> str:
    """Have an order filled; return its trace."""
    async with (
        Client(target) as client,
        client.publish_quotes() as feed,
        watching(client) as stream,
    ):
        # An order of its snapshot would be of no trace to the broker.
        await becomes(client, "WatchBrokerCommands", states("LIVE"))
        await feed.send([quote("A", 100, ask_size=50)])
        await feed.flush()
        with tracer.start_as_current_span("decide"):
            await submit(client, symbol="A", quantity=1, price=1_000)
        event = await traded(stream)
    return event.trace_id
