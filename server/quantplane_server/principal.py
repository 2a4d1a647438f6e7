"""Whom the call that runs is made for.

Set by the layer that has checked the call's credential; a task that serves several
calls, such as the writer of orders, has the one of the first, so it must not ask.
"""

import re
from contextvars import ContextVar
from typing import NamedTuple


class Principal(NamedTuple):
    """Whom a credential stands for, and what it may do."""

    user_id: str
    username: str
    role: str
    key_id: str = ""  # of the API key; empty: an access token or a certificate
    strategy_id: str = ""  # the only one that the key acts for; empty: any
    session_id: str = ""  # of the access token; empty: an API key or a certificate


# As `actor` tells who calls.
ACTOR = re.compile(
    r"(?P<username>.*?)(/(?P<key_id>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}))?"
)

PRINCIPAL: ContextVar[Principal | None] = ContextVar("principal", default=None)


def principal() -> Principal | None:
    """Return whom the call that runs is made for; None where anybody may call."""
    return PRINCIPAL.get()


def actor() -> str:
    """Return who makes the call that runs, as events name it; "" for nobody.

    The user's name, and where it comes with an API key, a slash and the key's id.
    """
    known = PRINCIPAL.get()
    if known is None:
        return ""
    return f"{known.username}/{known.key_id}" if known.key_id else known.username


def parsed(actor: str) -> tuple[str, str | None]:
    """Return the user's name, and the key's id if there is one."""
    match = ACTOR.fullmatch(actor)
    return (match["username"], match["key_id"]) if match else (actor, None)


def bound() -> str:
    """Return the only strategy that the call may be about; empty: any."""
    known = PRINCIPAL.get()
    return known.strategy_id if known else ""


def may_see(strategy_id: str) -> bool:
    """Tell whether what is of a strategy is there for the call."""
    return bound() in ("", strategy_id)
