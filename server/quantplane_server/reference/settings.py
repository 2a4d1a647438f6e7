"""The servers' own settings: what they read from the table `configurations`, live.

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

UNUSABLE = (ValueError, KeyError, OSError)  # ZoneInfo raises the latter two


class Setting(NamedTuple, Generic[Value]):
    """A key, what its JSON value means, and what holds where it is not set."""

    key: str
    description: str  # one sentence
    type: str  # of its values, in words
    parse: Callable[[Any], Value]  # raises one of UNUSABLE
    default: Any  # as JSON has it

    def takes(self, value: Any) -> bool:
        """Tell whether it can be set to a JSON value."""
        try:
            self.parse(value)
        except UNUSABLE:
            return False
        return True


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


def _session_end(value: Any) -> SessionEnd | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("not text")
    clock, _, zone = value.partition(" ")
    at = time.fromisoformat(clock)
    if at.tzinfo:
        raise ValueError("the zone stands behind the time")
    return SessionEnd(at, ZoneInfo(zone or "UTC"))


INITIAL_CASH = Setting(
    "portfolio.initial_cash",
    "The account's cash before its first execution, in quote currency.",
    "a finite number",
    _number,
    1_000_000,
)
SNAPSHOT_INTERVAL = Setting(
    "portfolio.snapshot_interval_s",
    "How many seconds lie between two scheduled snapshots of the account.",
    "a number from 1 to 86,400",
    _interval_s,
    60,
)
SESSION_END = Setting(
    "orders.session_end",
    "When a session ends: live DAY orders from before it expire; without it only"
    " brokers expire them.",
    'a time of day and its zone, like "17:00 America/New_York" (no zone: UTC), or null',
    _session_end,
    None,
)
SETTINGS: dict[str, Setting[Any]] = {
    setting.key: setting for setting in (INITIAL_CASH, SNAPSHOT_INTERVAL, SESSION_END)
}


async def configured(db: Database, setting: Setting[Value]) -> Value:
    """Return what a setting is now; `db` holds the reference data."""
    async with db.connection() as conn:
        value = await queries.configured(conn, setting.key)
    if value is not None:
        try:
            return setting.parse(value)
        except UNUSABLE as error:
            logger.warning("%s can't be %r (%s)", setting.key, value, error)
    return setting.parse(setting.default)
