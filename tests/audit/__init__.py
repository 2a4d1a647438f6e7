"""Short ways to fill the audit log, and to look into it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import asyncpg

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.audit.transcriber import Transcriber
from quantplane_server.db import Database
from quantplane_server.identity.queries import usernames
from quantplane_server.main import LOGS
from quantplane_server.tasks import end
from tests.admin import connected, until


class Row(NamedTuple):
    """What is told of a row; `new` as Python has it."""

    action: str
    type: str
    id: str
    new: Any


async def rows(dsn: str, type: str = "%") -> list[Row]:
    """Return what is entered of resources of a type, in order."""
    query = """
        SELECT action, resource_type, resource_id, new_value FROM audit_logs
         WHERE resource_type LIKE $1 ORDER BY log_id
    """
    async with connected(dsn) as connection:
        found = await connection.fetch(query, type)
    return [Row(*row[:3], json.loads(row[3] or "null")) for row in found]


async def revisions(dsn: str, type: str = "signal") -> list[int]:
    """Return which events are entered, in order."""
    return [row.new["revision"] for row in await rows(dsn, type)]


async def entered(dsn: str, through: int, log: str = "signals") -> None:
    """Return once a log is entered through a revision."""
    query = "SELECT revision >= $1 FROM audit_positions WHERE log = $2"
    async with connected(dsn) as connection:
        await until(lambda: connection.fetchval(query, through, log))


@asynccontextmanager
async def transcribing(
    dsn: str, reference_dsn: str | None = None, processes: int = 1
) -> AsyncIterator[None]:
    """Enter what is in the logs, in so many processes with connections of their own."""
    async with AsyncExitStack() as stack:
        tasks = []
        for _ in range(processes):
            db = reference = await Database.open(dsn)
            stack.push_async_callback(db.close)
            if reference_dsn:
                reference = await Database.open(reference_dsn)
                stack.push_async_callback(reference.close)
            for log in LOGS:
                work = Transcriber(db, reference, usernames, log).run()
                tasks.append(asyncio.create_task(work))
        yield
        await end(*tasks)


async def insert(connection: asyncpg.Connection, **columns: Any) -> int:
    """Enter a row by plain SQL; return its id."""
    columns = {"action": "update", "resource_type": "strategy"} | columns
    numbers = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
    log_id: int = await connection.fetchval(
        f"""
        INSERT INTO audit_logs ({", ".join(columns)}) VALUES ({numbers})
        RETURNING log_id
        """,
        *columns.values(),
    )
    return log_id


async def page(client: Client, **fields: Any) -> pb.ListAuditLogsResponse:
    return await client.audit.ListAuditLogs(pb.ListAuditLogsRequest(**fields))


async def listed(client: Client, **fields: Any) -> list[pb.AuditLog]:
    """Return the entries of all pages."""
    response = await page(client, **fields)
    found = list(response.audit_logs)
    while response.next_page_token:
        fields["page_token"] = response.next_page_token
        response = await page(client, **fields)
        assert response.audit_logs
        found += response.audit_logs
    return found


async def ids(client: Client, **fields: Any) -> list[int]:
    return [entry.log_id for entry in await listed(client, **fields)]
