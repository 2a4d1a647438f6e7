"""Traces: spans of calls, of what they ask of the backends, and of deliveries.

On where the standard variables name a place to send them to; else `tracer` is None,
which every place asks first, and no span is ever made. The variables are those of
OpenTelemetry: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER and so on.

A call that is not sampled costs one decision; its statements cost nothing. No span is
longer than what it tells of: a stream has a span until its first response, short ones
along the way, and a short one at its end.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from google.protobuf.message import Message
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from quantplane_server.origin import NONE, Origin
from quantplane_server.principal import principal
from quantplane_server.telemetry.named import Names, attributes, gather

if TYPE_CHECKING:
    from quantplane_server.telemetry.export import Export

tracer: Tracer | None = None
"""Begins spans; None: nothing is traced."""

NOWHERE = Context()
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
MOST_LINKS = 32  # of a span
MOST_DELIVERED = 100  # events of a response that have a span
FAULTS = {  # of the server; others are the caller's
    *("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
}
PARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})"
    r"-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
PEER = re.compile(r"ipv[46]:\[?(?P<host>[0-9a-fA-F.:]+?)(%\w+)?\]?:(?P<port>\d+)")

_export: "Export | None" = None


# --- On and off ---------------------------------------------------------------------


class Variables(BaseSettings):
    """The variables that decide whether there is anything to trace for."""

    model_config = SettingsConfigDict(
        env_prefix="otel_", extra="ignore", env_ignore_empty=True
    )

    exporter_otlp_endpoint: str = ""
    exporter_otlp_traces_endpoint: str = ""
    traces_exporter: str = ""
    sdk_disabled: str = ""

    def wanted(self) -> bool:
        if self.sdk_disabled.lower() == "true":
            return False
        if self.traces_exporter:
            return "otlp" in self.traces_exporter.split(",")
        return bool(self.exporter_otlp_endpoint or self.exporter_otlp_traces_endpoint)


def start(process: str, with_client: bool = False) -> bool:
    """Trace from now on, if the variables say so; return whether they do.

    `process` is what the process is: "serve", "record", "paper". With `with_client`,
    the calls that it makes itself are traced too.
    """
    global tracer, _export
    variables = Variables()
    if tracer or not variables.wanted():
        return False
    from quantplane_server.telemetry.export import Export  # only where it is needed

    _export = Export(process)
    tracer = _export.tracer
    if with_client:
        trace.set_tracer_provider(_export.provider)
    return True


async def stop() -> None:
    """Send what is left, for a few seconds at most, and trace no more."""
    global tracer, _export
    export, tracer, _export = _export, None, None
    if export:
        await export.close()


@asynccontextmanager
async def running(process: str, with_client: bool = False) -> AsyncIterator[None]:
    """Trace while the block runs, if the variables say so; see `start`."""
    start(process, with_client)
    try:
        yield
    finally:
        await stop()


def sent() -> int:
    """Return how many spans have been handed over since the start."""
    return _export.sent if _export else 0


def dropped() -> int:
    """Return how many were lost: too many waited, or nobody took them."""
    return _export.dropped if _export else 0


# --- Which trace --------------------------------------------------------------------


def parent(traceparent: str) -> SpanContext | None:
    """Return what a header names; None for what is no traceparent."""
    found = PARENT.fullmatch(traceparent)
    if found is None:
        return None
    if found["version"] == "00" and found["more"]:  # only later ones may have more
        return None
    flags = TraceFlags(int(found["flags"], 16) & TraceFlags.SAMPLED)
    ids = int(found["trace"], 16), int(found["span"], 16)
    return SpanContext(*ids, is_remote=True, trace_flags=flags)


def current() -> Span | None:
    """Return the span that what runs belongs to, if it is recorded."""
    if tracer is None:
        return None
    span = trace.get_current_span()
    return span if span.is_recording() else None


def ids() -> Origin:
    """Return the ids of the current span; empty ones if none is recorded."""
    span = current()
    return _origin(span.get_span_context()) if span else NONE


def _origin(span: SpanContext) -> Origin:
    return Origin(f"{span.trace_id:032x}", f"{span.span_id:016x}")


def origin_of(traceparent: str) -> Origin:
    """Return what a header names, as far as it is sampled."""
    there = parent(traceparent) if traceparent else None
    return _origin(there) if there and there.trace_flags.sampled else NONE


def apart() -> None:
    """Have what the current task does from here on belong to no call."""
    if tracer:
        contexts.attach(NOWHERE)


def _remote(origin: Origin) -> SpanContext | None:
    """Return the context of a sampled call elsewhere."""
    return parent(f"00-{origin.trace_id}-{origin.span_id}-01")


def _under(span: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(span), NOWHERE)


# --- What belongs to a call ---------------------------------------------------------


@contextmanager
def together(name: str, origins: Iterable[Origin]) -> Iterator[None]:
    """A span of work for several calls: a child of the first, linked to the others.

    Only calls that are sampled count; without any, nothing is traced.
    """
    if tracer is None:
        yield
        return
    sampled = dict.fromkeys(origin for origin in origins if origin.span_id)
    calls = [call for call in map(_remote, sampled) if call]
    if not calls:
        contexts.attach(NOWHERE)  # the task may have begun within any call
        yield
        return
    links = [Link(call) for call in calls[1 : MOST_LINKS + 1]]
    with tracer.start_as_current_span(name, _under(calls[0]), links=links):
        yield


def delivered(name: str, origins: Iterable[tuple[Origin, int]], since_ns: int) -> None:
    """Tell that events were delivered, each in the trace that it comes from.

    With each origin comes when the event happened; `since_ns` is when the delivery
    began. Both are of time_ns.
    """
    if tracer is None:
        return
    count = 0
    for origin, happened_ns in origins:
        if origin.span_id and (there := _remote(origin)) and count < MOST_DELIVERED:
            count += 1
            span = tracer.start_span(
                f"{name} deliver",
                _under(there),
                SpanKind.PRODUCER,
                {"quantplane.age_ms": (since_ns - happened_ns) / 1e6},
                start_time=since_ns,
            )
            span.end()


# --- Calls --------------------------------------------------------------------------

Metadata = Iterable[tuple[str, str | bytes]]


class CallTrace:
    """The spans of one call.

    With `interval_s` it is a stream: the span ends at the first response. Later ones
    have a short span now and then, at most one in `interval_s`, in a trace of its own.
    """

    def __init__(
        self,
        method: str,
        metadata: Metadata,
        peer: Callable[[], str],
        interval_s: float | None,
    ) -> None:
        assert tracer
        self._tracer = tracer
        self._method = method
        self._peer = peer
        self._interval_s = interval_s
        self._responses = 0
        self._names: Names = {}
        self._carried: SpanContext | None = None  # by the response at hand
        self._since_ns = 0
        self._next = 0.0
        self._conflated = 0
        name = self._method if interval_s is None else f"{self._method} subscribe"
        self._span: Span | None = tracer.start_span(
            name, _sent_with(metadata), SpanKind.SERVER
        )
        self._begun = self._span.get_span_context()  # of what `_span` was
        if self._span.is_recording():
            contexts.attach(set_span_in_context(self._span, NOWHERE))
            self._agent = _agent(metadata)
        else:
            contexts.attach(NOWHERE)
        self._timer: asyncio.TimerHandle | None = None
        if interval_s is not None:
            STREAM.set(self)
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(interval_s, self._unanswered)

    def asked(self, request: Any) -> None:
        if self._span and self._span.is_recording() and isinstance(request, Message):
            gather(request, self._names)

    def told(self, response: Any) -> None:
        self._responses += 1
        if self._interval_s is None:
            self.asked(response)
        elif self._span:
            self._end_span("OK")
            self._since_ns, self._carried = 0, None
        elif self._carried or self._begun.trace_flags.sampled:
            self._deliver(response)

    def carries(self, traceparent: str, conflated: int) -> None:
        """Tell that the response at hand has quotes, and from which span they come.

        `conflated` is how many were left out before them.
        """
        self._since_ns = time_ns()
        self._carried = parent(traceparent) if traceparent else None
        self._conflated += conflated

    def end(self, code: str, duration_s: float) -> None:
        if self._span:
            self._end_span(code)
        elif self._begun.trace_flags.sampled:
            span = self._linked("summary")
            span.set_attribute("quantplane.messages", self._responses)
            span.set_attribute("quantplane.conflated", self._conflated)
            span.set_attribute("quantplane.seconds", round(duration_s, 3))
            _finish(span, self._method, code)

    def _unanswered(self) -> None:
        """End the span of a stream whose first response is long in coming."""
        self._end_span("")

    def _end_span(self, code: str) -> None:
        span, self._span = self._span, None
        assert span
        if self._timer:
            self._timer.cancel()
        if span.is_recording():
            span.set_attributes(attributes(self._names))
            known = principal()
            if known:
                span.set_attribute("quantplane.user", known.username)
            if self._agent:
                span.set_attribute("user_agent.original", self._agent)
            if found := PEER.fullmatch(unquote(self._peer())):
                span.set_attribute("client.address", found["host"])
                span.set_attribute("client.port", int(found["port"]))
            _finish(span, self._method, code)

    def _deliver(self, response: Any) -> None:
        carried, self._carried = self._carried, None
        since_ns, self._since_ns = self._since_ns, 0
        if not since_ns and not _has_data(response):
            return
        assert self._interval_s
        if (now := monotonic()) >= self._next:
            self._next = now + self._interval_s
            span = self._linked("deliver", carried, since_ns or None)
            span.end()

    def _linked(
        self, name: str, other: SpanContext | None = None, since_ns: int | None = None
    ) -> Span:
        """Begin a span that is the root of its trace, linked to that of the begin."""
        links = [Link(span) for span in (self._begun, other) if span]
        links = [link for link in links if link.context.trace_flags.sampled]
        name = f"{self._method} {name}"
        return self._tracer.start_span(
            name, NOWHERE, SpanKind.PRODUCER, links=links, start_time=since_ns
        )


STREAM: ContextVar[CallTrace | None] = ContextVar("stream", default=None)


def stream() -> CallTrace | None:
    """Return what traces the stream that is being served, if anything does."""
    return STREAM.get() if tracer else None


def _finish(span: Span, method: str, code: str) -> None:
    span.set_attribute("rpc.system.name", "grpc")
    span.set_attribute("rpc.method", method)
    if code:
        span.set_attribute("rpc.response.status_code", code)
    if code in FAULTS:
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def _sent_with(metadata: Metadata) -> Context:
    """Return the context that a call was made in."""
    header, state = "", ""
    for key, value in metadata:
        if key == "traceparent":
            header = str(value)
        elif key == "tracestate":
            state += f",{value!s}"
    there = parent(header) if header else None
    if there is None:
        return NOWHERE
    if state:
        there = SpanContext(
            *(there.trace_id, there.span_id, True, there.trace_flags),
            TraceState.from_header([state[1:]]),
        )
    return _under(there)


def _agent(metadata: Metadata) -> str:
    agents = [str(value) for key, value in metadata if key == "user-agent"]
    return agents[0][:256] if agents else ""


def _has_data(response: Any) -> bool:
    """Tell whether a response, if it is not serialised yet, tells of what is."""
    if not isinstance(response, Message):
        return False
    has_events = "event" in response.DESCRIPTOR.fields_by_name
    return has_events and not response.HasField("event")
