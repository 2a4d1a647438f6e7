"""Which trace a call belongs to, as W3C Trace Context has it."""

import re

from quantplane_server.origin import Origin
from quantplane_server.principal import actor
from quantplane_server.rpc.interceptor import Context

HEADER = "traceparent"
PARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})"
    r"-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?"
)


def origin(context: Context) -> Origin:
    """Return what is kept of a call with what it changes."""
    return Origin(trace_id(context), actor())


def trace_id(context: Context) -> str:
    """Return the trace id in 32 hex digits; "" if the call has none, or not one."""
    metadata = dict(context.invocation_metadata() or ())
    parent = PARENT.fullmatch(str(metadata.get(HEADER, "")))
    if parent is None:
        return ""
    if parent["version"] == "00" and parent["more"]:  # only later ones may have more
        return ""
    return parent["trace"]
