"""Users, and what their roles permit: who may change them, and how far."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL
from quantplane_server.identity import users
from quantplane_server.identity.checks import (
    EMAIL,
    EMPTY,
    MASK,
    PASSWORD,
    RESERVED,
    WORD_OR_ANY,
)
from tests.identity.desk import PASSWORD as OLD
from tests.identity.desk import UNKNOWN, WRONG, Desk, open_desk
from tests.reference import entries
from tests.signals import refused, violations

NEW = "another horse battery"
REUSED = (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED", {"key": "bob"})
LAST_ADMIN = (grpc.StatusCode.FAILED_PRECONDITION, "LAST_ADMIN", {})


@pytest.fixture
async def desk(dsn: str) -> AsyncIterator[Desk]:
    """Who serves ann, a viewer, root, an admin, and boss, who manages users."""
    async with open_desk(dsn) as desk:
        await desk.add()
        await desk.add("boss", "manager")
        await desk.permit("manager", "users.*", "keys.*", "signals.read")
        yield desk


def unknown(username: str) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    return grpc.StatusCode.NOT_FOUND, "UNKNOWN_USER", {"username": username}


def denied(resource: str, action: str) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    metadata = {"resource": resource, "action": action}
    return grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", metadata


def bob(password: str = "", **fields: Any) -> pb.CreateUserRequest:
    user = pb.User(**({"username": "bob", "email": "bob@desk"} | fields))
    return pb.CreateUserRequest(user=user, password=password)


def password(username: str = "", old: str = "") -> pb.SetPasswordRequest:
    return pb.SetPasswordRequest(username=username, new_password=NEW, old_password=old)


def grant(role: str, resource: str, action: str) -> pb.GrantPermissionRequest:
    permission = pb.RolePermission(role=role, resource=resource, action=action)
    return pb.GrantPermissionRequest(permission=permission)


def revoke(role: str, resource: str, action: str) -> pb.RevokePermissionRequest:
    permission = pb.RolePermission(role=role, resource=resource, action=action)
    return pb.RevokePermissionRequest(permission=permission)


# --- Create -------------------------------------------------------------------------


async def test_a_user_who_is_created_is_active_and_logs_in(desk: Desk):
    created = (await desk.call(bob(OLD, role="trader"))).user
    assert created == await desk.get("bob")
    assert (created.role, created.is_active) == ("trader", True)
    assert created.user_id and created.etag and created.HasField("created_at")
    assert await desk.log_in("bob")
    assert desk.changes == 1


async def test_who_has_no_role_is_a_viewer_and_without_password_logs_in_by_none(
    desk: Desk,
):
    assert (await desk.call(bob())).user.role == "viewer"
    assert await refused(desk.log_in("bob", "!")) == UNKNOWN


async def test_creating_a_user_again_changes_nothing(desk: Desk):
    created = await desk.call(bob(OLD))
    assert await desk.call(bob(OLD)) == created
    assert await desk.call(bob()) == created
    assert [action for action, *_ in await desk.audited()] == ["create"]


@pytest.mark.parametrize(
    "other",
    [bob(OLD, email="b@desk"), bob(OLD, role="trader"), bob(WRONG)],
    ids=["email", "role", "password"],
)
async def test_a_name_is_not_given_twice(desk: Desk, other: pb.CreateUserRequest):
    await desk.call(bob(OLD))
    assert await refused(desk.call(other)) == REUSED
    assert await desk.log_in("bob")


async def test_passwords_are_not_guessed_by_creating(desk: Desk):
    await desk.call(bob(OLD))
    for _ in range(3):
        await refused(desk.call(bob(WRONG)))
    failures = "SELECT count(*) FROM audit_logs WHERE action = 'create_failed'"
    assert await desk.value(failures) == 3
    assert await desk.value("SELECT count(*) FROM login_failures") == 3


async def test_an_address_is_not_given_twice(desk: Desk):
    taken = (
        grpc.StatusCode.ALREADY_EXISTS,
        "EMAIL_TAKEN",
        {"email": "ann@desk"},
    )
    assert await refused(desk.call(bob(email="ann@desk"))) == taken
    await desk.call(bob())
    assert await refused(desk.update("bob", ["email"], email="ann@desk")) == taken


async def test_every_broken_rule_is_told(desk: Desk):
    user = {"username": "a\x1b", "role": " a", "email": "a b@c", "is_active": True}
    assert await violations(desk.call(bob("short", **user, etag="x"))) == [
        ("user.username", SYMBOL),
        ("user.role", SYMBOL),
        ("user.email", EMAIL),
        ("user.is_active", EMPTY),
        ("user.etag", EMPTY),
        ("password", PASSWORD),
    ]


async def test_no_user_has_the_name_of_the_server(desk: Desk):
    user = {"username": "server", "role": "viewer", "email": "a@b"}
    told = [("user.username", RESERVED)]
    assert await violations(desk.call(bob(**user))) == told


@pytest.mark.parametrize("email", ["", "@", "a@b@c", "a\n@b", "a@" + "b" * 253])
async def test_an_address_has_its_form(desk: Desk, email: str):
    assert await violations(desk.call(bob(email=email))) == [("user.email", EMAIL)]


# --- Read ---------------------------------------------------------------------------


async def test_who_is_not_there_is_unknown(desk: Desk):
    calls = [
        desk.call(pb.GetUserRequest(username="x")),
        desk.update("x", ["role"], role="viewer"),
        desk.call(password("x")),
    ]
    for call in calls:
        assert await refused(call) == unknown("x")


async def test_users_are_listed_by_pages_in_order_of_their_names(desk: Desk):
    names, token = list[str](), ""
    while len(names) < 10:
        request = pb.ListUsersRequest(page_size=1, page_token=token)
        page = await desk.call(request)
        names += [user.username for user in page.users]
        token = page.next_page_token
        if not token:
            break
    assert names == ["ann", "boss", "root"]


async def test_a_page_token_of_another_list_is_refused(desk: Desk):
    page = await desk.call(pb.ListUsersRequest(page_size=1))
    request = pb.ListApiKeysRequest(page_token=page.next_page_token)
    _, reason, _ = await refused(desk.call(request))
    assert reason == "INVALID_PAGE_TOKEN"


# --- Update -------------------------------------------------------------------------


async def test_an_update_changes_what_its_mask_names(desk: Desk):
    before = await desk.get()
    after = await desk.update("ann", ["role"], role="trader", email="x@y")
    assert (after.role, after.email) == ("trader", "ann@desk")
    assert after.etag != before.etag
    assert after == await desk.get()


async def test_an_old_etag_is_refused_but_for_a_retry(desk: Desk):
    old = (await desk.get()).etag
    new = await desk.update("ann", ["role"], role="trader", etag=old)
    assert await desk.update("ann", ["role"], role="trader", etag=old) == new
    refusal = await refused(desk.update("ann", ["role"], role="viewer", etag=old))
    assert refusal == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", {"etag": new.etag})


@pytest.mark.parametrize("mask", [[], ["username"], ["password_hash"], ["role", "*"]])
async def test_a_mask_names_what_may_change(desk: Desk, mask: list[str]):
    found = await violations(desk.update("ann", mask, role="trader"))
    assert [rule for _, rule in found] == [MASK]


async def test_who_is_disabled_has_no_session_even_when_enabled_again(desk: Desk):
    tokens = await desk.log_in()
    await desk.update("ann", ["is_active"], is_active=False)
    await desk.update("ann", ["is_active"], is_active=True)
    assert await refused(desk.refresh(tokens.refresh_token)) == UNKNOWN


# --- Passwords ----------------------------------------------------------------------


async def test_users_set_their_own_password_with_the_old_one(desk: Desk):
    tokens = await desk.log_in()
    await desk.call(password(old=OLD), by="ann")
    assert await refused(desk.log_in()) == UNKNOWN
    assert await refused(desk.refresh(tokens.refresh_token)) == UNKNOWN
    assert await desk.log_in(password=NEW)


@pytest.mark.parametrize("username", ["", "root"])
async def test_an_admin_too(desk: Desk, username: str):
    assert await refused(desk.call(password(username, WRONG))) == UNKNOWN
    assert await desk.log_in("root")


async def test_the_old_password_is_guessed_no_faster_than_by_logging_in(desk: Desk):
    for _ in range(5):
        await refused(desk.call(password(old=WRONG), by="ann"))
    await desk.execute(
        "UPDATE login_failures SET locked_until = NOW() + INTERVAL '1 hour'"
        " WHERE locked_until IS NOT NULL"
    )
    _, reason, _ = await refused(desk.call(password(old=OLD), by="ann"))
    assert reason == "LOGIN_LOCKED"
    assert (await refused(desk.log_in()))[1] == "LOGIN_LOCKED"


async def test_who_may_update_users_sets_anybodys_password(desk: Desk):
    await desk.permit("manager", "strategies.read", "portfolio.read")
    await desk.call(password("ann"), by="boss")
    assert await desk.log_in(password=NEW)


async def test_who_may_not_sets_nobodys(desk: Desk):
    call = desk.call(password("root", OLD), by="ann")
    assert await refused(call) == denied("users", "update")
    assert await desk.log_in("root")


@pytest.mark.parametrize("new", ["", "x" * 11, "x" * 257])
async def test_a_password_has_its_length(desk: Desk, new: str):
    request = pb.SetPasswordRequest(username="ann", new_password=new)
    assert await violations(desk.call(request)) == [("new_password", PASSWORD)]


# --- Permissions --------------------------------------------------------------------


async def permitted(desk: Desk, role: str) -> set[tuple[str, str]]:
    rows = (await desk.call(pb.ListPermissionsRequest())).permissions
    assert list(rows) == sorted(rows, key=lambda r: (r.role, r.resource, r.action))
    return {(row.resource, row.action) for row in rows if row.role == role}


async def test_a_role_is_granted_more_once(desk: Desk):
    for _ in range(2):
        await desk.call(grant("viewer", "orders", "*"))
    assert ("orders", "*") in await permitted(desk, "viewer")
    assert [action for action, *_ in await desk.audited()] == ["grant"]


async def test_exactly_the_row_that_is_revoked_is_gone(desk: Desk):
    await desk.call(grant("viewer", "signals", "*"))
    for _ in range(2):
        await desk.call(revoke("viewer", "signals", "read"))
    left = await permitted(desk, "viewer")
    assert ("signals", "*") in left and ("signals", "read") not in left
    assert [action for action, *_ in await desk.audited()] == ["grant", "revoke"]


async def test_a_permission_has_its_form(desk: Desk):
    found = await violations(desk.call(grant("", "Orders", "read,update")))
    assert found == [
        ("permission.role", SYMBOL),
        ("permission.resource", WORD_OR_ANY),
        ("permission.action", WORD_OR_ANY),
    ]


async def test_more_than_an_answer_holds_is_not_listed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(users, "MAX_PERMISSIONS", 3)
    _, reason, _ = await refused(desk.call(pb.ListPermissionsRequest()))
    assert reason == "RESULT_TOO_LARGE"


# --- Nobody gives, takes or touches more than the own role permits -------------------

EVERYTHING = denied("*", "*")
MORE_THAN_A_MANAGER = {
    "create an admin": (bob(role="admin"), EVERYTHING),
    "grant everything": (grant("manager", "*", "*"), EVERYTHING),
    "grant more": (grant("manager", "orders", "read"), denied("orders", "read")),
    "grant any": (grant("manager", "signals", "*"), denied("signals", "*")),
    "revoke more": (revoke("admin", "*", "*"), EVERYTHING),
    "an admin's password": (password("root"), EVERYTHING),
    "a viewer's": (password("ann"), denied("portfolio", "read")),
}


@pytest.mark.parametrize("name", MORE_THAN_A_MANAGER)
async def test_who_manages_users_gives_no_more_than_the_own(desk: Desk, name: str):
    request, refusal = MORE_THAN_A_MANAGER[name]
    assert await refused(desk.call(request, by="boss")) == refusal
    assert await desk.audited() == []
    assert await desk.log_in("root")


async def test_nor_by_making_somebody_an_admin_nor_by_disabling_one(desk: Desk):
    updates = [
        desk.update("boss", ["role"], by="boss", role="admin"),
        desk.update("root", ["is_active"], by="boss"),
        desk.update("root", ["email"], by="boss", email="boss@desk2"),
    ]
    for call in updates:
        assert await refused(call) == EVERYTHING
    assert (await desk.get("boss")).role == "manager"


async def test_but_gives_as_much(desk: Desk):
    await desk.call(grant("reader", "signals", "read"), by="boss")
    await desk.call(bob(role="reader"), by="boss")
    assert (await desk.get("bob")).role == "reader"


# --- The last admin -----------------------------------------------------------------


async def test_the_last_admin_stays(desk: Desk):
    calls = [
        desk.update("root", ["role"], role="viewer"),
        desk.update("root", ["is_active"]),
        desk.call(revoke("admin", "*", "*")),
    ]
    for call in calls:
        assert await refused(call) == LAST_ADMIN
    assert (await desk.get("root")).is_active
    assert await desk.audited() == []


async def test_one_of_two_may_go_but_not_both_at_the_same_time(desk: Desk):
    await desk.add("eve", "admin")
    calls = [desk.update(name, ["is_active"], by=name) for name in ("root", "eve")]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(one, pb.User) for one in outcomes) == 1
    admins = "SELECT count(*) FROM users WHERE role = 'admin' AND is_active"
    assert await desk.value(admins) == 1


async def test_an_admin_who_is_disabled_does_not_count(desk: Desk):
    await desk.add("eve", "admin")
    await desk.update("eve", ["is_active"])
    assert await refused(desk.update("root", ["is_active"])) == LAST_ADMIN


async def test_any_role_that_permits_everything_makes_one(desk: Desk):
    await desk.call(grant("owner", "*", "*"))
    await desk.call(bob(role="owner"))
    assert (await desk.update("root", ["role"], role="viewer")).role == "viewer"


# --- The audit log ------------------------------------------------------------------


async def test_every_change_is_entered_by_whom_with_what_was_and_is(desk: Desk):
    await desk.call(bob(OLD))
    await desk.update("bob", ["role"], role="trader")
    await desk.call(password("bob"))
    await desk.call(grant("viewer", "orders", "read"))
    await desk.call(revoke("viewer", "orders", "read"))
    log = await entries(desk.dsn)
    assert [entry[:3] for entry in log] == [
        ("create", "user", "bob"),
        ("update", "user", "bob"),
        ("set_password", "user", "bob"),
        ("grant", "role", "viewer"),
        ("revoke", "role", "viewer"),
    ]
    update = log[1]
    assert (update[3]["role"], update[4]["role"]) == ("viewer", "trader")
    row = {"role": "viewer", "resource": "orders", "action": "read"}
    assert (log[3][3:], log[4][3:]) == ((None, row), (row, None))
    by = (
        "SELECT count(*) FROM audit_logs JOIN users USING (user_id) WHERE username = $1"
    )
    assert await desk.value(by, "root") == len(log)


async def test_no_password_nor_hash_is_in_it(desk: Desk):
    await desk.call(bob(OLD))
    await desk.call(password("bob"))
    await desk.call(password(old=OLD), by="ann")
    log = str(await entries(desk.dsn))
    assert [text for text in (OLD, NEW, "argon2") if text in log] == []


async def test_what_is_refused_changes_nothing_that_servers_must_notice(desk: Desk):
    before = await desk.value("SELECT version FROM identity_version")
    await refused(desk.update("root", ["is_active"]))
    await refused(desk.call(bob(email="ann@desk")))
    await desk.log_in()
    assert await desk.value("SELECT version FROM identity_version") == before
    assert desk.changes == 0
    await desk.update("ann", ["role"], role="trader")
    assert await desk.value("SELECT version FROM identity_version") > before
