"""Users and keys, straight on the database: for the first admin, and for rescue.

The commands may do everything, for who has the database has all. The rules of the
service hold otherwise, and the audit log has what they do, as of nobody.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from quantplane import v1 as pb
from quantplane_server.checks import LAST
from quantplane_server.db import Database
from quantplane_server.identity import changes, checks, queries
from quantplane_server.identity.changes import By
from quantplane_server.identity.passwords import Passwords
from quantplane_server.migrate import check_current
from quantplane_server.pages import LAST_ID
from quantplane_server.rpc.caller import Caller

BY = By(Caller(user_agent="quantplane-server"), role=None)
MOST = 10_000  # users, or keys, that are listed


@asynccontextmanager
async def reference(dsn: str) -> AsyncIterator[Database]:
    """Open the database of users. Raises SchemaOutdated."""
    db = await Database.open(dsn, 1)
    try:
        await check_current(db, "reference")
        yield db
    finally:
        await db.close()


async def add_user(
    dsn: str, username: str, email: str, role: str, password: str
) -> None:
    """Add a user; without a password if it is empty."""
    user = pb.User(username=username, email=email, role=role)
    checks.check_create_user(pb.CreateUserRequest(user=user, password=password))
    hash = await _hash(password) if password else None
    async with reference(dsn) as db:
        _, is_new = await changes.create_user(db, BY, user, hash)
    if not is_new:
        raise ValueError(f"there is a user {username!r} already")


async def set_password(dsn: str, username: str, password: str) -> None:
    asked = pb.SetPasswordRequest(username=username, new_password=password)
    checks.check_set_password(asked, is_own=False)
    async with reference(dsn) as db:
        await changes.set_password(db, BY, username, await _hash(password))


async def set_active(dsn: str, username: str, is_active: bool) -> None:
    user = pb.User(username=username, is_active=is_active)
    checks.check_username(pb.GetUserRequest(username=username))
    async with reference(dsn) as db:
        await changes.update_user(db, BY, user, ["is_active"])


async def user_lines(dsn: str) -> list[str]:
    async with reference(dsn) as db, db.transaction(readonly=True) as conn:
        users = [user async for user in queries.users_after(conn, "", MOST)]
    return [
        _line(
            user.username,
            user.role,
            "active" if user.is_active else "disabled",
            user.email,
            _time(user, "last_login_at") or "never",
        )
        for user in users
    ]


async def create_key(
    dsn: str, username: str, name: str, role: str, strategy_id: str, days: int
) -> tuple[pb.ApiKey, str]:
    """Make a key that expires after so many days, 0: never; return it, its secret."""
    key = pb.ApiKey(username=username, name=name, role=role, strategy_id=strategy_id)
    if days:
        key.expires_at.FromDatetime(datetime.now(UTC) + timedelta(days=days))
    checks.check_create_key(key)
    async with reference(dsn) as db:
        return await changes.create_key(db, BY, key)


async def key_lines(dsn: str, username: str) -> list[str]:
    """List keys, the latest first; of all users for ""."""
    async with reference(dsn) as db, db.connection() as conn:
        keys = await queries.keys_before(conn, username, (LAST, LAST_ID), MOST)
    return [
        _line(key.key_id, key.username, key.name, key.role, key.strategy_id, _fate(key))
        for key in keys
    ]


async def revoke_key(dsn: str, key_id: str) -> None:
    checks.check_key_id(pb.RevokeApiKeyRequest(key_id=key_id))
    async with reference(dsn) as db:
        await changes.revoke_key(db, BY, key_id)


def _fate(key: pb.ApiKey) -> str:
    for field in ("revoked_at", "expires_at"):
        if when := _time(key, field):
            return f"{field.removesuffix('_at')} {when}"
    return "good"


def _time(message: Any, field: str) -> str:
    """Return a time, "" where there is none."""
    return getattr(message, field).ToJsonString() if message.HasField(field) else ""


def _line(*cells: str) -> str:
    """Return a line by tabs. Plain SQL may have written what terminals would act on."""
    return "\t".join(
        "".join(c if c.isprintable() else "\ufffd" for c in cell) for cell in cells
    )


async def _hash(password: str) -> str:
    passwords = Passwords()
    try:
        return await passwords.hash(password)
    finally:
        passwords.close()
