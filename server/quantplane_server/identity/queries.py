"""All SQL on users, what they may do, and how they show who they are.

Who changes users, permissions or keys, or ends sessions, begins with `lock`. Who logs
in or refreshes a session takes no other lock than that on the user, or the session.
"""

import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, NamedTuple

from quantplane import v1 as pb
from quantplane_server.db import Connection
from quantplane_server.identity.access import SigningKey
from quantplane_server.pages import Place

FETCH = 50  # rows read ahead
DOUBLINGS = 10  # of the wait after a failed login; failures beyond are not counted


class Account(NamedTuple):
    """What a login needs to know of a user."""

    user_id: str
    username: str
    password_hash: str
    is_active: bool


class Session(NamedTuple):
    """A session, as it was found by the clock of the database."""

    user_id: str
    username: str
    secret_hash: bytes
    generation: int  # of the latest refresh token
    refreshed: timedelta  # since it was issued
    expires_at: datetime
    is_good: bool  # neither ended nor expired, and its user is active


async def lock(conn: Connection) -> None:
    """Let changes of what is permitted wait for each other, to the transaction's end.

    What a change depends on (that another admin is left) so stays true until it is
    made. Nobody who reads waits.
    """
    await conn.execute("SELECT FROM identity_version FOR NO KEY UPDATE")


# --- Users --------------------------------------------------------------------------

USER = "user_id, username, email, role, is_active, created_at, last_login"


async def add_user(
    conn: Connection, asked: pb.User, password_hash: str
) -> pb.User | None:
    """Add a user; return it, None if the address is another's."""
    row = await conn.fetchrow(
        f"""
        INSERT INTO users (username, email, role, password_hash)
        VALUES ($1, $2, $3, $4) ON CONFLICT (email) DO NOTHING
        RETURNING {USER}
        """,
        *(asked.username, asked.email, asked.role, password_hash),
    )
    return row and _user(row)


async def user(conn: Connection, username: str) -> pb.User | None:
    row = await conn.fetchrow(f"SELECT {USER} FROM users WHERE username = $1", username)
    return row and _user(row)


async def set_user(conn: Connection, asked: pb.User) -> pb.User:
    """Set all of a user that may change."""
    return _user(
        await conn.fetchrow(
            f"""
            UPDATE users SET email = $2, role = $3, is_active = $4
             WHERE username = $1 RETURNING {USER}
            """,
            *(asked.username, asked.email, asked.role, asked.is_active),
        )
    )


async def has_email(conn: Connection, email: str) -> bool:
    found = "SELECT EXISTS (SELECT FROM users WHERE email = $1)"
    return bool(await conn.fetchval(found, email))


async def users_after(
    conn: Connection, username: str, limit: int
) -> AsyncIterator[pb.User]:
    """Yield users behind a name, in order of their names; in a transaction."""
    query = f"""
        SELECT {USER} FROM users WHERE username > $1 COLLATE "C"
         ORDER BY username COLLATE "C" LIMIT $2
    """
    async for row in conn.cursor(query, username, limit, prefetch=FETCH):
        yield _user(row)


async def usernames(
    conn: Connection, user_ids: Collection[str], names: Collection[str]
) -> dict[str, str]:
    """Return the names of users by their ids: of these ids, and of these names."""
    rows = await conn.fetch(
        """
        SELECT user_id::text, username FROM users
         WHERE user_id = ANY ($1::uuid[]) OR username = ANY ($2)
        """,
        list(user_ids),
        list(names),
    )
    return {row["user_id"]: row["username"] for row in rows}


async def has_admin(conn: Connection) -> bool:
    """Tell whether there is an active user whose role permits everything."""
    return bool(
        await conn.fetchval(
            """
            SELECT EXISTS (
                SELECT FROM users JOIN permissions USING (role)
                 WHERE is_active AND resource = '*' AND action = '*'
            )
            """
        )
    )


