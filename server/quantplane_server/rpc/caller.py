"""Who calls, and from where."""

import re
from typing import NamedTuple
from urllib.parse import unquote

from quantplane_server.principal import principal
from quantplane_server.rpc.interceptor import Context
from quantplane_server.rpc.trace import trace_id

PEER = re.compile(r"ipv[46]:\[?(?P<address>[0-9a-fA-F.:]+?)(%\w+)?\]?:\d+")
MAX_USER_AGENT = 500  # characters that are kept of it
NOBODY = ""


class Caller(NamedTuple):
    """Where a change comes from, as the audit log keeps it."""

    name: str = NOBODY  # of the user
    user_id: str | None = None
    key_id: str | None = None  # of the API key that the call came with
    address: str | None = None  # None: not from a network
    user_agent: str = ""
    trace_id: str = ""


def caller(context: Context) -> Caller:
    """Return who makes a call."""
    metadata = dict(context.invocation_metadata() or ())
    agent = str(metadata.get("user-agent", ""))[:MAX_USER_AGENT]
    known = principal()
    return Caller(
        name=known.username if known else NOBODY,
        user_id=known.user_id if known else None,
        key_id=known.key_id or None if known else None,
        address=address(context),
        user_agent="".join(c if c.isprintable() else "\ufffd" for c in agent),
        trace_id=trace_id(context),
    )


def address(context: Context) -> str | None:
    """Return where a call comes from; None: not from a network."""
    peer = PEER.fullmatch(unquote(context.peer()))
    return peer["address"] if peer else None
