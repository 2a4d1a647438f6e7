"""What GetServerStatus and ListSubscriptions tell of a process."""

import asyncio
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

from quantplane import v1 as pb
from quantplane_server import db as databases
from quantplane_server import log
from quantplane_server.admin.backlog import Backlog
from quantplane_server.admin.queries import stamp
from quantplane_server.db import Database
from quantplane_server.rpc.health import Health
from quantplane_server.streams import Streams
from quantplane_server.telemetry.metrics import QUOTES_ACCEPTED, QUOTES_CONFLATED

LOOK_S = 1.0  # for what must be asked of the database


class Process(NamedTuple):
    """The parts of a server process that have something to tell."""

    streams: Streams
    health: Health
    backlog: Backlog
    databases: Mapping[str, Database]  # by name; "db" has the logs, maybe all

    async def status(self, started_at: datetime) -> pb.GetServerStatusResponse:
        responses, response_bytes = self.streams.sent()
        return pb.GetServerStatusResponse(
            server_id=server_id(),
            start_time=stamp(started_at),
            server_time=stamp(datetime.now(UTC)),
            draining=self.streams.draining,
            streams=len(self.streams),
            max_streams=self.streams.limit,
            responses=responses,
            response_bytes=response_bytes,
            quotes_accepted=int(QUOTES_ACCEPTED.values[()]),
            quotes_conflated=int(QUOTES_CONFLATED.values[()]),
            backends=self._backends(),
            pools=self._pools(),
            bus=self.backlog.status(),
            logs=await self._logs(),
        )

    def subscriptions(self, behind: int, limit: int) -> list[pb.Subscription]:
        """Return the streams with higher ids, at most so many."""
        return list(islice(self.streams.reports(behind), limit))

    def _backends(self) -> Iterator[pb.BackendStatus]:
        for name, backend in sorted(self.health.backends.items()):
            yield pb.BackendStatus(
                name=name,
                up=backend.up,
                change_time=stamp(backend.changed_at),
                problem=backend.problem,
            )

    def _pools(self) -> Iterator[pb.PoolStatus]:
        by_database = {database: name for name, database in self.databases.items()}
        for database, name in by_database.items():
            yield pb.PoolStatus(name=name, **database.pool()._asdict())

    async def _logs(self) -> list[pb.LogStatus]:
        """Return where the logs end; nothing while the database does not say."""
        with suppress(*databases.UNAVAILABLE):
            async with asyncio.timeout(LOOK_S), self.databases["db"].connection() as c:
                heads = await log.heads(c)
            return [pb.LogStatus(log=log, revision=at) for log, at in heads.items()]
        return []


def server_id() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
