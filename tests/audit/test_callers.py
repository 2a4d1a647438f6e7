"""Where a change comes from, as it is entered: what callers claim of it is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from struct import pack
from typing import Any

import asyncpg
import grpc
import pytest

from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Database
from quantplane_server.rpc.caller import MAX_USER_AGENT, caller

METHOD = "/test.Changes/Change"


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[Database]:
    db = await Database.open(dsn)
    yield db
    await db.close()


@asynccontextmanager
async def changing(db: Database, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serve a method that enters its call, and nothing else."""

    async def change(request: bytes, context: Any) -> bytes:
        async with db.transaction() as conn:
            await record(conn, caller(context), [Entry("change", "test", "a")])
        return b""

    _, service, name = METHOD.split("/")
    methods = {name: grpc.unary_unary_rpc_method_handler(change)}
    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(service, methods)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(address)
    await server.start()
    yield address.replace(":0", f":{port}")
    await server.stop(0)


async def change(target: str, *metadata: tuple[str, str]) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        await channel.unary_unary(METHOD)(b"", metadata=metadata)


async def only(db: Database) -> asyncpg.Record:
    async with db.connection() as conn:
        (row,) = await conn.fetch(
            "SELECT *, host(ip_address) AS address FROM audit_logs"
        )
        return row


async def test_what_a_caller_says_of_its_address_does_not_count(db: Database):
    names = "x-forwarded-for", "forwarded", "x-real-ip", "ip_address", "peer"
    async with changing(db) as target:
        await change(target, *((name, "for=203.0.113.9") for name in names))
    assert (await only(db))["address"] == "127.0.0.1"


async def test_nor_what_it_says_of_who_it_is(db: Database):
    names = "user-id", "user_id", "x-user"
    async with changing(db) as target:
        user = "00000000-0000-7000-8000-000000000000"
        await change(target, *((name, user) for name in names))
    assert (await only(db))["user_id"] is None


async def test_an_address_may_be_of_the_newer_kind(db: Database):
    async with changing(db, "[::1]:0") as target:
        await change(target)
    assert (await only(db))["address"] == "::1"


async def test_a_call_from_no_network_has_no_address(db: Database, tmp_path: Path):
    async with changing(db, f"unix:{tmp_path}/socket") as target:
        await change(target)
    assert (await only(db))["ip_address"] is None


AGENTS = {
    b"evil\x1b[2J\x1b]0;title\x07": "evil\ufffd[2J\ufffd]0;title\ufffd",
    b"a\0b": "a\ufffdb",
    b"a\r\nb\x7f\x9b": "a\ufffd\ufffdb\ufffd\ufffd",
    "a\u202eb\u2028".encode(): "a\ufffdb\ufffd",
    "Zoë 1.0".encode(): "Zoë 1.0",
    b"x" * 2_000: "x" * MAX_USER_AGENT,
}


@pytest.mark.parametrize("agent", AGENTS, ids=ascii)
async def test_what_a_caller_is_called_can_be_shown_and_kept(
    db: Database, agent: bytes
):
    async with changing(db) as target:
        await _change_as(target, agent)
    assert (await only(db))["user_agent"] == AGENTS[agent]


# --- A client that says what no library would -----------------------------------------


async def _change_as(target: str, agent: bytes) -> None:
    """Call the method over HTTP/2; return when the call has been answered."""
    headers = {
        b":method": b"POST", b":scheme": b"http", b":path": METHOD.encode(),
        b":authority": b"test", b"content-type": b"application/grpc",
        b"te": b"trailers", b"user-agent": agent,
    }  # fmt: skip
    block = b"".join(b"\0" + _text(k) + _text(v) for k, v in headers.items())
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(4, 0, 0, b"")  # SETTINGS
        + _frame(1, 4, 1, block)  # HEADERS, and no more of them
        + _frame(0, 1, 1, bytes(5))  # DATA: an empty message, the last
    )
    async with asyncio.timeout(30):
        while True:
            head = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == 1 and head[4] & 1:  # HEADERS that end the stream
                break
    writer.close()
    await writer.wait_closed()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + pack(">BBI", kind, flags, stream)
    return head + payload


def _text(text: bytes) -> bytes:
    """Return a literal of HPACK."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    size, more = bytearray([127]), len(text) - 127
    while more >= 128:
        size.append(more % 128 + 128)
        more //= 128
    return bytes([*size, more]) + text
