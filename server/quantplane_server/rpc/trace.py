"""Which trace a call belongs to, as W3C Trace Context has it."""

from quantplane_server.origin import Origin
from quantplane_server.principal import actor
from quantplane_server.rpc.interceptor import Context
from quantplane_server.telemetry import tracing

HEADER = "traceparent"


def origin(context: Context) -> Origin:
    """Return what is kept of a call with what it changes.

    Its span id only if it is sampled. Without a span of its own, the trace is that of
    its caller, if there is any.
    """
    own = tracing.ids()
    if own.span_id:
        return own._replace(actor=actor())
    metadata = dict(context.invocation_metadata() or ())
    sent = tracing.parent(str(metadata.get(HEADER, "")))
    return Origin(f"{sent.trace_id:032x}" if sent else "", actor=actor())


def trace_id(context: Context) -> str:
    """Return the trace id in 32 hex digits; "" if the call has none, or not one."""
    return origin(context).trace_id
