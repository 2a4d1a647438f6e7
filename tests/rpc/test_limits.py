"""What a connection may cost the server, over real sockets."""

import asyncio
import resource
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from quantplane import Client, Tls
from quantplane import v1 as pb
from quantplane_server import main
from quantplane_server.config import Settings
from quantplane_server.main import serving
from quantplane_server.rpc import auth, interceptor
from tests.identity.callers import outcome
from tests.market_data import quote
from tests.postgres import KEY
from tests.rpc.certificates import Authority, tls_of

SILENT = 2_000
SYMBOLS = pb.ListSymbolsRequest(page_size=1)
METHOD = "/quantplane.v1.MarketDataService/ListSymbols"
LOGIN = "/quantplane.v1.AuthService/Login"
HEALTH = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
OWN = [("grpc.use_local_subchannel_pool", 1)]  # channels to one target share otherwise

# HTTP/2, as bytes.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, PING = 1, 4, 6
END_HEADERS = 4


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


HELLO = PREFACE + frame(SETTINGS)
# POST and http are in HPACK's static table; names and values follow as they are.


# POST and http are in HPACK's static table; names and values follow as they are.
REQUEST = b"\x83\x86" + b"".join(
    b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
    for name, value in {
        b":path": METHOD.encode(),
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        b"authorization": f"Bearer {KEY}".encode(),
    }.items()
)


