"""The first admin, and whoever is locked out, get in by the database."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quantplane_server.identity.keys import hash_of
from tests.identity.desk import Desk, open_desk
from tests.reference import fetch

COMMAND = Path(sys.executable).with_name("quantplane-server")
NEW = "another horse battery"


@pytest.fixture
async def desk(dsn: str) -> AsyncIterator[Desk]:
    async with open_desk(dsn) as desk:
        yield desk


async def run(desk: Desk, *args: str, stdin: str = "", fails: bool = False) -> str:
    """Run a command; return what it prints, or why it fails."""
    process = await asyncio.create_subprocess_exec(
        *(COMMAND, *args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "QUANTPLANE_POSTGRES_DSN": desk.dsn},
    )
    out, err = await process.communicate(stdin.encode())
    assert (process.returncode == 1) is fails, err.decode()
    assert b"Traceback" not in err
    return (err if fails else out).decode()


async def test_the_first_admin_is_added_and_logs_in(desk: Desk):
    await desk.execute("TRUNCATE users CASCADE")
    await run(desk, "user", "add", "eve", "--email=e@f", "--role=admin", stdin=NEW)
    assert await desk.log_in("eve", NEW)
    by = "SELECT user_id, ip_address, user_agent FROM audit_logs WHERE action='create'"
    assert await fetch(desk.dsn, by) == [(None, None, "quantplane-server")]


async def test_a_user_is_disabled_enabled_and_gets_another_password(desk: Desk):
    await desk.add()
    await run(desk, "user", "disable", "ann")
    assert "ann\tviewer\tdisabled\tann@desk\tnever\n" in await run(desk, "user", "list")
    await run(desk, "user", "enable", "ann")
    await run(desk, "user", "set-password", "ann", stdin=NEW + "\n")
    assert await desk.log_in("ann", NEW)


async def test_a_key_is_made_listed_and_revoked(desk: Desk):
    args = ("root", "rescue", "--role=feed", "--strategy=s", "--days=1")
    secret = (await run(desk, "key", "create", *args)).strip()
    query = "SELECT key_hash, key_id::text FROM api_keys"
    ((hash, id),) = await fetch(desk.dsn, query)
    assert hash == hash_of(secret)
    (line,) = (await run(desk, "key", "list", "--user=root")).splitlines()
    assert line.startswith(f"{id}\troot\trescue\tfeed\ts\texpires ")
    await run(desk, "key", "revoke", id)
    assert "\trevoked 20" in await run(desk, "key", "list")


async def test_what_is_not_there_or_not_right_is_one_sentence(desk: Desk):
    told = await run(desk, "user", "disable", "root", fails=True)
    assert "nobody who may do everything would be left" in told
    told = await run(desk, "user", "set-password", "x", stdin=NEW, fails=True)
    assert "there is no user 'x'" in told
    told = await run(desk, "user", "add", "x", "--email=x", stdin="short", fails=True)
    assert "user.email: must be" in told and "password: must be" in told
    assert "short" not in told
    again = ("user", "add", "root", "--email=x@y", "--no-password")
    assert "there is a user 'root' already" in await run(desk, *again, fails=True)
    assert "key_id: must be" in await run(desk, "key", "revoke", "x", fails=True)


async def test_what_plain_sql_has_written_does_not_reach_the_terminal(desk: Desk):
    await desk.add("\x1b]0;title\x07", "a\nb")
    assert "\x1b" not in await run(desk, "user", "list")
