"""Forged access tokens on the wire, and tokens that are shown for what they are not."""

import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane_server import main
from quantplane_server.db import Database
from quantplane_server.identity.refusals import Refusals
from tests.attacks import good
from tests.attacks.good import PASSWORD
from tests.identity.callers import (
    METHODS,
    Channel,
    Metadata,
    People,
    bearer,
    named,
)

WHO_AM_I = named("WhoAmI")
AN_HOUR_S = 3_600


def encoded(part: bytes) -> str:
    return urlsafe_b64encode(part).decode().rstrip("=")


class Token:
    """A good access token of a user, to be forged."""

    def __init__(self, text: str, key: bytes) -> None:
        self.text = text
        self.header, self.claims, self.signature = (
            urlsafe_b64decode(part + "==") for part in text.split(".")
        )
        self._key = key

    def altered(self, key: bytes | None = None, **changed: Any) -> str:
        """Return it with other claims or headers, signed with the key or another."""
        header, claims = json.loads(self.header), json.loads(self.claims)
        for name, value in changed.items():
            (header if name in ("alg", "kid", "jku", "jwk") else claims)[name] = value
        text = ".".join(encoded(json.dumps(p).encode()) for p in (header, claims))
        digest = hmac.digest(self._key if key is None else key, text.encode(), "sha256")
        return f"{text}.{encoded(digest)}"

    def with_claims(self, **changed: Any) -> str:
        """Return it with other claims and the signature that it has."""
        claims = json.dumps(json.loads(self.claims) | changed).encode()
        parts = (self.header, claims, self.signature)
        return ".".join(encoded(part) for part in parts)


@pytest.fixture
async def noted(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Refusals]:
    """What the server has refused, to be entered when the test says so."""
    db = await Database.open(dsn)
    noted = Refusals(db)
    monkeypatch.setattr(main, "Refusals", lambda reference: noted)
    yield noted
    await db.close()


@pytest.fixture
async def session(noted: Refusals, client: Client) -> pb.Tokens:
    """What the login of a user gives."""
    user = pb.User(username="joe", email="joe@desk.test", role="viewer")
    await client.user.CreateUser(pb.CreateUserRequest(user=user, password=PASSWORD))
    login = pb.LoginRequest(username="joe", password=PASSWORD)
    return (await client.auth.Login(login)).tokens


@pytest.fixture
async def token(session: pb.Tokens, people: People) -> Token:
    secret = await people.conn.fetchval("SELECT secret FROM signing_keys")
    return Token(session.access_token, secret)


def public_key() -> bytes:
    """Return a key that everybody may know, which an RS256 verifier would have."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def forged(token: Token, admin_id: str) -> dict[str, str]:
    now_s = int(datetime.now(UTC).timestamp())
    later_s = now_s + AN_HOUR_S
    unsigned = token.altered(alg="none").rpartition(".")[0] + "."
    return {
        "unsigned": unsigned,
        "of no algorithm, but signed": token.altered(alg="none"),
        "by another key": token.altered(key=b"k" * 32),
        "by no key": token.altered(key=b""),
        "of an unknown key": token.altered(kid="00000000-0000-7000-8000-000000000000"),
        "of a key that is a path": token.altered(key=b"", kid="../../../dev/null"),
        "of a key that is SQL": token.altered(
            key=b"k", kid="x' UNION SELECT 'k' --"
        ),
        "of keys": token.altered(kid=["a", "b"]),
        "with a key that it brings": token.altered(
            key=b"k", jwk={"kty": "oct", "k": encoded(b"k")}, jku="http://127.0.0.1/"
        ),
        "by a public key": token.altered(key=public_key(), alg="RS256"),
        "by a public key, as if shared": token.altered(key=public_key()),
        "expired": token.altered(iat=now_s - 2 * AN_HOUR_S, exp=now_s - AN_HOUR_S),
        "of the future": token.altered(iat=later_s, exp=later_s + 9),
        "for ever": token.altered(iat=now_s, exp=now_s + 365 * 24 * AN_HOUR_S),
        "of another user": token.with_claims(sub=admin_id),
        "of a longer life": token.with_claims(exp=now_s + 2 * AN_HOUR_S),
    }  # fmt: skip


async def test_an_unaltered_token_is_good(token: Token, calls: Channel):
    """Else what follows would be refused for another reason."""
    assert await calls.answer(WHO_AM_I, bearer(token.text)) == "OK"
    assert await calls.answer(WHO_AM_I, bearer(token.altered())) == "OK"


async def test_forged_tokens_are_refused_alike_and_entered_once_without_them(
    token: Token, calls: Channel, noted: Refusals, people: People
):
    query = "SELECT user_id::text FROM users WHERE username = 'test'"
    tokens = forged(token, await people.conn.fetchval(query))
    texts = {}
    for name, text in tokens.items():
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.response(WHO_AM_I, bearer(text))
        texts[name] = (reason_of(raised.value), raised.value.details())
    (one,) = set(texts.values())
    assert one[0] == "UNAUTHENTICATED", texts
    await noted.enter()
    query = "SELECT * FROM audit_logs WHERE action = 'refuse'"
    (row,) = await people.conn.fetch(query)
    assert json.loads(row["new_value"])["calls"] == len(tokens)
    parts = {part for text in tokens.values() for part in text.split(".") if part}
    assert [part for part in parts if part in str(row)] == []


async def test_a_refresh_token_is_no_credential_and_an_access_token_does_not_refresh(
    calls: Channel, client: Client, session: pb.Tokens
):
    for text in (session.refresh_token, session.refresh_token.rstrip("=")):
        assert await calls.answer(WHO_AM_I, bearer(text)) == "UNAUTHENTICATED"
    for name in ("RefreshToken", "Logout"):
        kind = getattr(pb, f"{name}Request")
        request = kind(refresh_token=session.access_token)
        assert await calls.answer(named(name), (), request) == "UNAUTHENTICATED"
    assert await calls.answer(WHO_AM_I, bearer(session.access_token)) == "OK"


async def test_tokens_of_pages_and_of_sessions_are_not_each_other(
    calls: Channel, client: Client, session: pb.Tokens, admin: Metadata
):
    """They are sealed with the same key."""
    page = await client.user.ListUsers(pb.ListUsersRequest(page_size=1))
    assert page.next_page_token
    request = pb.RefreshTokenRequest(refresh_token=page.next_page_token)
    assert await calls.answer(named("RefreshToken"), (), request) == "UNAUTHENTICATED"
    users = pb.ListUsersRequest(page_token=session.refresh_token)
    assert await calls.answer(named("ListUsers"), admin, users) == "INVALID_PAGE_TOKEN"


async def test_a_token_of_one_list_or_stream_is_no_good_for_another(
    calls: Channel, client: Client, admin: Metadata
):
    requests = await good.requests(client)
    page = await client.user.ListUsers(pb.ListUsersRequest(page_size=1))
    stream = calls.begin(named("WatchOrders"), admin)
    while not (response := await stream.read()).resume_token:
        pass
    stream.cancel()
    tokens = {"page_token": page.next_page_token, "resume_token": response.resume_token}
    own = ("ListUsers", "WatchOrders")
    shown = 0
    for method, (name, token) in product(METHODS, tokens.items()):
        if name in method.input_type.fields_by_name and method.name not in own:
            setattr(requests[method.name], name, token)
            answer = await calls.answer(method, admin, requests[method.name])
            assert answer == f"INVALID_{name.upper()}", method.name
            shown += 1
    assert shown > 20