class Peer(NamedTuple):
    """A connection that says just what it is told to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def closed(self) -> bytes:
        """Return what the server has said when it has closed the connection."""
        said = b""
        try:
            while part := await self.reader.read(65536):
                said += part
        except ConnectionError:
            pass
        return said


@asynccontextmanager
async def peer(target: str, says: bytes = b"") -> AsyncIterator[Peer]:
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(says)
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


Bound = Callable[[dict[str, int]], None]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Bound:
    """Change options of servers that start later."""

    def change(bounds: dict[str, int]) -> None:
        options = dict(main.OPTIONS)
        assert bounds.keys() <= options.keys()
        options |= bounds
        monkeypatch.setattr(main, "OPTIONS", list(options.items()))

    return change


@pytest.fixture
def shorter(bound: Bound) -> None:
    """Bounds of time that a test can wait for."""
    bound(
        {
            "grpc.server_handshake_timeout_ms": 1_500,
            "grpc.max_connection_idle_ms": 2_000,
            "grpc.keepalive_time_ms": 1_000,
            "grpc.http2.ping_timeout_ms": 1_000,
        }
    )


@pytest.fixture
async def target(shorter: None, settings: Settings) -> AsyncIterator[str]:
    async with serving(settings) as target:
        yield target


@pytest.fixture
def many_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(3 * SILENT, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, limits[0]), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
async def test_calls_are_answered_among_silent_connections_which_are_closed_in_the_end(
    shorter: None, settings: Settings, many_files: None, tmp_path: Path, secure: bool
):
    ca = Authority(tmp_path)
    files = tls_of(ca.sign()) if secure else {}
    async with (
        serving(settings.model_copy(update=files)) as target,
        AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(peer(target)) for _ in range(SILENT)]
        tls = Tls(ca.file) if secure else None
        async with Client(target, tls) as client:
            await client.market_data.ListSymbols(SYMBOLS)
        await asyncio.gather(*(each.closed() for each in silent))


@pytest.mark.parametrize(
    "says, why",
    [
        (PREFACE[:9], b"handshake timeout"),
        (PREFACE, b"handshake timeout"),
        (HELLO, b""),
        (HELLO + frame(HEADERS, 0, 1, REQUEST), b""),
        (HELLO + frame(HEADERS, END_HEADERS, 1, REQUEST), b""),
    ],
    ids=["half a preface", "no settings", "no call", "half a header", "no message"],
)
async def test_a_peer_that_stops_half_way_is_cut_off(
    target: str, says: bytes, why: bytes
):
    async with peer(target, says) as stopped:
        assert why in await stopped.closed()


async def test_a_connection_without_calls_is_closed_and_the_next_call_makes_another(
    target: str,
):
    ready = grpc.ChannelConnectivity.READY
    async with grpc.aio.insecure_channel(target, OWN) as channel:
        market_data = pb.MarketDataServiceStub(channel)
        shown = (("authorization", f"Bearer {KEY}"),)
        await market_data.ListSymbols(SYMBOLS, metadata=shown)
        await channel.wait_for_state_change(ready)
        await market_data.ListSymbols(SYMBOLS, metadata=shown)


async def test_a_follower_of_a_quiet_stream_is_not_cut_off(target: str):
    request = pb.StreamQuotesRequest(symbols=["A"])
    async with Client(target) as client, peer(target, HELLO) as idle:
        stream = client.follow(client.market_data.StreamQuotes, request)
        async with stream:
            await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            await idle.closed()  # which has lived as long
            async with Client(target) as feed, feed.publish_quotes() as publisher:
                await publisher.send([quote("A", 1)])
                response = await waiting
                while not response.quotes:
                    response = await anext(stream)
            assert stream.reconnects == 0


@pytest.mark.parametrize("size, taken", [(15 << 10, True), (17 << 10, False)])
async def test_metadata_has_a_limit(target: str, size: int, taken: bool):
    async with Client(target) as client:
        call = client.market_data.ListSymbols(SYMBOLS, metadata=(("k", "v" * size),))
        if taken:
            await call
            return
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "metadata size exceeds" in str(raised.value.details())


async def test_a_message_has_a_limit(target: str):
    async with Client(target) as client:
        call = client.market_data.ListSymbols(
            pb.ListSymbolsRequest(page_token="x" * (4 << 20))
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "4194304" in str(raised.value.details())


async def test_calls_beyond_the_limit_are_refused_until_one_ends(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """One whose message never comes counts as well."""
    monkeypatch.setattr(main, "CALLS", 0)
    settings = settings.model_copy(update={"max_streams": 1})
    begun = HELLO + frame(HEADERS, END_HEADERS, 1, REQUEST)
    async with serving(settings) as target, Client(target) as client:

        async def becomes(wanted: str, tries: int) -> bool:
            for _ in range(tries):
                if await outcome(client.market_data.ListSymbols(SYMBOLS)) == wanted:
                    return True
            return False

        is_refused = False
        while not is_refused:  # the peer's call may be the one, if it comes second
            async with peer(target, begun):
                is_refused = await becomes("RESOURCE_EXHAUSTED", 50)
        assert await becomes("OK", 1_000)  # the peer's end may not be known yet


@pytest.fixture
async def channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    """Of nobody who is known."""
    async with serving(settings) as target:
        async with grpc.aio.insecure_channel(target, OWN) as channel:
            yield channel


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_who_is_not_known_is_refused_before_the_request_has_come(
    channel: grpc.aio.Channel,
):
    assert await outcome(channel.stream_unary(METHOD)(never())) == "UNAUTHENTICATED"


@pytest.mark.parametrize("method", [LOGIN, HEALTH])
async def test_where_nobody_need_be_known_the_request_must_come_in_time(
    channel: grpc.aio.Channel, method: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(interceptor, "REQUEST_S", 0.1)
    assert await outcome(channel.stream_unary(method)(never())) == "DEADLINE_EXCEEDED"


async def test_a_call_without_any_request_is_refused(channel: grpc.aio.Channel):
    async def none() -> AsyncIterator[bytes]:
        for nothing in ():
            yield nothing

    assert await outcome(channel.stream_unary(LOGIN)(none())) == "INVALID_ARGUMENT"


async def test_strangers_of_one_address_leave_calls_to_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(auth, "OF_STRANGERS", 3)
    async with (
        serving(settings) as target,
        Client(target) as client,
        grpc.aio.insecure_channel(target, OWN) as channel,
    ):
        watches = [channel.unary_stream(WATCH)(b"") for _ in range(3)]
        for watch in watches:
            await watch.read()
        assert await outcome(channel.unary_unary(HEALTH)(b"")) == "RATE_LIMITED"
        await client.market_data.ListSymbols(SYMBOLS)


async def test_a_connection_beyond_the_last_is_closed_at_once(
    settings: Settings, bound: Bound
):
    bound({"grpc.max_allowed_incoming_connections": 2})
    async with (
        serving(settings) as target,
        peer(target, HELLO),
        Client(target) as client,
    ):
        await client.market_data.ListSymbols(SYMBOLS)
        async with peer(target) as third:
            assert await third.closed() == b""
        await client.market_data.ListSymbols(SYMBOLS)


async def test_who_pings_too_often_is_told_to_calm_down_and_cut_off(target: str):
    pings = b"".join(frame(PING, payload=b"%8d" % i) for i in range(9))
    async with peer(target, HELLO + frame(SETTINGS, 1) + pings) as abuser:
        assert b"too_many_pings" in await abuser.closed()