async def account(
    conn: Connection, username: str, lock: bool = False
) -> Account | None:
    row = await conn.fetchrow(
        f"""
        SELECT user_id::text, username, password_hash, is_active
          FROM users WHERE username = $1 {"FOR NO KEY UPDATE" if lock else ""}
        """,
        username,
    )
    return Account(*row) if row else None


async def set_password(conn: Connection, user_id: str, password_hash: str) -> None:
    await conn.execute(
        "UPDATE users SET password_hash = $2 WHERE user_id = $1", user_id, password_hash
    )


async def logged_in(conn: Connection, user_id: str) -> None:
    await conn.execute(
        "UPDATE users SET last_login = NOW() WHERE user_id = $1", user_id
    )


def _user(row: Any) -> pb.User:
    user = pb.User(
        user_id=str(row["user_id"]),
        username=row["username"],
        email=row["email"],
        role=row["role"],
        is_active=row["is_active"],
    )
    user.created_at.FromDatetime(row["created_at"])
    data = user.SerializeToString(deterministic=True)
    user.etag = blake2b(data, digest_size=8).hexdigest()
    if row["last_login"]:
        user.last_login_at.FromDatetime(row["last_login"])
    return user


# --- What roles permit --------------------------------------------------------------


async def permissions(conn: Connection, limit: int) -> list[pb.RolePermission]:
    rows = await conn.fetch(
        """
        SELECT role, resource, action FROM permissions
         ORDER BY role COLLATE "C", resource COLLATE "C", action COLLATE "C" LIMIT $1
        """,
        limit,
    )
    return [pb.RolePermission(**row) for row in rows]


async def permissions_of(conn: Connection, role: str) -> list[pb.Permission]:
    rows = await conn.fetch(
        """
        SELECT resource, action FROM permissions WHERE role = $1
         ORDER BY resource COLLATE "C", action COLLATE "C"
        """,
        role,
    )
    return [pb.Permission(**row) for row in rows]


async def permits(conn: Connection, role: str, resource: str, action: str) -> bool:
    """Tell whether a role permits this; "*" is everything."""
    return bool(
        await conn.fetchval(
            """
            SELECT EXISTS (
                SELECT FROM permissions
                 WHERE role = $1 AND resource IN ('*', $2) AND action IN ('*', $3)
            )
            """,
            *(role, resource, action),
        )
    )


async def excess(conn: Connection, role: str, held: str) -> pb.Permission | None:
    """Return something that a role permits and the held one does not.

    A role that permits nothing may come to permit anything, and counts so.
    """
    row = await conn.fetchrow(
        """
        WITH asked AS (
            SELECT resource, action FROM permissions WHERE role = $1
            UNION ALL
            SELECT '*', '*' WHERE NOT EXISTS (SELECT FROM permissions WHERE role = $1))
        SELECT resource, action FROM asked
         WHERE NOT EXISTS (
               SELECT FROM permissions AS held
                WHERE held.role = $2 AND held.resource IN ('*', asked.resource)
                  AND held.action IN ('*', asked.action))
         ORDER BY resource COLLATE "C", action COLLATE "C" LIMIT 1
        """,
        role,
        held,
    )
    return pb.Permission(**row) if row else None


async def grant(conn: Connection, asked: pb.RolePermission) -> bool:
    """Add a row; tell whether it was not there."""
    added = await conn.fetchval(
        """
        INSERT INTO permissions (role, resource, action) VALUES ($1, $2, $3)
        ON CONFLICT DO NOTHING RETURNING true
        """,
        *(asked.role, asked.resource, asked.action),
    )
    return added is not None


async def ungrant(conn: Connection, asked: pb.RolePermission) -> bool:
    """Delete a row; tell whether it was there."""
    deleted = await conn.fetchval(
        """
        DELETE FROM permissions WHERE role = $1 AND resource = $2 AND action = $3
        RETURNING true
        """,
        *(asked.role, asked.resource, asked.action),
    )
    return deleted is not None


# --- API keys -----------------------------------------------------------------------

