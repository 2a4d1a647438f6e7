"""AdminService: what a server is, how it is doing, and how its storage is."""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

from quantplane import v1 as pb
from quantplane.v1 import admin_pb2_grpc as rpc
from quantplane_server import bus as buses
from quantplane_server.admin import queries
from quantplane_server.admin.maintenance import Task, readable
from quantplane_server.admin.queries import Run, span, stamp
from quantplane_server.admin.status import Process, server_id
from quantplane_server.bus import Bus
from quantplane_server.checks import Checks
from quantplane_server.db import Connection, Database, Edition
from quantplane_server.rpc.interceptor import Context
from quantplane_server.tokens import Tokens, list_purpose

MAX_PAGE = 1_000  # subscriptions, each of which takes some microseconds to tell

EDITIONS = {
    Edition.PLAIN: pb.EDITION_PLAIN,
    Edition.APACHE: pb.EDITION_APACHE,
    Edition.COMMUNITY: pb.EDITION_COMMUNITY,
}


class AdminService(rpc.AdminServiceServicer):
    """Tells of its process, of the database's catalogs, and of the maintenance."""

    def __init__(
        self,
        db: Database,
        reference: Database,
        bus: Bus,
        tasks: Sequence[Task],
        pending_days: Callable[[Connection], Awaitable[int]],
        process: Process,
        tokens: Tokens,
    ) -> None:
        self._db = db
        self._reference = reference
        self._bus = bus
        self._tasks = sorted(tasks, key=lambda task: task.name)
        self._pending_days = pending_days
        self._process = process
        self._tokens = tokens
        self._start_time = datetime.now(UTC)

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        bus_version = ""
        with suppress(*buses.UNAVAILABLE):
            bus_version = await self._bus.version()
        async with self._db.connection() as conn:
            server = await queries.server(conn)
            offset_s = await clock_offset(conn)
        revision = await self._db.schema_revision("timeseries")
        reference_revision = await self._reference.schema_revision("reference")
        return pb.GetServerInfoResponse(
            version=version("quantplane-server"),
            edition=EDITIONS[self._db.edition],
            postgresql_version=server.version,
            timescaledb_version=server.timescaledb_version,
            bus_version=bus_version,
            schema_revision=revision or "",
            reference_schema_revision=reference_revision or "",
            start_time=stamp(self._start_time),
            server_time=stamp(datetime.now(UTC)),
            database_clock_offset=span(timedelta(seconds=offset_s)),
        )

    async def GetServerStatus(
        self, request: pb.GetServerStatusRequest, context: Context
    ) -> pb.GetServerStatusResponse:
        return await self._process.status(self._start_time)

    async def ListSubscriptions(
        self, request: pb.ListSubscriptionsRequest, context: Context
    ) -> pb.ListSubscriptionsResponse:
        with Checks() as check:
            check.page_size(request, MAX_PAGE)
        query, behind = list_purpose(request), 0
        if request.page_token:
            payload = self._tokens.open_page(query, request.page_token)
            behind = int.from_bytes(payload, "big")
        limit = request.page_size or MAX_PAGE
        found = self._process.subscriptions(behind, limit + 1)
        response = pb.ListSubscriptionsResponse(
            subscriptions=found[:limit], server_id=server_id()
        )
        if len(found) > limit:
            last = found[limit - 1].id.to_bytes(8, "big")
            response.next_page_token = self._tokens.page_token(query, last)
        return response

    async def GetStorageReport(
        self, request: pb.GetStorageReportRequest, context: Context
    ) -> pb.GetStorageReportResponse:
        async with self._db.connection() as conn:
            tables = await self._tables(conn)
            runs = await queries.runs(conn)
            pending_days = await self._pending_days(conn)
        if self._reference is not self._db:
            async with self._reference.connection() as conn:
                tables = await queries.tables(conn) | tables
        return pb.GetStorageReportResponse(
            tables=[tables[name] for name in sorted(tables)],
            tasks=[
                _report(task.name, task.description, runs.get(task.name))
                for task in self._tasks
            ],
            pending_days=pending_days,
        )

    async def _tables(self, conn: Connection) -> dict[str, pb.TableReport]:
        """Return the tables of the time series' database by name."""
        tables = await queries.tables(conn)
        retention = await queries.retention(conn)
        if self._db.edition is not Edition.PLAIN:
            tables |= await queries.hypertable_reports(conn)
            retention |= await queries.policy_retention(conn)
            for policy in await queries.policies(conn):
                if policy.table in tables:
                    told = _report(policy.name, policy.description, policy.last_run)
                    tables[policy.table].policies.append(told)
        for name, drop_after in retention.items():
            if name in tables:
                tables[name].retention.FromTimedelta(drop_after)
        return tables


async def clock_offset(conn: Connection) -> float:
    """Return how far the database's clock is ahead of this machine's, in seconds."""
    before = time.time()
    there = await queries.clock(conn)
    return there.timestamp() - (before + time.time()) / 2


def _report(name: str, description: str, last: Run | None) -> pb.TaskReport:
    report = pb.TaskReport(name=name, description=description)
    if last:
        report.last_start_time.FromDatetime(last.started_at)
        report.last_duration.FromTimedelta(last.duration)
        report.last_succeeded = last.succeeded
        report.last_result = readable(last.result)
    return report
