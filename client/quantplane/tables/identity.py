"""Users, what their roles permit, and API keys as text."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.tables.rows import print_details, print_rows
from quantplane.tables.text import milliseconds


def print_users(out: IO[str], users: Sequence[pb.User]) -> None:
    print_rows(out, [_user(user) for user in users], ("created", "last login"))


def _user(user: pb.User) -> dict[str, str]:
    return {
        "user": user.username,
        "email": user.email,
        "role": user.role,
        "status": _status(user),
        "last login": _time(user, "last_login_at"),
        "created": milliseconds(user.created_at),
    }


def print_user(out: IO[str], users: Sequence[pb.User]) -> None:
    """Print all there is to know of each."""
    for user in users:
        print_details(out, _user_details(user))


def _user_details(user: pb.User) -> Iterator[tuple[str, str]]:
    yield "user", user.username
    yield "id", user.user_id
    yield "email", user.email
    yield "role", user.role
    yield "status", _status(user)
    yield "created", milliseconds(user.created_at)
    yield "last login", _time(user, "last_login_at") or "never"
    yield "etag", user.etag


def print_keys(out: IO[str], keys: Sequence[pb.ApiKey]) -> None:
    print_rows(out, [_key(key) for key in keys], ("created", "expires", "last used"))


def _key(key: pb.ApiKey) -> dict[str, str]:
    return {
        "key": key.key_id,
        "user": key.username,
        "name": key.name,
        "role": key.role,
        "strategy": key.strategy_id,
        "status": _key_status(key),
        "last used": _time(key, "last_used_at"),
        "expires": _time(key, "expires_at"),
        "created": milliseconds(key.created_at),
    }


def _key_status(key: pb.ApiKey) -> str:
    if key.HasField("revoked_at"):
        return "revoked"
    now = Timestamp()
    now.GetCurrentTime()
    is_over = key.HasField("expires_at") and key.expires_at.seconds <= now.seconds
    return "expired" if is_over else "active"


def print_permissions(out: IO[str], permissions: Sequence[pb.RolePermission]) -> None:
    rows = [
        {"role": each.role, "resource": each.resource, "action": each.action}
        for each in permissions
    ]
    print_rows(out, rows, ())


def print_caller(out: IO[str], callers: Sequence[pb.WhoAmIResponse]) -> None:
    for caller in callers:
        print_details(out, _caller_details(caller))


def _caller_details(caller: pb.WhoAmIResponse) -> Iterator[tuple[str, str]]:
    yield "user", caller.username
    yield "id", caller.user_id
    yield "role", caller.role
    yield "key", caller.key_id or "none: an access token"
    yield "strategy", caller.strategy_id or "any"
    for permission in caller.permissions:
        yield "permission", f"{permission.resource} {permission.action}"


def _status(user: pb.User) -> str:
    return "active" if user.is_active else "disabled"


def _time(message: Any, field: str) -> str:
    """Return a time that may not be there."""
    return milliseconds(getattr(message, field)) if message.HasField(field) else ""
