"""Who calls, and from where."""

import re
from typing import NamedTuple
from urllib.parse import unquote

from quantplane_server.rpc.interceptor import Context
from quantplane_server.rpc.trace import trace_id

PEER = re.compile(r"ipv[46]:\[?(?P<address>[0-9a-fA-F.:]+?)(%\w+)?\]?:\d+")
MAX_USER_AGENT = 500  # characters that are kept of it
ANYONE = "anyone"  # whose calls are not told apart


class Caller(NamedTuple):
    """Where a change comes from, as the audit log keeps it."""

    name: str = ANYONE
    user_id: str | None = None
    address: str | None = None  # None: not from a network
    user_agent: str = ""
    trace_id: str = ""


def caller(context: Context) -> Caller:
    """Return who makes a call."""
    peer = PEER.fullmatch(unquote(context.peer()))
    metadata = dict(context.invocation_metadata() or ())
    return Caller(
        address=peer["address"] if peer else None,
        user_agent=_printable(str(metadata.get("user-agent", ""))[:MAX_USER_AGENT]),
        trace_id=trace_id(context),
    )


def _printable(text: str) -> str:
    """Return it with a mark where a terminal would obey, or the database refuse."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
