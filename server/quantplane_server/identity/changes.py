"""Changes of users, permissions and keys: each with its audit entry, in a transaction.

Two rules hold for all of them:

- Nobody gives, takes or touches more than the own role permits: not by a key, not by a
  role, not by the password of somebody else.
- The last active user who may do everything stays so.
"""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Connection, Database
from quantplane_server.errors import (
    EmailTaken,
    EtagMismatch,
    LastAdmin,
    PermissionDenied,
    Unauthenticated,
    UnknownKey,
    UnknownUser,
)
from quantplane_server.identity import queries
from quantplane_server.identity.keys import hash_of, new_secret
from quantplane_server.identity.passwords import NO_PASSWORD
from quantplane_server.identity.queries import Account
from quantplane_server.rpc.caller import Caller

UNSHOWN = {"etag", "last_login_at", "last_used_at"}  # in the audit log


class By(NamedTuple):
    """Who makes a change."""

    caller: Caller
    role: str | None  # None: who has the database, and so may do everything
    strategy_id: str = ""  # that the caller's key is bound to


@asynccontextmanager
async def _changing(db: Database) -> AsyncIterator[Connection]:
    """A transaction that changes what is permitted. Raises LastAdmin at its end."""
    async with db.transaction() as conn:
        await queries.lock(conn)
        had_admin = await queries.has_admin(conn)
        yield conn
        if had_admin and not await queries.has_admin(conn):
            raise LastAdmin  # and the change is undone


# --- Users --------------------------------------------------------------------------


async def create_user(
    db: Database, by: By, asked: pb.User, password_hash: str | None
) -> tuple[pb.User, bool]:
    """Return the user of this name, and whether it is new.

    Raises EmailTaken and PermissionDenied.
    """
    async with _changing(db) as conn:
        await _check_role(conn, by, asked.role)
        if known := await queries.user(conn, asked.username):
            return known, False
        user = await queries.add_user(conn, asked, password_hash or NO_PASSWORD)
        if user is None:
            raise EmailTaken(asked.email)
        await _record(conn, by, "create", "user", user.username, new=user)
        return user, True


async def update_user(
    db: Database, by: By, asked: pb.User, fields: Collection[str]
) -> pb.User:
    """Set fields of a user; return it.

    What is as asked already is returned as it is, whatever the etag: the call is a
    retry. Raises UnknownUser, EmailTaken, EtagMismatch, LastAdmin, PermissionDenied.
    """
    async with _changing(db) as conn:
        old = await _user(conn, asked.username)
        wanted = pb.User()
        wanted.CopyFrom(old)
        for field in fields:
            setattr(wanted, field, getattr(asked, field))
        for role in (old.role, wanted.role):
            await _check_role(conn, by, role)
        if wanted == old:
            return old
        if asked.etag and asked.etag != old.etag:
            raise EtagMismatch(f"user {old.username!r}", old.etag)
        if wanted.email != old.email and await queries.has_email(conn, wanted.email):
            raise EmailTaken(wanted.email)
        new = await queries.set_user(conn, wanted)
        if not new.is_active:
            await queries.end_sessions(conn, new.user_id)
        await _record(conn, by, "update", "user", new.username, old, new)
        return new


async def set_password(
    db: Database,
    by: By,
    username: str,
    password_hash: str,
    known: Account | None = None,
) -> None:
    """Set a password, and end every session of the user.

    `known` is the caller's own account, as its old password was verified; it must still
    be that. Raises UnknownUser, PermissionDenied, Unauthenticated.
    """
    async with _changing(db) as conn:
        account = await queries.account(conn, username, lock=True)
        if account is None:
            raise UnknownUser(username)
        if known is None:
            await check_permits(conn, by, "users", "update")
            await _check_role(conn, by, (await _user(conn, username)).role)
        elif known != account:
            raise Unauthenticated
        await queries.set_password(conn, account.user_id, password_hash)
        await queries.end_sessions(conn, account.user_id)
        await _record(conn, by, "set_password", "user", username)


async def _user(conn: Connection, username: str) -> pb.User:
    user = await queries.user(conn, username)
    if user is None:
        raise UnknownUser(username)
    return user


# --- Permissions --------------------------------------------------------------------


async def grant(db: Database, by: By, asked: pb.RolePermission) -> None:
    """Have a role permit this. Raises PermissionDenied."""
    async with _changing(db) as conn:
        await check_permits(conn, by, asked.resource, asked.action)
        if await queries.grant(conn, asked):
            await _record(conn, by, "grant", "role", asked.role, new=asked)


async def ungrant(db: Database, by: By, asked: pb.RolePermission) -> None:
    """Have a role no longer permit this. Raises LastAdmin and PermissionDenied."""
    async with _changing(db) as conn:
        await check_permits(conn, by, asked.resource, asked.action)
        if await queries.ungrant(conn, asked):
            await _record(conn, by, "revoke", "role", asked.role, asked)


# --- API keys -----------------------------------------------------------------------


async def create_key(db: Database, by: By, asked: pb.ApiKey) -> tuple[pb.ApiKey, str]:
    """Make a key; return it and its secret. Raises UnknownUser, PermissionDenied."""
    if by.strategy_id and asked.strategy_id != by.strategy_id:
        raise PermissionDenied(
            f"your key is bound to strategy {by.strategy_id!r}",
            strategy_id=by.strategy_id,
        )
    async with _changing(db) as conn:
        user = await _user(conn, asked.username)
        asked.role = asked.role or user.role
        await _check_role(conn, by, asked.role)
        if user.username != by.caller.name:  # it acts in the name of that user
            await _check_role(conn, by, user.role)
        secret = new_secret()
        key = await queries.add_key(conn, asked, hash_of(secret))
        await _record(conn, by, "create", "api_key", key.key_id, new=key)
    return key, secret


async def revoke_key(db: Database, by: By, key_id: str) -> pb.ApiKey:
    """Revoke a key, whosever it is; return it. Raises UnknownKey."""
    async with _changing(db) as conn:
        old = await queries.key(conn, key_id)
        if old is None:
            raise UnknownKey(key_id)
        if old.HasField("revoked_at"):
            return old
        await queries.revoke(conn, key_id)
        new = await queries.key(conn, key_id)
        await _record(conn, by, "revoke", "api_key", key_id, old, new)
        assert new
        return new


# --- Rules and records --------------------------------------------------------------


async def _check_role(conn: Connection, by: By, role: str) -> None:
    """Raise PermissionDenied if a role permits more than the caller's."""
    if by.role is None:
        return
    if more := await queries.excess(conn, role, by.role):
        raise _denied(f"role {role!r} permits", more.resource, more.action)


async def check_permits(conn: Connection, by: By, resource: str, action: str) -> None:
    """Raise PermissionDenied if the caller's role does not permit this."""
    if by.role is None:
        return
    if not await queries.permits(conn, by.role, resource, action):
        raise _denied("it takes", resource, action)


def _denied(what: str, resource: str, action: str) -> PermissionDenied:
    return PermissionDenied(
        f"{what} {resource}.{action}, which your role does not permit",
        resource=resource,
        action=action,
    )


async def _record(
    conn: Connection,
    by: By,
    action: str,
    kind: str,
    name: str,
    old: Message | None = None,
    new: Message | None = None,
) -> None:
    entry = Entry(action, kind, name, _audited(old), _audited(new))
    await record(conn, by.caller, [entry])


def _audited(message: Message | None) -> dict[str, Any] | None:
    """Return a row as JSON. Its messages have no hashes, and so no secrets."""
    if message is None:
        return None
    value = MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    return {name: value[name] for name in value if name not in UNSHOWN}
