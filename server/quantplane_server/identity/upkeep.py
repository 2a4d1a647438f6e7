"""What is done about identity now and then, by every server; the first to come does it.

Signing keys get a successor each day, and go when nothing good is signed by them.
Sessions that have expired are ended, so that streams that go on in them are. What is
over is deleted: sessions, failures of logins that are forgotten.
"""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from quantplane_server import db as databases
from quantplane_server.db import Connection, Database
from quantplane_server.identity import access, queries
from quantplane_server.identity.sessions import Changed
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

EVERY_S = 600.0
SESSIONS_KEPT = timedelta(hours=1)  # after their end; their access tokens live shorter


class Upkeep:
    """Awaits `changed` once others must notice what was done."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed
        work = "keeping up sessions and signing keys"
        self._outage = Outage(logger, work, databases.UNAVAILABLE)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with self._outage:  # without any run that works, nobody logs in
                if await upkeep(self._db, datetime.now(UTC)):
                    await self._changed()
            await asyncio.sleep(EVERY_S)


async def upkeep(db: Database, now: datetime) -> bool:
    """Do what is due; tell whether others must notice it."""
    async with db.transaction() as conn:
        await queries.lock(conn)
        await queries.forget_sessions(conn, SESSIONS_KEPT)
        await queries.forget_failures(conn)
        has_expired = await queries.expire_sessions(conn)
        return await _rotate(conn, now) or has_expired


async def _rotate(conn: Connection, now: datetime) -> bool:
    keys = await queries.signing_keys(conn)
    is_due = not keys or keys[0].created_at <= now - access.ROTATED
    if is_due:
        await queries.add_signing_key(conn)
    # The newest stays, however old: nobody could log in until the next one is learnt.
    old = [key.key_id for key in keys[1:] if key.created_at <= now - access.KEPT]
    if old:
        await queries.forget_signing_keys(conn, old)
    return is_due or bool(old)
