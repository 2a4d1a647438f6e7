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
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
BATCH = 1_000  # signals in a transaction


class Expiry:
    """Expires signals within about a second."""

    def __init__(self, db: Database, logs: Logs) -> None:
        self._db = db
        self._logs = logs
        self._outage = Outage(logger, "expiring signals", databases.UNAVAILABLE)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with self._outage:
                while await self._expire() == BATCH:
                    pass
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
