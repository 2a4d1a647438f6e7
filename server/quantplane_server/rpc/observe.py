"""The outermost layer around every call: how long it took, how it ended, its spans.

It sees what nothing within can change: an error that became a status, a caller that is
not known, a reader that has gone.
"""

from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import grpc

from quantplane_server.rpc.interceptor import Call
from quantplane_server.telemetry import logs, metrics, tracing


@dataclass(frozen=True)
class Observer:
    """Observes the calls of a server."""

    trace_stream_s: float = 10.0  # between two spans of deliveries of a stream
    lines: logs.CallLines = field(default_factory=logs.CallLines)

    def __call__(self, call: Call) -> "Observed":
        return Observed(self, call)


class Observed:
    """One call, from its begin to its end."""

    __slots__ = ("_observer", "_trace", "began", "call", "code", "method", "responses")

    def __init__(self, observer: Observer, call: Call) -> None:
        self.call = call
        self.method = call.method.removeprefix("/")
        self.code = grpc.StatusCode.OK  # how it ended
        self.began = perf_counter()
        self.responses = 0  # written
        self._observer = observer
        self._trace: tracing.CallTrace | None = None

    def __enter__(self) -> Self:
        if tracing.tracer:
            context, interval_s = self.call.context, self._observer.trace_stream_s
            self._trace = tracing.CallTrace(
                self.method,
                context.invocation_metadata() or (),
                context.peer,
                interval_s if self.call.streams else None,
            )
        logs.begin_call()
        if self.call.streams:
            metrics.STREAMS.add(1, self.method)
        else:
            metrics.CALLS.add(1, self.method)
        return self

    def asked(self, request: Any) -> None:
        """Note the first request: it has come and is let in."""
        if self.call.streams:
            self._observer.lines.begun(self.method)
        if self._trace:
            self._trace.asked(request)

    def told(self, response: Any) -> None:
        """Note a response that is written, or is about to be."""
        self.responses += 1
        if self._trace:
            self._trace.told(response)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.code = code_of(self.call, error)
        duration_s = perf_counter() - self.began
        self._count(duration_s)
        if self._trace:
            self._trace.end(self.code.name, duration_s)

    def _count(self, duration_s: float) -> None:
        method, code, more = self.method, self.code.name, {}
        if self.call.streams:
            metrics.STREAMS.add(-1, method)
            metrics.STREAMS_ENDED.add(1, method, code)
            more["responses"] = self.responses
        else:
            metrics.CALLS.add(-1, method)
            if metrics.CALL_DURATION.on:
                metrics.CALL_DURATION.record(duration_s, method, code)
        self._observer.lines.ended(method, code, duration_s, **more)


def code_of(call: Call, error: BaseException | None) -> grpc.StatusCode:
    """Return how a call ended that left its handler by `error`, if by any."""
    context = call.context
    if code := context.code():
        return code if isinstance(code, grpc.StatusCode) else _CODES[code]
    if error is None:
        return grpc.StatusCode.OK
    if context.time_remaining() == 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, Exception):
        return grpc.StatusCode.UNKNOWN
    return grpc.StatusCode.CANCELLED


_CODES = {code.value[0]: code for code in grpc.StatusCode}
