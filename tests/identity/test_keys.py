"""API keys are shown once, permit no more than their maker, and end when revoked."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from quantplane import v1 as pb
from quantplane_server.checks import ID, SYMBOL
from quantplane_server.identity import queries
from quantplane_server.identity.checks import AHEAD, EMPTY
from quantplane_server.identity.keys import hash_of, new_secret
from tests.identity.desk import Desk, open_desk
from tests.reference import entries, fetch
from tests.signals import refused, violations

TOMORROW = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)


@pytest.fixture
async def desk(dsn: str) -> AsyncIterator[Desk]:
    """Who serves ann, a viewer, root, an admin, and boss, who manages keys."""
    async with open_desk(dsn) as desk:
        await desk.add()
        await desk.add("boss", "manager")
        await desk.permit("manager", "keys.*", "signals.read")
        yield desk


def key(**fields: Any) -> pb.CreateApiKeyRequest:
    return pb.CreateApiKeyRequest(key=pb.ApiKey(**({"name": "feed 1"} | fields)))


def revoke(key_id: str) -> pb.RevokeApiKeyRequest:
    return pb.RevokeApiKeyRequest(key_id=key_id)


def denied(**metadata: str) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    return grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED", metadata


async def listed(desk: Desk, **fields: Any) -> list[pb.ApiKey]:
    """Return the keys of all pages."""
    request = pb.ListApiKeysRequest(**fields)
    keys = list[pb.ApiKey]()
    while True:
        page = await desk.call(request)
        keys += page.keys
        if not page.next_page_token:
            return keys
        request.page_token = page.next_page_token


def test_a_secret_is_256_random_bits_that_are_known_by_their_look():
    one, other = new_secret(), new_secret()
    assert re.fullmatch("qp_[A-Za-z0-9_-]{43}", one)
    assert one != other and hash_of(one) != hash_of(other)
    assert len(hash_of(one)) == 32


async def test_a_key_is_kept_as_its_hash(desk: Desk):
    made = await desk.call(key(role="feed", strategy_id="s", expires_at=TOMORROW))
    ((hash, row),) = await fetch(
        desk.dsn, "SELECT key_hash, row_to_json(k)::text FROM api_keys AS k"
    )
    assert hash == hash_of(made.secret)
    assert made.secret not in row
    assert made.key.expires_at.ToDatetime(UTC) == TOMORROW
    assert (made.key.role, made.key.strategy_id) == ("feed", "s")
    assert desk.changes == 1


async def test_what_is_omitted_is_the_callers(desk: Desk):
    made = (await desk.call(key(), by="boss")).key
    assert (made.username, made.role, made.strategy_id) == ("boss", "manager", "")
    assert not made.HasField("expires_at")


async def test_a_key_may_be_made_for_another_with_that_users_role(desk: Desk):
    made = (await desk.call(key(username="ann"))).key
    assert (made.username, made.role) == ("ann", "viewer")


async def test_nobody_is_not_given_a_key(desk: Desk):
    unknown = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_USER", {"username": "x"})
    assert await refused(desk.call(key(username="x"))) == unknown


async def test_every_broken_rule_is_told(desk: Desk):
    wrong = key(name="", username=" a", role="\x07", strategy_id="s\n", key_id="x")
    wrong.key.expires_at.FromDatetime(datetime(2020, 1, 1, tzinfo=UTC))
    assert await violations(desk.call(wrong)) == [
        ("key.name", SYMBOL),
        ("key.username", SYMBOL),
        ("key.role", SYMBOL),
        ("key.strategy_id", SYMBOL),
        ("key.expires_at", AHEAD),
        ("key.key_id", EMPTY),
    ]


# --- No more than the caller --------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "metadata"),
    [
        (key(role="admin"), {"resource": "*", "action": "*"}),
        (key(role="strategy"), {"resource": "configurations", "action": "read"}),
        (key(role="unheard of"), {"resource": "*", "action": "*"}),
        (key(username="root", role="manager"), {"resource": "*", "action": "*"}),
        (key(username="root"), {"resource": "*", "action": "*"}),
        (key(username="ann"), {"resource": "portfolio", "action": "read"}),
    ],
    ids=[
        "admin",
        "strategy",
        "unheard of",
        "as an admin",
        "of an admin",
        "of a viewer",
    ],
)
async def test_nobody_makes_a_key_that_permits_more(
    desk: Desk, asked: pb.CreateApiKeyRequest, metadata: dict[str, str]
):
    assert await refused(desk.call(asked, by="boss")) == denied(**metadata)
    assert await listed(desk) == []


async def test_who_may_do_everything_gives_a_role_that_permits_nothing_yet(desk: Desk):
    assert (await desk.call(key(role="unheard of"))).secret


async def test_a_wildcard_covers_its_part(desk: Desk):
    await desk.permit("reader", "keys.read", "signals.read")
    assert (await desk.call(key(role="reader"), by="boss")).secret


async def test_part_of_a_wildcard_does_not_cover_it(desk: Desk):
    await desk.permit("reader", "signals.*")
    refusal = denied(resource="signals", action="*")
    assert await refused(desk.call(key(role="reader"), by="boss")) == refusal


@pytest.mark.parametrize("strategy_id", ["", "other"])
async def test_a_bound_key_makes_none_for_another_strategy(
    desk: Desk, strategy_id: str
):
    call = desk.call(key(strategy_id=strategy_id), by="boss", bound="s")
    assert await refused(call) == denied(strategy_id="s")


# --- List and revoke ----------------------------------------------------------------


async def test_keys_are_listed_by_pages_the_latest_first(desk: Desk):
    for name in "abcde":
        await desk.call(key(name=name, username="ann" if name == "c" else ""))
    assert [k.name for k in await listed(desk, page_size=2)] == list("edcba")
    assert [k.name for k in await listed(desk, username="ann")] == ["c"]
    assert await listed(desk, username="nobody") == []


async def test_a_revoked_key_stays_revoked_since_the_first_time(desk: Desk):
    made = (await desk.call(key())).key
    first = (await desk.call(revoke(made.key_id))).key
    assert first.HasField("revoked_at")
    assert (await desk.call(revoke(made.key_id))).key == first
    assert await listed(desk) == [first]


async def test_one_that_is_not_there_is_unknown(desk: Desk):
    id = "00000000-0000-7000-8000-000000000000"
    unknown = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_KEY", {"key_id": id})
    assert await refused(desk.call(revoke(id))) == unknown
    assert await violations(desk.call(revoke("x"))) == [("key_id", ID)]


async def test_when_a_key_was_used_is_told_and_is_no_change_to_notice(desk: Desk):
    made = (await desk.call(key())).key
    before = await desk.value("SELECT version FROM identity_version")
    async with desk.db.connection() as conn:
        await queries.used(conn, [made.key_id])
    (shown,) = await listed(desk)
    assert shown.HasField("last_used_at")
    assert await desk.value("SELECT version FROM identity_version") == before


async def test_making_and_revoking_are_in_the_audit_log_without_the_secret(desk: Desk):
    made = await desk.call(key(role="feed", strategy_id="s"))
    for _ in range(2):
        await desk.call(revoke(made.key.key_id))
    log = await entries(desk.dsn)
    assert [entry[:3] for entry in log] == [
        ("create", "api_key", made.key.key_id),
        ("revoke", "api_key", made.key.key_id),
    ]
    new = log[0][4]
    assert (new["username"], new["role"], new["strategy_id"]) == ("root", "feed", "s")
    assert "revoked_at" not in log[1][3] and "revoked_at" in log[1][4]
    told = str(log)
    hash = hash_of(made.secret)
    assert made.secret not in told and hash.hex() not in told
