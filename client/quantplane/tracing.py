"""Traces of calls, where the application traces with OpenTelemetry.

The package never imports it: where the application has not, there is nothing to trace.
Where a provider of traces is set, each unary call has a span, and every call tells the
server which span it is made in, as W3C Trace Context.

What happens to orders and signals may come long after the call that caused it, in
another process. Their events carry the call's trace, so what comes of them can be part
of it:

    async for response in client.follow(client.order.WatchOrders, request):
        for event in response.events:
            with quantplane.tracing.caused_by([event]):
                await client.order.CancelOrder(...)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from grpc.aio import Metadata

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, Tracer

NAME = "quantplane"
HEADER = "traceparent"
STATE = "tracestate"
MOST_LINKS = 32

_tracer: Tracer | None = None


class Caused(Protocol):
    """An event, or a broker's command."""

    @property
    def trace_id(self) -> str: ...

    @property
    def span_id(self) -> str: ...


def context_of(event: Caused) -> Context | None:
    """Return the context of the call that caused an event.

    To begin spans in: `tracer.start_as_current_span("hedge", context_of(event))`. None
    where the call was not sampled, or where OpenTelemetry is not in use.
    """
    tracing = sys.modules.get("opentelemetry.trace")
    there = _called(event)
    if tracing is None or there is None:
        return None
    context: Context = tracing.set_span_in_context(tracing.NonRecordingSpan(there))
    return context


@contextmanager
def caused_by(events: Iterable[Caused]) -> Iterator[None]:
    """Have the calls of a block belong to the traces of what caused them.

    Events of one call: the block's calls are children of it. Of several: of a span
    that is linked to them. Events without a sampled call change nothing.
    """
    tracer = _find_tracer()
    called = [there for event in _distinct(events) if (there := _called(event))]
    if tracer is None or not called:
        yield
        return
    from opentelemetry import context, trace

    if len(called) == 1:
        under = trace.set_span_in_context(trace.NonRecordingSpan(called[0]))
        token = context.attach(under)
        try:
            yield
        finally:
            context.detach(token)
        return
    links = [trace.Link(there) for there in called[:MOST_LINKS]]
    root = context.Context()
    with tracer.start_as_current_span("caused by several", root, links=links):
        yield


class UnaryTrace:
    """The span of a unary call."""

    def __init__(self, method: str, span: Span) -> None:
        self._method = method
        self._span = span

    @classmethod
    def begin(cls, method: str, metadata: Any) -> UnaryTrace | None:
        """Begin it; None where nothing is traced, or the caller says where to."""
        tracer = _find_tracer()
        if tracer is None or (metadata and HEADER in dict(metadata)):
            return None
        from opentelemetry.trace import SpanKind

        span = tracer.start_span(method, kind=SpanKind.CLIENT)
        return cls(method, span) if span.get_span_context().is_valid else None

    def metadata(self, own: Any) -> Metadata:
        """Return what the call carries, beside the caller's own."""
        return _with_header(own, self._span.get_span_context())

    def end_with(self, call: Any) -> None:
        if self._span.is_recording():
            call.add_done_callback(self._end)

    def fail(self, error: BaseException) -> None:
        """End it without a call."""
        self._finish(type(error).__name__)

    def _end(self, call: Any) -> None:
        code: str = _result_of(call.code()).name
        self._span.set_attribute("rpc.response.status_code", code)
        self._finish("" if code == "OK" else code)

    def _finish(self, error: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("rpc.system.name", "grpc")
        self._span.set_attribute("rpc.method", self._method)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class PublisherTrace:
    """Spans of a publisher's batches, from sent to accepted: one now and then."""

    def __init__(self, method: str, every_s: float) -> None:
        self._method = method
        self._every_s = every_s
        self._next = 0.0
        self._open: deque[tuple[int, Span]] = deque()  # by batch

    def begin(self, batch: int, quotes: int) -> str:
        """Begin the span of a batch, if it has one; return its traceparent, or ""."""
        tracer = _find_tracer()
        if tracer is None or monotonic() < self._next:
            return ""
        from opentelemetry.trace import SpanKind

        self._next = monotonic() + self._every_s
        span = tracer.start_span(f"{self._method} publish", kind=SpanKind.PRODUCER)
        if not span.is_recording():
            return ""
        span.set_attribute("quantplane.batch", batch)
        span.set_attribute("quantplane.quotes", quotes)
        self._open.append((batch, span))
        return _traceparent(span.get_span_context())

    def accepted(self, through: int) -> None:
        while self._open and self._open[0][0] <= through:
            self._open.popleft()[1].end()

    def close(self) -> None:
        """End what is not accepted."""
        while self._open:
            _, span = self._open.popleft()
            span.set_attribute("error.type", "not accepted")
            span.end()


def with_current(metadata: Any) -> Any:
    """Return what a stream's call carries: its caller's own, and the current span."""
    if _find_tracer() is None or (metadata and HEADER in dict(metadata)):
        return metadata
    from opentelemetry.trace import get_current_span

    span = get_current_span().get_span_context()
    return _with_header(metadata, span) if span.is_valid else metadata


def _find_tracer() -> Tracer | None:
    """Return what begins spans, if the application uses OpenTelemetry."""
    global _tracer
    if _tracer is None and (trace := sys.modules.get("opentelemetry.trace")):
        _tracer = trace.get_tracer(NAME, version(NAME))
    return _tracer


def _distinct(events: Iterable[Caused]) -> Iterable[Caused]:
    return {(event.trace_id, event.span_id): event for event in events}.values()


def _called(event: Caused) -> SpanContext | None:
    """Return the span of the call that caused an event, if it is sampled."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not (event.trace_id and event.span_id):
        return None
    ids = int(event.trace_id, 16), int(event.span_id, 16)
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    there: SpanContext = trace.SpanContext(*ids, is_remote=True, trace_flags=flags)
    return there


def _with_header(own: Any, span: SpanContext) -> Metadata:
    headers = [(HEADER, _traceparent(span))]
    if span.trace_state:
        headers.append((STATE, span.trace_state.to_header()))
    return Metadata(*(own or ()), *headers)


def _traceparent(span: SpanContext) -> str:
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 1:02x}"


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine that has nothing to wait for returns."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        return returned.value
    coroutine.close()
    raise RuntimeError("it waits")
