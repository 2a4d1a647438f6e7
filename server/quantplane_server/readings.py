"""What the gauges of a process read: the parts that it is made of, looked at."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from functools import partial

from quantplane import v1 as pb
from quantplane_server import log
from quantplane_server.admin.backlog import Backlog
from quantplane_server.admin.status import Process
from quantplane_server.audit.queries import position
from quantplane_server.bus import Bus
from quantplane_server.db import Database
from quantplane_server.log import Logs
from quantplane_server.rpc.health import Health
from quantplane_server.streams import Streams
from quantplane_server.telemetry import metrics
from quantplane_server.telemetry.metrics import Look, Reading

logger = logging.getLogger(__name__)

BURST = 100  # streams that are looked at before others have their turn
LOOK_S = 5.0  # between two looks at the streams
HISTORY = pb.SUBSCRIPTION_STATE_HISTORY  # its lag is of the quotes' own times
STALLED = pb.SUBSCRIPTION_STATE_STALLED


async def backends(health: Health) -> AsyncIterator[Reading]:
    for name, backend in health.backends.items():
        yield metrics.BACKEND_UP, backend.up, name


async def backlog(bus: Bus, waiting: Backlog) -> AsyncIterator[Reading]:
    yield metrics.BUS_CAP, bus.cap_bytes
    if waiting.known:
        yield metrics.BUS_UNRECORDED, waiting.unrecorded_bytes
        yield metrics.RECORDER_LAG, waiting.lag_s


async def pools(databases: Iterable[Database]) -> AsyncIterator[Reading]:
    for db in databases:
        pool, name = db.pool(), db.name
        yield metrics.CONNECTIONS, pool.in_use, name, "used"
        yield metrics.CONNECTIONS, pool.size - pool.in_use, name, "idle"
        yield metrics.CONNECTIONS_MAX, pool.max_size, name
        yield metrics.CONNECTIONS_AWAITED, pool.waiting, name


class Subscribers:
    """The streams as they were a moment ago, and which of them do not get on."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._states = Counter[int]()
        self._lag_s = self._pending_bytes = 0.0
        self._stalled: set[int] = set()  # that was told

    async def run(self) -> None:
        """Look now and then, until cancelled; tell of streams that do not get on."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look at all, of which there may be thousands, a few at a time."""
        states, stalled = Counter[int](), set()
        lag_s = pending_bytes = 0.0
        for number, told in enumerate(self._streams.reports()):
            states[told.state] += 1
            pending_bytes = max(pending_bytes, told.pending_bytes)
            if told.state != HISTORY:
                lag_s = max(lag_s, told.lag.ToNanoseconds() / 1e9)
            if told.state == STALLED:
                stalled.add(told.id)
            self._tell(told)
            if number % BURST == BURST - 1:
                await asyncio.sleep(0)
        self._states, self._lag_s, self._pending_bytes = states, lag_s, pending_bytes
        self._stalled = stalled

    def _tell(self, told: pb.Subscription) -> None:
        """Log that a stream has stalled, or gets on again, once."""
        if (told.state == STALLED) == (told.id in self._stalled):
            return
        name = told.method.rpartition("/")[2]
        fields = {
            "method": told.method,
            "peer": told.peer,
            "principal": told.username,
            "key_id": told.key_id,
        }
        if told.state == STALLED:
            said = "%s: the reader has stopped to read: %.1f s behind, %d bytes wait"
            lag_s = told.lag.ToNanoseconds() / 1e9
            arguments: tuple[object, ...] = (name, lag_s, told.pending_bytes)
            logger.warning(said, *arguments, extra={"fields": fields})
        else:
            logger.info("%s: the reader reads again", name, extra={"fields": fields})

    async def readings(self) -> AsyncIterator[Reading]:
        yield metrics.SUBSCRIBER_LAG, self._lag_s
        yield metrics.SUBSCRIBER_PENDING, self._pending_bytes
        for state in pb.SubscriptionState.values():
            name = pb.SubscriptionState.Name(state).removeprefix("SUBSCRIPTION_STATE_")
            if state:
                yield metrics.SUBSCRIPTIONS, self._states[state], name.lower()


async def tails(db: Database, logs: Logs) -> AsyncIterator[Reading]:
    async with db.connection() as conn:
        heads = await log.heads(conn)
    for name, revision in heads.items():
        yield metrics.LOG_REVISION, revision, name
    for name, reached in logs.reached().items():
        yield metrics.TAIL_BEHIND, max(0, heads.get(name, 0) - reached), name


async def audit(
    db: Database, reference: Database, logs: Iterable[str]
) -> AsyncIterator[Reading]:
    for name in logs:
        async with reference.connection() as conn:
            entered = await position(conn, name)
        async with db.connection() as conn:
            entries, lag_s = await log.behind(conn, name, entered.revision)
        yield metrics.AUDIT_BEHIND, entries, name
        yield metrics.AUDIT_LAG, lag_s, name


def of_server(
    process: Process, bus: Bus, logs: Logs, subscribers: Subscribers
) -> list[Look]:
    """Return what a process that serves looks at."""
    databases = dict.fromkeys(process.databases.values())  # they may be one
    return [
        partial(backends, process.health),
        partial(backlog, bus, process.backlog),
        partial(pools, databases),
        subscribers.readings,
        partial(tails, process.databases["db"], logs),
    ]


def of_recorder(db: Database, reference: Database, logs: Iterable[str]) -> list[Look]:
    """Return what a process that records looks at."""
    return [
        partial(pools, dict.fromkeys((db, reference))),
        partial(audit, db, reference, logs),
    ]
