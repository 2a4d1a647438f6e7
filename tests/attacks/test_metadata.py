"""Metadata of the wrong kind, by a library and by bytes of the attacker's own."""

import asyncio
import re

import grpc
import pytest

from quantplane_server.identity import keys
from tests.conftest import Server
from tests.identity.callers import Channel, Metadata, named
from tests.postgres import KEY
from tests.rpc.test_limits import END_HEADERS, HEADERS, HELLO, METHOD, frame, peer

LIST_SYMBOLS = named("ListSymbols")
DATA, END_STREAM = 0, 1
EMPTY = bytes(5)  # a message without fields, and its length
STATUS = re.compile(rb"grpc-status[\x01\x02](\d+)")
GOOD = b"Bearer " + KEY.encode()
HOSTILE = b"\x1b]0;title\x07\r\nE root: forged"


SENT = [
    ([("authorization", f"Bearer {KEY}")] * 2, "UNAUTHENTICATED"),
    (
        [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")],
        "UNAUTHENTICATED",
    ),
    ([("authorization", f"Bearer {KEY}, Bearer {KEY}")], "UNAUTHENTICATED"),
    ([("authorization", f"bEARER {KEY}")], "OK"),
    ([("authorization", f"Bearer  {KEY}")], "UNAUTHENTICATED"),
    ([("authorization", f"Bearer{KEY}")], "UNAUTHENTICATED"),
    ([("authorization", KEY)], "UNAUTHENTICATED"),
    ([("authorization", "")], "UNAUTHENTICATED"),
    ([("authorization", "Bearer " + "x" * 15_000)], "UNAUTHENTICATED"),
    ([("authorization", "Bearer qp_" + "x" * 15_000)], "UNAUTHENTICATED"),
    ([("authorization", "Bearer " + "." * 15_000)], "UNAUTHENTICATED"),
    ([("authorization", "Bearer " + "x" * 17_000)], "RESOURCE_EXHAUSTED"),
    ([("authorization-bin", GOOD)], "UNAUTHENTICATED"),
    ([("x-authorization", f"Bearer {KEY}")], "UNAUTHENTICATED"),
    ([("cookie", f"authorization=Bearer {KEY}")], "UNAUTHENTICATED"),
    ([("as", "test"), ("bound", "s")], "UNAUTHENTICATED"),
    (
        [("authorization", f"Bearer {KEY}"), ("x-bin", bytes(range(256)))],
        "OK",
    ),
    (
        [("authorization", f"Bearer {KEY}"), ("traceparent-bin", b"\0\xff")],
        "OK",
    ),
]


async def test_a_credential_is_one_header_of_one_kind(calls: Channel):
    told = [await calls.answer(LIST_SYMBOLS, sent) for sent, _ in SENT]
    assert told == [answer for _, answer in SENT]


def header(name: bytes, value: bytes) -> bytes:
    """Return a header for HPACK to take as it is."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


# POST and http are in HPACK's static table.
REQUEST = (
    b"\x83\x86"
    + header(b":path", METHOD.encode())
    + header(b":authority", b"localhost")
    + header(b"content-type", b"application/grpc")
    + header(b"te", b"trailers")
)


async def status(target: str, headers: bytes) -> grpc.StatusCode | None:
    """Return what a call with these headers is told; None: nothing of gRPC."""
    call = frame(HEADERS, END_HEADERS, 1, REQUEST + headers)
    says = HELLO + call + frame(DATA, END_STREAM, 1, EMPTY)
    said = b""
    async with peer(target, says) as opened, asyncio.timeout(10):
        while not (found := STATUS.search(said)):
            part = await opened.reader.read(65_536)
            if not part:
                return None
            said += part
    number = int(found[1])
    return next(code for code in grpc.StatusCode if code.value[0] == number)


OK, UNKNOWN = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED


NO_CREDENTIAL = {
    "none": b"",
    "controls": header(b"authorization", b"Bearer " + HOSTILE),
    "NUL": header(b"authorization", GOOD + b"\0"),
    "newline": header(b"authorization", GOOD + b"\n"),
    "no UTF-8": header(b"authorization", GOOD + b"\xff"),
    "no scheme": header(b"authorization", b"\xff" + GOOD),
    "two": header(b"authorization", GOOD) * 2,
}
MALFORMED = {
    "upper case": header(b"Authorization", GOOD),
    "pseudo": header(b":authorization", GOOD),
    "space": header(b"a b", b"c"),
    "no name": header(b"", b"c"),
    "no base64": header(b"x-bin", b"!!!"),
}


async def test_a_good_credential_that_is_sent_as_bytes_is_good(server: Server):
    """Else what follows would be refused for another reason."""
    sent = header(b"authorization", GOOD)
    assert await status(server.target, sent) in (grpc.StatusCode.OK, None)


async def test_bytes_that_no_library_sends_are_no_credential_and_not_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
):
    unknown = grpc.StatusCode.UNAUTHENTICATED
    for name, headers in NO_CREDENTIAL.items():
        assert await status(server.target, headers) == unknown, name
    assert caplog.text == ""


async def test_malformed_headers_are_the_transports_to_refuse_and_others_are_served(
    server: Server,
    calls: Channel,
    admin: Metadata,
    caplog: pytest.LogCaptureFixture,
):
    for name, headers in MALFORMED.items():
        assert await status(server.target, headers) == grpc.StatusCode.INTERNAL, name
        assert await calls.answer(LIST_SYMBOLS, admin) == "OK"
    assert caplog.text == ""


async def test_a_credential_is_not_in_the_log_of_whoever_is_refused(
    calls: Channel, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(0)
    secret = keys.new_secret()
    sent = (("authorization", f"Bearer {secret}"),)
    for name in ("ListSymbols", "WatchOrders", "SubmitOrder"):
        assert await calls.answer(named(name), sent) == "UNAUTHENTICATED"
    assert secret not in caplog.text
