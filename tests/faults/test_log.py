"""The durable log while what it stands on is killed."""

import asyncio
from contextlib import AsyncExitStack, suppress

from quantplane_server.db import UNAVAILABLE
from quantplane_server.log import append
from quantplane_server.tasks import end
from tests.faults import Desk
from tests.logs import Process, Reader, event, process

ROUNDS = 2


async def test_readers_get_each_entry_once_while_everything_is_killed(desk: Desk):
    """Two processes write and read; PostgreSQL and Valkey go away in turns."""
    numbers = iter(range(1, 1_000_000))
    committed: set[int] = set()

    async def write(process: Process) -> None:
        while True:
            number = next(numbers)
            try:
                async with process.db.transaction() as conn:
                    first = await append(conn, "signals", [event(number)])
            except UNAVAILABLE:
                await asyncio.sleep(0.05)
                continue
            process.logs.committed("signals", first, [event(number)])
            committed.add(number)
            await asyncio.sleep(0.002)

    async with AsyncExitStack() as stack:
        processes = [
            await stack.enter_async_context(process(desk.dsn, desk.valkey.address))
            for _ in range(2)
        ]
        readers = [
            await stack.enter_async_context(Reader(process)) for process in processes
        ]
        writers = [asyncio.create_task(write(process)) for process in processes * 2]
        for _ in range(ROUNDS):
            for service in desk.valkey, desk.postgres:
                await desk.pause()
                await desk.restart(service)
        await desk.pause()
        await end(*writers)
        async with processes[0].db.connection() as conn:
            rows = await conn.fetch("SELECT revision FROM event_log ORDER BY revision")
        revisions = [row["revision"] for row in rows]
        assert revisions == list(range(1, len(revisions) + 1))
        for reader in readers:
            with suppress(TimeoutError):
                await reader.reached(len(revisions))
            assert reader.revisions == revisions
            assert committed <= set(reader.numbers)
            assert len(set(reader.numbers)) == len(reader.numbers)
