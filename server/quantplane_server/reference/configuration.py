"""What servers read from the table `configurations`, each time that they need it.

A value that can't be used counts as not set, and is logged.
"""

import logging
from collections.abc import Callable
from datetime import time
from math import isfinite
from typing import Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from quantplane_server.db import Database
from quantplane_server.reference import queries

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class Setting(NamedTuple, Generic[Value]):
    """A key, what its JSON value means, and what holds where it is not set."""

    key: str
    parse: Callable[[Any], Value]  # raises where the value can't be used
    default: Value


class SessionEnd(NamedTuple):
    """When orders for the day expire."""

    time: time
    zone: ZoneInfo


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    if not isfinite(value):
        raise ValueError("not finite")
    return float(value)


def _interval_s(value: Any) -> float:
    seconds = _number(value)
    if not 1 <= seconds <= 86_400:
        raise ValueError("not 1 to 86,400 s")
    return seconds


def _session_end(value: Any) -> SessionEnd:
    clock, _, zone = value.partition(" ")
    at = time.fromisoformat(clock)
    if at.tzinfo:
        raise ValueError("the zone stands behind the time")
    return SessionEnd(at, ZoneInfo(zone or "UTC"))


# In quote currency, before the first execution.
INITIAL_CASH = Setting("portfolio.initial_cash", _number, 1_000_000.0)
# Between two scheduled snapshots, in s.
SNAPSHOT_INTERVAL = Setting("portfolio.snapshot_interval_s", _interval_s, 60.0)
# "17:00 America/New_York": orders for the day expire then. Not set: only brokers
# expire them.
SESSION_END: Setting[SessionEnd | None] = Setting(
    "orders.session_end", _session_end, None
)


async def configured(db: Database, setting: Setting[Value]) -> Value:
    """Return what a setting is now; `db` holds the reference data."""
    async with db.connection() as conn:
        value = await queries.configured(conn, setting.key)
    if value is None:
        return setting.default
    try:
        return setting.parse(value)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        logger.warning("%s can't be %r (%s)", setting.key, value, error)
        return setting.default
