"""Refused calls in the audit log: each kind once in a while, and how often it came.

One entry for each would let anybody fill the log.
"""

import asyncio
import logging
from typing import NamedTuple

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Database
from quantplane_server.errors import QuantplaneError, Unauthenticated
from quantplane_server.rpc.caller import Caller
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

ENTER_S = 10.0  # between two times at which they are entered
MOST = 100  # kinds that are entered at a time


class Kind(NamedTuple):
    """What is refused alike: a user's calls of a method, or an address's of any."""

    user_id: str | None
    address: str | None
    method: str
    reason: "pb.ErrorReason.ValueType"


class Refused(NamedTuple):
    """The first call of a kind, and how many there were."""

    caller: Caller
    refusal: QuantplaneError
    calls: int


class Refusals:
    """What was refused since it was entered last."""

    def __init__(self, reference: Database) -> None:
        self._db = reference
        self._noted: dict[Kind, Refused] = {}
        self._left_out = 0
        work = "entering refused calls in the audit log"
        self._outage = Outage(logger, work, databases.UNAVAILABLE)

    def note(self, caller: Caller, method: str, refusal: QuantplaneError) -> None:
        """Note a call, to be entered later."""
        if isinstance(refusal, Unauthenticated):
            method = ""  # of whom nothing is known, all that matters is where it is
        kind = Kind(caller.user_id, caller.address, method, refusal.reason)
        if noted := self._noted.get(kind):
            self._noted[kind] = noted._replace(calls=noted.calls + 1)
        elif len(self._noted) < MOST:
            self._noted[kind] = Refused(caller, refusal, 1)
        else:
            self._left_out += 1

    async def run(self) -> None:
        """Enter them now and then, until cancelled."""
        while True:
            await asyncio.sleep(ENTER_S)
            with self._outage:
                await self._try_to_enter()

    async def _try_to_enter(self) -> None:
        try:
            await self.enter()
        except databases.UNAVAILABLE:
            raise
        except Exception:
            self._noted.clear()  # what can't be entered would keep out what can
            raise

    async def enter(self) -> None:
        """Enter what was noted; what can't be stays noted."""
        noted = dict(self._noted)
        if noted:
            async with self._db.transaction() as conn:
                for kind, refused in noted.items():
                    await record(conn, refused.caller, [_entry(kind, refused)])
        for kind, refused in noted.items():
            more = self._noted[kind].calls - refused.calls
            if more:
                self._noted[kind] = refused._replace(calls=more)
            else:
                del self._noted[kind]
        if self._left_out:
            logger.warning("%d refused calls are not entered", self._left_out)
            self._left_out = 0


def _entry(kind: Kind, refused: Refused) -> Entry:
    reason = refused.refusal.reason_name
    told = {"reason": reason, "calls": refused.calls, **refused.refusal.metadata}
    return Entry("refuse", "method", kind.method, new=told)
