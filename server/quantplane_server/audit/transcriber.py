"""What happens to orders and signals is entered in the audit log, from their logs.

How far a log is entered is a row in the database of the audit log, moved in the
transaction that enters what lies before it. Any number of processes may transcribe a
log: who finds the row moved by another leaves its page to it.
"""

import asyncio
import logging
from collections.abc import Sequence

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server.audit import queries
from quantplane_server.audit.events import MAKE
from quantplane_server.audit.queries import Entry, Event, Usernames
from quantplane_server.db import Connection, Database
from quantplane_server.errors import Compacted
from quantplane_server.log import (
    NOTHING,
    PAGE,
    PAGE_BYTES,
    START,
    Position,
    check_of,
    read,
)
from quantplane_server.principal import parsed
from quantplane_server.rpc.caller import Caller
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

POLL_S = 1.0


class Transcriber:
    """Enters the events of one log, each once, within about a second."""

    def __init__(
        self, db: Database, reference: Database, usernames: Usernames, log: str
    ) -> None:
        self._db = db
        self._reference = reference
        self._usernames = usernames
        self._log = log
        work = f"entering the log of {log} in the audit log"
        self._outage = Outage(logger, work, databases.UNAVAILABLE)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with self._outage:
                while await self._enter_page():
                    pass
            await asyncio.sleep(POLL_S)

    async def _enter_page(self) -> bool:
        """Enter what follows, at most a page; return whether there may be more."""
        async with self._reference.connection() as conn:
            before = await queries.position(conn, self._log)
        try:
            async with self._db.connection() as conn:
                page = await read(conn, self._log, before)
        except Compacted as gap:
            return await self._enter_gap(before, gap)
        if not page:
            return False
        revision, payload = page[-1]
        through = Position(revision, check_of(payload))
        async with self._reference.transaction() as conn:
            if not await queries.move(conn, self._log, before, through):
                return False
            make = MAKE[self._log]
            events = [make(entry, number) for number, entry in page]
            await queries.enter(conn, events, await self._user_ids(conn, events))
        return len(page) == PAGE or sum(len(entry) for _, entry in page) >= PAGE_BYTES

    async def _user_ids(
        self, conn: Connection, events: Sequence[Event]
    ) -> dict[str, str]:
        """Return the ids of the users whom events name, by their names."""
        names = {parsed(event.origin.actor)[0] for event in events} - {""}
        found = await self._usernames(conn, (), names) if names else {}
        return {name: user_id for user_id, name in found.items()}

    async def _enter_gap(self, before: Position, gap: Compacted) -> bool:
        """Go on from the oldest event that is there, and say so."""
        async with self._db.connection() as conn:
            start = await _start(conn, self._log, gap)
        told = {
            "cause": pb.GapCause.Name(gap.cause).removeprefix("GAP_CAUSE_"),
            "entered_through": before.revision,
            "goes_on_from": start.revision + 1,
        }
        async with self._reference.transaction() as conn:
            if not await queries.move(conn, self._log, before, start):
                return False
            entry = Entry("gap", "log", self._log, new=told)
            await queries.record(conn, Caller(), [entry])
        logger.warning("a gap in the audit log, in the log of %s: %s", self._log, told)
        return True


async def _start(conn: Connection, log: str, gap: Compacted) -> Position:
    """Return the position before the oldest event that is there behind a gap."""
    if gap.cause == pb.GAP_CAUSE_LOG_RESTORED:
        try:
            await read(conn, log, START)
            return START
        except Compacted as trimmed:
            gap = trimmed
    return Position(int(gap.metadata["oldest"]) - 1, NOTHING)
