"""Who tries keys and passwords gets no further by trying many at a time."""

import asyncio
from time import monotonic
from typing import Any

import grpc
import pytest

from quantplane import Client, reason_of, retry_s
from quantplane import v1 as pb
from quantplane_server.identity import keys
from quantplane_server.identity.logins import PAIR
from quantplane_server.rpc.auth import WRONG_AT_ONCE, WRONG_PER_S
from tests.attacks.good import PASSWORD
from tests.identity.callers import Channel, Metadata, bearer, named

LIST_SYMBOLS, LOGIN = named("ListSymbols"), named("Login")
GUESSES = 200


async def told(call: Any) -> tuple[str, float]:
    """Return the reason of a refusal, and after which time it says to try again."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return reason_of(raised.value), retry_s(raised.value)


async def test_of_many_wrong_keys_in_flight_few_are_judged(
    calls: Channel, admin: Metadata
):
    began = monotonic()
    served, *answers = await asyncio.gather(
        calls.answer(LIST_SYMBOLS, admin),
        *(
            told(calls.response(LIST_SYMBOLS, bearer(keys.new_secret())))
            for _ in range(GUESSES)
        ),
    )
    assert served == "OK"  # of the same address
    took_s = monotonic() - began
    judged = [answer for answer in answers if answer == ("UNAUTHENTICATED", 0)]
    assert len(judged) <= WRONG_AT_ONCE + took_s * WRONG_PER_S
    slowed = [answer for answer in answers if answer not in judged]
    assert {reason for reason, _ in slowed} == {"RATE_LIMITED"}
    assert all(0 < wait_s <= 1 / WRONG_PER_S for _, wait_s in slowed)


async def test_a_login_is_locked_over_the_wire_and_says_for_how_long(
    client: Client, calls: Channel
):
    user = pb.User(username="joe", email="joe@desk.test", role="viewer")
    await client.user.CreateUser(pb.CreateUserRequest(user=user, password=PASSWORD))
    answers = await asyncio.gather(
        *(
            told(calls.response(LOGIN, (), login("joe", f"guess {number}")))
            for number in range(3 * PAIR.free)
        )
    )
    reasons = [reason for reason, _ in answers]
    assert set(reasons) == {"UNAUTHENTICATED", "LOGIN_LOCKED"}
    assert reasons.count("UNAUTHENTICATED") >= PAIR.free
    assert all(wait_s > 0 for reason, wait_s in answers if reason == "LOGIN_LOCKED")


async def test_a_key_is_no_password_and_a_password_no_key(
    client: Client, calls: Channel, admin: Metadata
):
    user = pb.User(username="joe", email="joe@desk.test", role="viewer")
    await client.user.CreateUser(pb.CreateUserRequest(user=user, password=PASSWORD))
    ((_, shown),) = admin
    secret = shown.removeprefix("Bearer ")
    assert await calls.answer(LOGIN, (), login("test", secret)) == "UNAUTHENTICATED"
    assert await calls.answer(LIST_SYMBOLS, bearer(PASSWORD)) == "UNAUTHENTICATED"


def login(username: str, password: str) -> pb.LoginRequest:
    return pb.LoginRequest(username=username, password=password)