KEY = """
    key_id, username, name, api_keys.role, strategy_id, api_keys.created_at,
    expires_at, last_used_at, revoked_at
"""


async def add_key(conn: Connection, asked: pb.ApiKey, key_hash: bytes) -> pb.ApiKey:
    expires = asked.HasField("expires_at")
    key_id = await conn.fetchval(
        """
        INSERT INTO api_keys (user_id, name, role, strategy_id, expires_at, key_hash)
        SELECT user_id, $2, $3, nullif($4, ''), $5, $6 FROM users WHERE username = $1
        RETURNING key_id::text
        """,
        *(asked.username, asked.name, asked.role, asked.strategy_id),
        *(asked.expires_at.ToDatetime(UTC) if expires else None, key_hash),
    )
    added = await key(conn, key_id)
    assert added
    return added


async def key(conn: Connection, key_id: str) -> pb.ApiKey | None:
    row = await conn.fetchrow(
        f"SELECT {KEY} FROM api_keys JOIN users USING (user_id) WHERE key_id = $1",
        key_id,
    )
    return row and _key(row)


async def keys_before(
    conn: Connection, username: str, place: Place, limit: int
) -> list[pb.ApiKey]:
    """Return keys behind a place, the latest first; of one user or, for "", of all."""
    rows = await conn.fetch(
        f"""
        SELECT {KEY} FROM api_keys JOIN users USING (user_id)
         WHERE (api_keys.created_at, key_id) < ($2, $3) AND $1 IN ('', username)
         ORDER BY api_keys.created_at DESC, key_id DESC LIMIT $4
        """,
        *(username, *place, limit),
    )
    return [_key(row) for row in rows]


async def revoke(conn: Connection, key_id: str) -> None:
    await conn.execute(
        "UPDATE api_keys SET revoked_at = NOW() WHERE key_id = $1", key_id
    )


async def used(conn: Connection, key_ids: Collection[str]) -> None:
    """Enter that keys were used just now."""
    await conn.execute(
        "UPDATE api_keys SET last_used_at = NOW() WHERE key_id = ANY ($1::uuid[])",
        list(key_ids),
    )


def _key(row: Any) -> pb.ApiKey:
    key = pb.ApiKey(
        key_id=str(row["key_id"]),
        username=row["username"],
        name=row["name"],
        role=row["role"],
        strategy_id=row["strategy_id"],
    )
    for field in ("created_at", "expires_at", "last_used_at", "revoked_at"):
        if row[field]:
            getattr(key, field).FromDatetime(row[field])
    return key


# --- Sessions -----------------------------------------------------------------------


async def add_session(
    conn: Connection,
    session_id: str,
    user_id: str,
    secret_hash: bytes,
    life: timedelta,
) -> datetime:
    """Begin a session; return when it expires."""
    expires_at: datetime = await conn.fetchval(
        """
        INSERT INTO sessions (session_id, user_id, secret_hash, expires_at)
        VALUES ($1, $2, $3, NOW() + $4::interval) RETURNING expires_at
        """,
        *(session_id, user_id, secret_hash, life),
    )
    return expires_at


async def surplus_sessions(
    conn: Connection, user_id: str, at_most: int
) -> Sequence[str]:
    """Return the sessions of a user that go on, but for the latest."""
    rows = await conn.fetch(
        """
        SELECT session_id::text FROM sessions WHERE user_id = $1 AND ended_at IS NULL
         ORDER BY created_at DESC, session_id DESC OFFSET $2
        """,
        user_id,
        at_most,
    )
    return [row["session_id"] for row in rows]


async def session(conn: Connection, session_id: str) -> Session | None:
    """Return a session, locked."""
    row = await conn.fetchrow(
        """
        SELECT user_id::text, username, secret_hash, generation,
               clock_timestamp() - refreshed_at, expires_at,
               ended_at IS NULL AND expires_at > clock_timestamp() AND is_active
          FROM sessions JOIN users USING (user_id)
         WHERE session_id = $1 FOR NO KEY UPDATE OF sessions
        """,
        session_id,
    )
    return Session(*row) if row else None


