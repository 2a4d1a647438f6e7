"""Every hostile text in every place of every request, to a server of its own."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import grpc

from quantplane import Client, metadata_of, reason_of, violations_of
from quantplane_server.processes import READY
from tests.attacks import good
from tests.attacks.payloads import TEXTS, called, obeyed, places, write
from tests.client.commands import invoke
from tests.identity.callers import METHODS, Channel, People, bearer, channel, named
from tests.postgres import KEY

AT_A_TIME = 16
PATIENCE_S = 30
HOSTILE = TEXTS["controls"] + TEXTS["invisible"]
COMMAND = Path(sys.executable).with_name("quantplane-server")
TABLES = {
    "users": "SELECT username, email, role, is_active FROM users",
    "permissions": "SELECT role, resource, action FROM permissions",
    "keys": "SELECT key_id::text, role, strategy_id FROM api_keys WHERE name = 'test'",
}
# What shows what is stored.
COMMANDS = [
    "users list", "keys list", "permissions list", "strategies list",
    "strategies show s", "config list", "config get desk.k", "audit --limit 1000",
    "audit --limit 1000 --json", "orders list", "orders executions", "signals list",
    "symbols", "chain A",
]  # fmt: skip


class Answer(NamedTuple):
    """What came of one call."""

    method: str
    field: str
    text: str  # which of TEXTS
    reason: str  # OK, that of the error, or its code
    told: set[str]  # what a terminal may obey of what the server says of the call


class Outcome(NamedTuple):
    good: dict[str, str]  # what the unaltered requests are told
    answers: list[Answer]
    before: dict[str, set[Any]]
    after: dict[str, set[Any]]
    tables: list[set[str]]  # there are, before and after
    shown: dict[str, str]  # by commands
    log: str


async def walk(dsn: str, redis_url: str, folder: Path) -> Outcome:
    """Send them all, show what was stored, and return what came of it."""
    conn = await asyncpg.connect(dsn)
    try:
        async with (
            process(dsn, redis_url, folder / "log") as target,
            Client(target) as client,
            channel(target) as calls,
        ):
            tables = [await _tables(conn)]
            requests = await good.requests(client)
            first = {
                method.name: await calls.answer(
                    method, bearer(KEY), requests[method.name]
                )
                for method in METHODS
            }
            before = await _rows(conn)
            answers = await _alter(calls, requests)
            await _have_logged(calls, conn)
            after = await _rows(conn)
            tables.append(await _tables(conn))
            shown = {}
            for command in COMMANDS:
                done = await invoke(target, *command.split())
                assert done.exit_code == 0, (command, done.stderr)
                shown[command] = done.stdout + done.stderr
    finally:
        await conn.close()
    log = (folder / "log").read_bytes().decode(errors="replace")
    return Outcome(first, answers, before, after, tables, shown, log)


async def _alter(calls: Channel, requests: dict[str, Any]) -> list[Answer]:
    turns, number = asyncio.Semaphore(AT_A_TIME), count(1)

    async def one(method: Any, place: Any, text: str) -> Answer:
        request = type(requests[method.name])()
        request.CopyFrom(requests[method.name])
        good.renew(request, next(number))
        write(request, place, TEXTS[text])
        async with turns, asyncio.timeout(PATIENCE_S):
            reason, told = await _told(calls, method, request)
        return Answer(method.name, called(place), text, reason, told)

    return await asyncio.gather(
        *(
            one(method, place, text)
            for method in METHODS
            for place in places(method.input_type)
            for text in TEXTS
        )
    )


async def _told(calls: Channel, method: Any, request: Any) -> tuple[str, set[str]]:
    try:
        response = await calls.response(method, bearer(KEY), request)
    except grpc.aio.AioRpcError as error:
        pairs = [*metadata_of(error).items(), *violations_of(error)]
        texts = [error.details() or "", reason_of(error), *chain(*pairs)]
        return reason_of(error) or error.code().name, obeyed("".join(texts))
    results = getattr(response, "results", ())  # each with an error of its own
    return "OK", obeyed("".join(result.message for result in results))


async def _have_logged(calls: Channel, conn: asyncpg.Connection) -> None:
    """Have the server log the name of a user that only SQL can have made."""
    people = People(conn)
    user_id = await people.user(HOSTILE, "admin")
    key = await people.key("admin", user_id=user_id, name=HOSTILE)
    stream = calls.begin(named("WatchOrders"), key)
    await stream.read()
    await conn.execute("UPDATE users SET is_active = false WHERE user_id = $1", user_id)
    async with asyncio.timeout(PATIENCE_S):
        with suppress(grpc.aio.AioRpcError):
            while await stream.read():
                pass


async def _rows(conn: asyncpg.Connection) -> dict[str, set[Any]]:
    return {
        name: {tuple(row) for row in await conn.fetch(query)}
        for name, query in TABLES.items()
    }


async def _tables(conn: asyncpg.Connection) -> set[str]:
    query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    return {row[0] for row in await conn.fetch(query)}


@asynccontextmanager
async def process(dsn: str, redis_url: str, log: Path) -> AsyncIterator[str]:
    """Run `quantplane-server serve`, which writes its log to a file."""
    with log.open("wb") as file:
        server = await asyncio.create_subprocess_exec(
            *(COMMAND, "serve"),
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env={
                **os.environ,
                "QUANTPLANE_POSTGRES_DSN": dsn,
                "QUANTPLANE_REDIS_URL": redis_url,
                "QUANTPLANE_LISTEN": "127.0.0.1:0",
            },
        )
    try:
        assert server.stdout
        async with asyncio.timeout(PATIENCE_S):
            line = (await server.stdout.readline()).decode()
        assert line.startswith(READY), f"see {log}"
        yield line.removeprefix(READY).strip()
    finally:
        server.terminate()
        await server.communicate()
