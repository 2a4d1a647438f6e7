"""Orders for the day end with the session, where its end is configured."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server.db import Database
from quantplane_server.orders import queries
from quantplane_server.orders.commands import Change
from quantplane_server.orders.writer import Writer
from quantplane_server.origin import SERVER
from quantplane_server.reference.settings import (
    SESSION_END,
    SessionEnd,
    configured,
)
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

LOOK_S = 1.0
BATCH = 500  # orders in one go
DAY = timedelta(days=1)


class Expiry:
    """Expires what is left of the session. Several processes may do it at once."""

    def __init__(self, db: Database, reference: Database, writer: Writer) -> None:
        self._db = db
        self._reference = reference
        self._writer = writer
        self._outage = Outage(logger, "expiring orders", databases.UNAVAILABLE)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with self._outage:
                await self.expire(datetime.now(UTC))
            await asyncio.sleep(LOOK_S)

    async def expire(self, now: datetime) -> int:
        """Expire the orders from before the last end of a session; return how many."""
        session_end = await configured(self._reference, SESSION_END)
        if session_end is None:
            return 0
        ended = last_end(session_end, now)
        count = 0
        while True:
            async with self._db.connection() as conn:
                ids = await queries.live_for_the_day(conn, ended, BATCH)
            if not ids:
                return count
            outcomes = await self._writer.do([_expired(id, ended) for id in ids])
            for outcome in outcomes:  # the broker may have been first
                if isinstance(outcome, Exception):
                    logger.info("an order did not expire: %s", outcome)
            count += len(ids)


def last_end(session_end: SessionEnd, now: datetime) -> datetime:
    """Return the latest end of a session up to now."""
    local = now.astimezone(session_end.zone)
    end = datetime.combine(local.date(), session_end.time, session_end.zone)
    if end > local:
        end = datetime.combine(local.date() - DAY, session_end.time, session_end.zone)
    return end.astimezone(UTC)


def _expired(order_id: str, ended: datetime) -> Change:
    report = pb.OrderReport(
        order_id=order_id,
        type=pb.ORDER_EVENT_TYPE_EXPIRED,
        text="the session has ended",
    )
    report.time.FromDatetime(ended)
    return Change(report, SERVER)