async def refreshed(conn: Connection, session_id: str) -> int:
    """Go on to the next refresh token of a session; return its number."""
    generation: int = await conn.fetchval(
        """
        UPDATE sessions
           SET generation = generation + 1, refreshed_at = clock_timestamp()
         WHERE session_id = $1 RETURNING generation
        """,
        session_id,
    )
    return generation


async def end_session(conn: Connection, session_id: str) -> bool:
    """End a session; tell whether it had not ended."""
    ended = await conn.fetchval(
        """
        UPDATE sessions SET ended_at = NOW()
         WHERE session_id = $1 AND ended_at IS NULL RETURNING true
        """,
        session_id,
    )
    return ended is not None


async def end_sessions(conn: Connection, user_id: str) -> None:
    """End all sessions of a user."""
    await conn.execute(
        "UPDATE sessions SET ended_at = NOW() WHERE user_id = $1 AND ended_at IS NULL",
        user_id,
    )


async def expire_sessions(conn: Connection) -> bool:
    """End the sessions that have expired; tell whether there were any."""
    # Even an update of no row would have all servers look for what has changed.
    expired = "ended_at IS NULL AND expires_at < NOW()"
    found = f"SELECT EXISTS (SELECT FROM sessions WHERE {expired})"
    if not await conn.fetchval(found):
        return False
    await conn.execute(f"UPDATE sessions SET ended_at = NOW() WHERE {expired}")
    return True


async def forget_sessions(conn: Connection, kept: timedelta) -> None:
    """Delete sessions that ended so long ago."""
    await conn.execute(
        "DELETE FROM sessions WHERE ended_at < NOW() - $1::interval", kept
    )


# --- Signing keys -------------------------------------------------------------------


async def signing_keys(conn: Connection) -> list[SigningKey]:
    """Return the keys of access tokens, the newest first."""
    rows = await conn.fetch(
        "SELECT key_id, secret, created_at FROM signing_keys ORDER BY created_at DESC"
    )
    return [SigningKey(*row) for row in rows]


async def add_signing_key(conn: Connection) -> SigningKey:
    """Make a new key."""
    return SigningKey(
        *await conn.fetchrow(
            """
            INSERT INTO signing_keys (key_id, secret) VALUES ($1, $2)
            RETURNING key_id, secret, created_at
            """,
            *(secrets.token_hex(8), secrets.token_bytes(32)),
        )
    )


async def forget_signing_keys(conn: Connection, key_ids: Sequence[str]) -> None:
    await conn.execute("DELETE FROM signing_keys WHERE key_id = ANY ($1)", key_ids)


# --- Failed logins ------------------------------------------------------------------


async def count_failure(
    conn: Connection, subject: str, free: int, forgotten: timedelta, most: timedelta
) -> bool:
    """Count a failed login, unless the subject is locked; tell whether it was not.

    One failure is forgotten after each `forgotten`, so the time at which the last will
    be says how many there are. From the number of `free` on each locks: for a second,
    then twice as long as the one before, `most` at most.
    """
    counted = await conn.fetchval(
        """
        INSERT INTO login_failures AS known (subject, forgotten_at)
        VALUES ($1, statement_timestamp() + $3::interval)
        ON CONFLICT (subject) DO UPDATE SET (forgotten_at, locked_until) = (
            SELECT statement_timestamp() + n * $3::interval,
                   CASE WHEN ceil(n) >= $2::int THEN statement_timestamp()
                        + least(2 ^ (ceil(n) - $2::int) * INTERVAL '1 second',
                                $4::interval) END
              FROM (SELECT least(
                        1 + greatest(extract(epoch FROM known.forgotten_at
                                                        - statement_timestamp()), 0)
                            / extract(epoch FROM $3::interval),
                        $2::int + $5::int)::float8) AS counted (n))
         WHERE coalesce(known.locked_until <= statement_timestamp(), true)
        RETURNING true
        """,
        *(subject, free, forgotten, most, DOUBLINGS),
    )
    return counted is not None


