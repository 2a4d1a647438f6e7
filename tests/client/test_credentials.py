"""What the calls of a client show, and where it shows nothing."""

import asyncio
import os
import stat

import grpc
import pytest
from grpc.aio import Metadata

from quantplane import Client, Tls, state
from quantplane import sync as synchronous
from quantplane import v1 as pb
from quantplane.client import attribute_of, services
from quantplane.credentials import CredentialProblem, left_key, local_name
from quantplane.state import StateProblem
from quantplane.tls import is_loopback
from tests.client import until
from tests.client.known import SYMBOLS, serving

KEY = "qp_" + 43 * "k"
QUOTES = pb.StreamQuotesRequest(symbols=["A"])


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    monkeypatch.delenv("QUANTPLANE_API_KEY", raising=False)
    monkeypatch.delenv("QUANTPLANE_INSECURE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


async def call(client):
    await client.market_data.ListSymbols(SYMBOLS)


# --- what is shown ------------------------------------------------------------


async def test_every_call_shows_the_token():
    async with serving() as door, Client(door.target, token=KEY) as client:
        await call(client)
        await call(client)
    assert door.shown == [f"Bearer {KEY}"] * 2


async def test_a_stream_shows_the_token():
    async with serving() as door, Client(door.target, token=KEY) as client:
        async with client.follow(client.market_data.StreamQuotes, QUOTES) as quotes:
            await anext(quotes)
    assert door.shown == [f"Bearer {KEY}"]


async def test_a_publisher_shows_the_token():
    async with serving() as door, Client(door.target, token=KEY) as client:
        async with client.publish_quotes() as publisher:
            await publisher.send([])
    assert door.shown == [f"Bearer {KEY}"]


async def test_the_synchronous_client_shows_the_token():
    def ask():
        with synchronous.Client(door.target, token=KEY) as client:
            client.market_data.ListSymbols(SYMBOLS)

    async with serving() as door:
        await asyncio.to_thread(ask)
    assert door.shown == [f"Bearer {KEY}"]


async def test_every_method_of_every_service_shows_it():
    """A stub made of the bare channel would not."""
    async with Client("127.0.0.1:1", token=KEY) as client:
        for service, _ in services():
            stub = getattr(client, attribute_of(service))
            for described in service.methods:
                method = getattr(stub, described.name)
                known = getattr(method, "_method", method)  # below what fills keys
                assert hasattr(method, "credentials") or hasattr(known, "credentials")


async def test_a_callable_gives_the_token_of_each_call():
    given = iter(("one", "two"))
    async with serving() as door, Client(door.target, token=lambda: next(given)) as c:
        await call(c)
        await call(c)
    assert door.shown == ["Bearer one", "Bearer two"]


async def test_the_environment_has_the_key(monkeypatch):
    monkeypatch.setenv("QUANTPLANE_API_KEY", f"{KEY}\n")
    async with serving() as door, Client(door.target) as client:
        await call(client)
    assert door.shown == [f"Bearer {KEY}"]


async def test_a_token_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("QUANTPLANE_API_KEY", "other")
    async with serving() as door, Client(door.target, token=KEY) as client:
        await call(client)
    assert door.shown == [f"Bearer {KEY}"]


async def test_without_any_token_nothing_is_shown():
    async with serving() as door, Client(door.target) as client:
        await call(client)
    assert door.shown == [None]


@pytest.mark.parametrize("kind", [tuple, lambda pairs: Metadata(*pairs)])
async def test_metadata_of_the_caller_is_sent_too(kind):
    seen = []
    async with serving() as door, Client(door.target, token=KEY) as client:
        door._enter = lambda context: seen_of(context, seen)
        await client.market_data.ListSymbols(SYMBOLS, metadata=kind([("x-own", "1")]))
    assert seen[0]["x-own"] == "1"
    assert seen[0]["authorization"] == f"Bearer {KEY}"


async def seen_of(context, seen):
    seen.append(dict(context.invocation_metadata()))


async def test_a_call_may_show_another_token():
    async with serving() as door, Client(door.target, token=KEY) as client:
        other = (("authorization", "Bearer other"),)
        await client.market_data.ListSymbols(SYMBOLS, metadata=other)
    assert door.shown == ["Bearer other"]


def test_a_token_that_is_none_is_not_repeated_in_the_error():
    with pytest.raises(CredentialProblem) as caught:
        Client("127.0.0.1:1", token="secret\nwith a line")
    assert "secret" not in str(caught.value)


# --- where nothing is shown -----------------------------------------------------


@pytest.mark.parametrize("target", ["10.0.0.7:50051", "dns:///desk.example:50051"])
def test_a_credential_is_not_sent_in_plaintext_beyond_loopback(target):
    with pytest.raises(CredentialProblem, match="beyond loopback"):
        Client(target, token=KEY)


async def test_nor_is_a_password():
    async with Client("10.0.0.7:50051") as client:
        with pytest.raises(CredentialProblem, match="beyond loopback"):
            await client.login("alice", "right")


async def test_beyond_loopback_it_is_sent_with_tls():
    async with Client("10.0.0.7:50051", Tls(name="desk"), token=KEY):
        pass


async def test_or_where_the_network_is_said_to_be_closed(monkeypatch):
    monkeypatch.setenv("QUANTPLANE_INSECURE", "true")
    async with Client("10.0.0.7:50051", token=KEY):
        pass


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("dns:///localhost:1", True),
        ("unix:/tmp/s", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("127.0.0.1.example:1", False),
        ("localhost.example:1", False),
        ("dns://8.8.8.8/localhost:1", False),
        ("xds:///127.0.0.1:1", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(target, here):
    assert is_loopback(target) is here


async def test_what_is_for_this_machine_does_not_go_through_a_proxy(monkeypatch):
    asked = []

    async def proxy(reader, writer):
        asked.append(await reader.readline())
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        async with serving() as door, Client(door.target, token=KEY) as client:
            await call(client)
    assert asked == []


# --- the key of this machine's server ---------------------------------------------


async def test_a_client_finds_the_key_of_the_server_at_its_port():
    async with serving() as door:
        with left_key(door.target, KEY):
            async with Client(door.target) as client:
                await call(client)
    assert door.shown == [f"Bearer {KEY}"]


async def test_a_client_that_was_there_first_finds_it_too():
    async with serving() as door, Client(door.target) as client:
        with left_key(door.target, KEY):
            await call(client)
    assert door.shown == [f"Bearer {KEY}"]


async def test_a_client_learns_of_the_next_server_s_key():
    async with serving() as door, Client(door.target) as client:
        for key in ("first", "second"):
            with left_key(door.target, key):
                await call(client)
    assert door.shown == ["Bearer first", "Bearer second"]


def test_only_this_user_may_read_it(tmp_path):
    with left_key("127.0.0.1:5", KEY):
        file = tmp_path / "quantplane" / "up-5.key"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert list(file.parent.iterdir()) == [file]
    assert not file.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_could_read_or_write_is_refused(tmp_path, mode):
    with left_key("127.0.0.1:5", KEY):
        (tmp_path / "quantplane" / "up-5.key").chmod(mode)
        with pytest.raises(StateProblem, match=r"up-5.key: remove it"):
            Client("127.0.0.1:5")
        (tmp_path / "quantplane" / "up-5.key").chmod(0o600)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "quantplane").mkdir()
    (tmp_path / "elsewhere").write_text(KEY)
    (tmp_path / "quantplane" / "up-5.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateProblem, match="can't be read"):
        Client("127.0.0.1:5")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(tmp_path):
    state.write("up-5.key", KEY)
    os.chown(tmp_path / "quantplane" / "up-5.key", 65534, 65534)
    with pytest.raises(StateProblem, match="not a file of this user"):
        Client("127.0.0.1:5")


def test_another_server_s_key_stays_at_the_end():
    with left_key("127.0.0.1:5", KEY):
        state.write("up-5.key", "another")
    assert state.read("up-5.key") == "another"


@pytest.mark.parametrize("address", ["0.0.0.0:5", "10.0.0.7:5", "unix:/tmp/s"])
def test_no_key_is_left_beyond_loopback(address):
    assert local_name(address) is None


# --- streams whose token is not good any more --------------------------------------


async def test_a_stream_is_followed_on_with_the_token_of_now():
    tokens = ["old"]
    async with (
        serving("new") as door,
        Client(door.target, token=lambda: tokens[-1]) as c,
    ):
        stream = c.follow(c.market_data.StreamQuotes, QUOTES)
        door_enter = door._enter

        async def enter(context):
            tokens.append("new")  # as it comes in, another one is there
            await door_enter(context)

        door._enter = enter
        async with stream:
            await anext(stream)
    assert door.shown == ["Bearer old", "Bearer new"]


async def test_a_stream_whose_token_stays_ends():
    async with serving("new") as door, Client(door.target, token="old") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(client.follow(client.market_data.StreamQuotes, QUOTES))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert door.shown == ["Bearer old"]


async def test_a_stream_ends_where_every_token_is_refused():
    numbers = iter(range(100))
    async with serving("new") as door:
        async with Client(door.target, token=lambda: f"t{next(numbers)}") as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(client.follow(client.market_data.StreamQuotes, QUOTES))
    assert len(door.shown) == 2


async def test_a_publisher_goes_on_with_the_token_of_now():
    tokens = ["old"]
    async with (
        serving("new") as door,
        Client(door.target, token=lambda: tokens[-1]) as c,
    ):
        door_enter = door._enter

        async def enter(context):
            tokens.append("new")
            await door_enter(context)

        door._enter = enter
        async with c.publish_quotes() as publisher:
            await publisher.send([])
            await until(lambda: len(door.shown) == 2)
    assert door.shown == ["Bearer old", "Bearer new"]


async def test_a_stream_waits_for_the_key_of_a_server_that_has_just_started():
    async with serving(KEY) as door, Client(door.target) as client:
        stream = client.follow(client.market_data.StreamQuotes, QUOTES)
        waiting = asyncio.create_task(anext(stream))
        while not door.shown:
            await asyncio.sleep(0.01)
        with left_key(door.target, KEY):
            await waiting
    assert door.shown == [None, f"Bearer {KEY}"]
