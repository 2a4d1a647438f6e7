"""The users that a server makes for programs of its own machine."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from quantplane_server.identity.keys import hash_of, new_secret
from quantplane_server.identity.local import OwnKey, local_keys, put_keys

LISTEN = "127.0.0.1:50051"


@pytest.fixture
async def conn(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(dsn)
    yield conn
    await conn.close()


async def keys(conn: asyncpg.Connection) -> dict[bytes, str]:
    """Return the roles of the keys of the user "local", by their hashes."""
    rows = await conn.fetch(
        "SELECT key_hash, api_keys.role FROM api_keys JOIN users USING (user_id)"
        " WHERE username = 'local'"
    )
    return {row["key_hash"]: row["role"] for row in rows}


async def test_each_key_has_its_role(dsn: str, conn: asyncpg.Connection):
    async with local_keys(dsn, LISTEN) as secrets:
        assert await keys(conn) == {
            hash_of(secrets.admin): "admin",
            hash_of(secrets.broker): "broker",
            hash_of(secrets.strategy): "strategy",
        }


async def test_they_are_gone_at_the_end(dsn: str, conn: asyncpg.Connection):
    async with local_keys(dsn, LISTEN):
        pass
    assert await keys(conn) == {}


async def test_those_that_a_killed_server_left_are_replaced(
    dsn: str, conn: asyncpg.Connection
):
    killed = local_keys(dsn, LISTEN)
    left = await killed.__aenter__()
    async with local_keys(dsn, LISTEN):
        assert hash_of(left.admin) not in await keys(conn)
        assert len(await keys(conn)) == 3


async def test_those_of_a_server_elsewhere_stay(dsn: str, conn: asyncpg.Connection):
    async with local_keys(dsn, LISTEN) as one, local_keys(dsn, "127.0.0.1:1"):
        assert hash_of(one.admin) in await keys(conn)


async def test_a_key_that_the_user_has_made_stays(dsn: str, conn: asyncpg.Connection):
    own = OwnKey("mine", "viewer", new_secret())
    async with local_keys(dsn, LISTEN):
        await put_keys(dsn, "local", [own])
    assert await keys(conn) == {hash_of(own.secret): "viewer"}


async def test_nobody_logs_in_as_this_user(dsn: str, conn: asyncpg.Connection):
    async with local_keys(dsn, LISTEN):
        pass
    password = "SELECT password_hash FROM users WHERE username = 'local'"
    assert await conn.fetchval(password) == "!"


async def test_a_user_who_was_disabled_is_let_in_again(
    dsn: str, conn: asyncpg.Connection
):
    async with local_keys(dsn, LISTEN):
        pass
    await conn.execute("UPDATE users SET is_active = false WHERE username = 'local'")
    async with local_keys(dsn, LISTEN):
        pass
    active = "SELECT is_active FROM users WHERE username = 'local'"
    assert await conn.fetchval(active)


async def test_the_audit_log_has_it_without_the_secrets(
    dsn: str, conn: asyncpg.Connection
):
    async with local_keys(dsn, LISTEN) as secrets:
        pass
    rows = await conn.fetch("SELECT * FROM audit_logs ORDER BY log_id")
    done = [(row["action"], row["resource_type"]) for row in rows]
    assert done == [("create", "user"), *3 * [("create", "api_key")],
                    *3 * [("delete", "api_key")]]  # fmt: skip
    for secret in secrets:
        assert secret not in str(rows)
        assert hash_of(secret).hex() not in str(rows)
