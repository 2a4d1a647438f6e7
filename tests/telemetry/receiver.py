"""A collector of traces, as every one takes them: OTLP over gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.proto.trace.v1 import trace_pb2

KINDS = trace_pb2.Span.SpanKind
WAIT_S = 20.0


@dataclass(frozen=True)
class Received:
    """A span, as it came."""

    span: trace_pb2.Span
    service: str

    @property
    def name(self) -> str:
        return self.span.name.removeprefix("quantplane.v1.")

    @property
    def kind(self) -> str:
        return str(KINDS.Name(self.span.kind)).removeprefix("SPAN_KIND_")

    @property
    def trace(self) -> str:
        return self.span.trace_id.hex()

    @property
    def id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def links(self) -> list[str]:
        return [link.span_id.hex() for link in self.span.links]

    @property
    def seconds(self) -> float:
        return (self.span.end_time_unix_nano - self.span.start_time_unix_nano) / 1e9

    @property
    def attributes(self) -> dict[str, Any]:
        return {pair.key: _value(pair.value) for pair in self.span.attributes}

    @property
    def failed(self) -> bool:
        return bool(self.span.status.code == trace_pb2.Status.STATUS_CODE_ERROR)


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps all spans that it is sent."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Received] = []
        self.requests: list[Any] = []
        self._come = asyncio.Event()

    async def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        for resource in request.resource_spans:
            about = {pair.key: pair.value for pair in resource.resource.attributes}
            service = about["service.name"].string_value
            for scope in resource.scope_spans:
                self.spans += [Received(span, service) for span in scope.spans]
        self._come.set()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Received) -> list[Received]:
        """Return the children of a span, as they began."""
        found = [span for span in self.spans if span.parent == parent.id]
        return sorted(found, key=lambda one: one.span.start_time_unix_nano)

    async def one(self, name: str, **wanted: str) -> Received:
        """Return the first span of a name, once it has come."""
        (found,) = (await self.some(name, 1, **wanted))[:1]
        return found

    async def some(self, name: str, count: int, **wanted: str) -> list[Received]:
        """Return the spans of a name, once there are so many."""

        def found() -> list[Received]:
            return [
                span
                for span in self.named(name)
                if all(getattr(span, key) == value for key, value in wanted.items())
            ]

        await self.until(lambda: len(found()) >= count, name)
        return found()

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not reached():
                    self._come.clear()
                    await self._come.wait()
        except TimeoutError:
            names = sorted({span.name for span in self.spans})
            raise AssertionError(f"no {what} came, but {names}") from None

    def tree(self, root: Received) -> Any:
        """Return a span's name, and the trees of its children if it has any.

        Without waits for connections: they depend on how busy the machine is.
        """
        children = [
            self.tree(child)
            for child in self.children(root)
            if child.name != "wait for a connection"
        ]
        return (root.name, children) if children else root.name


@asynccontextmanager
async def receiving(port: int = 0) -> AsyncIterator[Receiver]:
    """Receive on a port of this machine while the block runs."""
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    receiver.endpoint = f"http://127.0.0.1:{port}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
