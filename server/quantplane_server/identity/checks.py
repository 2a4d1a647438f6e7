"""The rules of the requests on identity, as their proto comments state them."""

import re
import time
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server.checks import ID, SYMBOL, Checks, is_bound, is_id, is_name
from quantplane_server.origin import SERVER

MAX_PAGE = 1_000
MAX_NAMES = 100  # in a mask
PASSWORD_CHARS = 12, 256
EMAIL_CHARS = 3, 254
UPDATABLE = ("email", "role", "is_active")
ANY = "*"

WORD = re.compile(r"[a-z0-9_]{1,64}")

EMPTY = "must be empty: the server sets it"
PASSWORD = "must be 12 to 256 characters"
GIVEN = "must be given, with at most 256 characters"
EMAIL = "must be 3 to 254 printable characters without space, one of them an @"
WORD_OR_ANY = "must be 1 to 64 of a-z, digits and underscore, or *"
RESERVED = "must not be the name by which events name the server itself"
MASK = "must name email, role or is_active"
AHEAD = "must lie ahead of the server's clock, before the year 10000"


def check_login(request: pb.LoginRequest) -> None:
    with Checks() as check:
        check(is_name(request.username), "username", SYMBOL)
        _check_old(check, request.password, "password")


def check_create_user(request: pb.CreateUserRequest) -> None:
    with Checks() as check:
        user = request.user
        check(is_name(user.username), "user.username", SYMBOL)
        check(user.username != SERVER.actor, "user.username", RESERVED)
        check(is_name(user.role), "user.role", SYMBOL)
        check(is_email(user.email), "user.email", EMAIL)
        _check_new(check, user, "user", ("username", "email", "role"))
        if request.password:
            check(is_password(request.password), "password", PASSWORD)


def check_update_user(request: pb.UpdateUserRequest) -> None:
    with Checks() as check:
        user, paths = request.user, request.update_mask.paths
        check(is_name(user.username), "user.username", SYMBOL)
        _check_mask(check, paths)
        if "role" in paths:
            check(is_name(user.role), "user.role", SYMBOL)
        if "email" in paths:
            check(is_email(user.email), "user.email", EMAIL)


def check_set_password(request: pb.SetPasswordRequest, is_own: bool) -> None:
    with Checks() as check:
        check(is_name(request.username), "username", SYMBOL)
        check(is_password(request.new_password), "new_password", PASSWORD)
        if is_own:
            _check_old(check, request.old_password, "old_password")


def check_username(request: pb.GetUserRequest) -> None:
    with Checks() as check:
        check(is_name(request.username), "username", SYMBOL)


def check_page_size(request: Any) -> None:
    with Checks() as check:
        _check_page_size(check, request)


def check_permission(permission: pb.RolePermission) -> None:
    with Checks() as check:
        check(is_name(permission.role), "permission.role", SYMBOL)
        for field in ("resource", "action"):
            word = getattr(permission, field)
            kept = word == ANY or WORD.fullmatch(word) is not None
            check(kept, f"permission.{field}", WORD_OR_ANY)


def check_create_key(key: pb.ApiKey) -> None:
    settable = ("username", "name", "role", "strategy_id", "expires_at")
    with Checks() as check:
        check(is_name(key.name), "key.name", SYMBOL)
        for field in ("username", "role", "strategy_id"):
            name = getattr(key, field)
            check(not name or is_name(name), f"key.{field}", SYMBOL)
        if key.HasField("expires_at"):
            ahead = is_bound(key.expires_at) and key.expires_at.seconds > time.time()
            check(ahead, "key.expires_at", AHEAD)
        _check_new(check, key, "key", settable)


def check_list_keys(request: pb.ListApiKeysRequest) -> None:
    with Checks() as check:
        name = request.username
        check(not name or is_name(name), "username", SYMBOL)
        _check_page_size(check, request)


def check_key_id(request: pb.RevokeApiKeyRequest) -> None:
    with Checks() as check:
        check(is_id(request.key_id), "key_id", ID)


def is_password(text: str) -> bool:
    least, most = PASSWORD_CHARS
    return least <= len(text) <= most


def is_email(text: str) -> bool:
    least, most = EMAIL_CHARS
    shown = text.isprintable() and not any(c.isspace() for c in text)
    return least <= len(text) <= most and text.count("@") == 1 and shown


def _check_old(check: Checks, password: str, field: str) -> None:
    """Check a password that may be older than the rules of today."""
    check(0 < len(password) <= PASSWORD_CHARS[1], field, GIVEN)


def _check_mask(check: Checks, paths: Sequence[str]) -> None:
    check(0 < len(paths) <= MAX_NAMES, "update_mask", MASK)
    for i, path in enumerate(paths[:MAX_NAMES]):
        check(path in UPDATABLE, f"update_mask.paths[{i}]", MASK)


def _check_new(
    check: Checks, message: Message, at: str, settable: Sequence[str]
) -> None:
    """Check that what callers do not set is empty."""
    for field, _ in message.ListFields():
        check(field.name in settable, f"{at}.{field.name}", EMPTY)


def _check_page_size(check: Checks, request: Any) -> None:
    inside = 0 <= request.page_size <= MAX_PAGE
    check(inside, "page_size", f"must be 0 to {MAX_PAGE:,}")
