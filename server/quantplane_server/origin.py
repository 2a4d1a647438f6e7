"""Where something comes from that is kept: who caused it, in which trace."""

from typing import NamedTuple


class Origin(NamedTuple):
    """What is kept of a call with what it changes."""

    trace_id: str = ""  # as W3C Trace Context writes it; "": the call had none
    span_id: str = ""  # of the server's span of the call; "": it was not sampled
    actor: str = ""  # as `principal.actor` tells it; "": nobody who is known


NONE = Origin()
SERVER = Origin(actor="server")  # of what nobody asked for; no user has that name
