"""A server that is traced, and a client whose application traces."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from quantplane_server.telemetry import tracing
from tests.telemetry.receiver import Receiver

VARIABLES = {
    "OTEL_BSP_SCHEDULE_DELAY": "20",  # ms
    "OTEL_TRACES_SAMPLER": "parentbased_always_on",
}


@asynccontextmanager
async def traced(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, **variables: str
) -> AsyncIterator[None]:
    """Trace what runs in this process as a server's, to an endpoint."""
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} | VARIABLES | variables
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert tracing.start("serve")
    try:
        yield
    finally:
        await tracing.stop()


@asynccontextmanager
async def strategy(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> AsyncIterator[Any]:
    """Trace what the clients of this process call; yield the application's tracer."""
    provider = TracerProvider(resource=Resource({"service.name": "strategy"}))
    exporter = OTLPSpanExporter(endpoint=receiver.endpoint, insecure=True)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=20))
    # An application sets a provider once and for all; a test takes it back.
    tracer = provider.get_tracer("quantplane")
    monkeypatch.setattr("quantplane.tracing._tracer", tracer)
    try:
        yield tracer
    finally:
        await asyncio.to_thread(provider.shutdown)
