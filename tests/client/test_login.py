"""A session of a client: logged in, renewed, ended."""

import asyncio

import grpc
import pytest

from quantplane import Client, sync
from quantplane import v1 as pb
from quantplane.login import Session, log_in
from tests.client import until
from tests.client.known import SYMBOLS, serving


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTPLANE_API_KEY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


async def call(client):
    await client.market_data.ListSymbols(SYMBOLS)


async def test_after_a_login_calls_show_the_access_token():
    async with serving() as door, Client(door.target, token="before") as client:
        await client.login("alice", "right")
        await call(client)
    assert door.shown == [None, "Bearer a0"]  # the login itself shows nothing


async def test_a_login_that_fails_changes_nothing():
    async with serving() as door, Client(door.target, token="before") as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await client.login("alice", "wrong")
        await call(client)
    assert door.shown == [None, "Bearer before"]


async def test_the_tokens_are_renewed_in_time(monkeypatch):
    monkeypatch.setattr("quantplane.login.RENEW_S", 0.01)
    async with serving() as door, Client(door.target) as client:
        await client.login("alice", "right")
        while len(door.refreshed) < 3:
            await asyncio.sleep(0.01)
    assert door.refreshed[:3] == ["r0", "r1", "r2"]


async def test_a_machine_that_slept_renews_at_once(monkeypatch):
    monkeypatch.setattr("quantplane.login.LOOK_S", 0.01)
    async with serving() as door, Client(door.target) as client:
        await client.login("alice", "right")
        client._session._at_s -= 3600  # the clock on the wall has gone on
        async with asyncio.timeout(10):
            while not door.refreshed:
                await asyncio.sleep(0.01)


async def test_renewed_by_many_at_once_it_is_exchanged_once():
    async with serving() as door, Client(door.target) as client:
        auth = client.without_credentials()
        session = Session(auth, await log_in(auth, "alice", "right"))
        await asyncio.gather(*(session.renew() for _ in range(20)))
    assert door.refreshed == ["r0"]
    assert session.token() == "a1"


async def test_a_stream_renews_a_token_that_is_not_good_any_more():
    async with serving() as door, Client(door.target) as client:
        await client.login("alice", "right")
        door.good = "none"  # it has expired
        request = pb.StreamQuotesRequest(symbols=["A"])
        async with client.follow(client.market_data.StreamQuotes, request) as quotes:
            await anext(quotes)
    assert door.refreshed == ["r0"]


async def test_a_session_that_has_ended_is_told_and_not_renewed_again(caplog):
    async with serving() as door, Client(door.target) as client:
        auth = client.without_credentials()
        session = Session(auth, pb.Tokens(refresh_token="gone"))
        session._at_s = 0
        await session.run()
    assert door.refreshed == ["gone"]
    assert "the session has ended" in caplog.text
    assert "gone" not in caplog.text


async def test_after_the_logout_nothing_is_renewed(monkeypatch):
    monkeypatch.setattr("quantplane.login.LOOK_S", 0.01)
    async with serving() as door, Client(door.target) as client:
        await client.login("alice", "right")
        renewing = client._renewing
        await client.logout()
        await until(renewing.done)
    assert door.refreshed == []


async def test_the_synchronous_client_logs_in():
    def ask():
        with sync.Client(door.target) as client:
            client.login("alice", "right")
            client.market_data.ListSymbols(SYMBOLS)
            client.logout()

    async with serving() as door:
        await asyncio.to_thread(ask)
    assert door.shown == [None, "Bearer a0"]
