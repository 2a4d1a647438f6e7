"""Signals expire: an active one, at its expiration, becomes an expired one.

Any number of processes may do it: each passes over what another has locked.
"""

import asyncio
import logging

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server.db import Database
from quantplane_server.log import Logs, append
from quantplane_server.origin import SERVER
from quantplane_server.signals import queries
from quantplane_server.signals.events import LOG, log_events

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
BATCH = 1_000  # signals in a transaction


class Expiry:
    """Expires signals within about a second."""

    def __init__(self, db: Database, logs: Logs) -> None:
        self._db = db
        self._logs = logs

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                while await self._expire() == BATCH:
                    pass
            except databases.UNAVAILABLE as error:
                logger.warning("signals can't expire, trying again: %r", error)
            except Exception:
                logger.exception("expiring signals failed, trying again")
            await asyncio.sleep(INTERVAL_S)

    async def _expire(self) -> int:
        """Expire a batch of signals; return how many."""
        async with self._db.transaction() as conn:
            due = await queries.lock_due(conn, BATCH)
            if not due:
                return 0
            expired = await queries.set_status(conn, due, pb.SIGNAL_STATUS_EXPIRED)
            events = log_events(pb.SIGNAL_EVENT_TYPE_EXPIRED, expired, SERVER)
            first = await append(conn, LOG, events)
        self._logs.committed(LOG, first, events)
        return len(expired)