async def locked_s(conn: Connection, subjects: Sequence[str]) -> float:
    """Return how long the last of these is locked."""
    seconds: float = await conn.fetchval(
        """
        SELECT coalesce(max(extract(epoch FROM locked_until - clock_timestamp())), 0)
               ::float8
          FROM login_failures WHERE subject = ANY ($1)
        """,
        subjects,
    )
    return max(seconds, 0.0)


async def take_back(conn: Connection, subject: str, forgotten: timedelta) -> None:
    """Count one failure less, and unlock."""
    await conn.execute(
        """
        UPDATE login_failures
           SET forgotten_at = forgotten_at - $2::interval, locked_until = NULL
         WHERE subject = $1
        """,
        subject,
        forgotten,
    )


async def forgive(conn: Connection, subject: str) -> None:
    """Forget all failures."""
    await conn.execute("DELETE FROM login_failures WHERE subject = $1", subject)


async def forget_failures(conn: Connection) -> None:
    """Delete what says nothing any more."""
    await conn.execute(
        """
        DELETE FROM login_failures
         WHERE forgotten_at < NOW() AND coalesce(locked_until < NOW(), true)
        """
    )


# --- What the directory shows -------------------------------------------------------


class Key(NamedTuple):
    """An API key that is not revoked."""

    key_id: str
    user_id: str
    key_hash: bytes
    role: str
    strategy_id: str  # empty: any
    expires_at: datetime | None


class Picture(NamedTuple):
    """All that calls are judged by, at one time."""

    version: int
    active_users: list[tuple[str, str, str]]  # id, name, role
    keys: list[Key]
    permissions: list[tuple[str, str, str]]  # role, resource, action
    signing_keys: list[SigningKey]
    ended_sessions: list[str]  # for as long as a server may not have heard of it


async def version(conn: Connection) -> int:
    """Return the number of the last change of what the picture shows."""
    number: int = await conn.fetchval("SELECT version FROM identity_version")
    return number


async def picture(conn: Connection) -> Picture:
    """Return the picture; in a transaction of one snapshot."""
    users = await conn.fetch(
        "SELECT user_id::text, username, role FROM users WHERE is_active"
    )
    keys = await conn.fetch(
        """
        SELECT key_id::text, user_id::text, key_hash, role,
               coalesce(strategy_id, ''), expires_at
          FROM api_keys WHERE revoked_at IS NULL
        """
    )
    permissions = await conn.fetch("SELECT role, resource, action FROM permissions")
    ended = await conn.fetch(
        """
        SELECT session_id::text FROM sessions
         WHERE ended_at > now() - interval '1 day'
        """
    )
    return Picture(
        await version(conn),
        [tuple(row) for row in users],
        [Key(*row) for row in keys],
        [tuple(row) for row in permissions],
        await signing_keys(conn),
        [row["session_id"] for row in ended],
    )


# --- Users of the server's own ------------------------------------------------------


async def put_admin(conn: Connection, username: str) -> bool | None:
    """Have an active admin of this name, without a password if new.

    Tell whether the user is new; None: it was so already.
    """
    is_new: bool | None = await conn.fetchval(
        """
        INSERT INTO users (username, email, password_hash, role)
        VALUES ($1, $1 || '@localhost', '!', 'admin')
        ON CONFLICT (username) DO UPDATE SET role = 'admin', is_active = true
            WHERE users.role <> 'admin' OR NOT users.is_active
        RETURNING xmax = 0
        """,
        username,
    )
    return is_new


async def remove_keys(
    conn: Connection, username: str, names: Sequence[str]
) -> list[str]:
    """Remove the keys of these names; return their ids."""
    rows = await conn.fetch(
        """
        DELETE FROM api_keys USING users
         WHERE api_keys.user_id = users.user_id AND username = $1 AND name = ANY ($2)
        RETURNING key_id::text
        """,
        username,
        names,
    )
    return [row["key_id"] for row in rows]
