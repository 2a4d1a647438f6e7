"""Requests that are no protobuf, or more of it than a library would send."""

from itertools import product
from typing import Any

import grpc
import pytest

from quantplane import v1 as pb
from tests.identity.callers import Channel, Metadata, named, outcome, path

LEVELS = 10_000


def field(number: int, data: bytes) -> bytes:
    """Return a field of bytes or a message, as it is on the wire."""
    length, size = b"", len(data)
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def nested(levels: int) -> bytes:
    """Return a Value of lists in lists."""
    data = b""
    for _ in range(levels):
        data = field(6, field(1, data))  # Value.list_value, ListValue.values
    return data


UNPARSABLE = {
    "truncated": b"\x0a\xff",
    "of no wire type": b"\x0f",
    "an endless number": b"\x08" + b"\xff" * 11,
    "text that is no UTF-8": field(1, b"\xff\xfe") + field(2, b"\xff\xfe"),
    "a message longer than it is": b"\x0a\xff\xff\xff\xff\x0f",
}
# One method of each kind: a single request or many, a single response or many.
KINDS = ("GetUser", "SubscribeQuotes", "StreamQuotes", "PublishQuotes")
DEEP = {
    "CreateConfiguration": field(1, field(2, nested(LEVELS))),
    "UpdateConfiguration": field(1, field(2, nested(LEVELS))),
    "CreateStrategy": field(1, field(5, field(1, field(2, nested(LEVELS))))),
    "UpdateStrategy": field(1, field(6, field(1, field(2, nested(LEVELS))))),
    "PublishSignals": field(1, field(11, field(1, field(2, nested(LEVELS))))),
}


async def told(calls: Channel, name: str, sent: Metadata, data: bytes) -> str:
    """Return the reason, or OK, of a call whose request is these bytes."""
    method = named(name)
    kind = "stream" if method.client_streaming else "unary"
    back = "stream" if method.server_streaming else "unary"
    begin = getattr(calls.opened, f"{kind}_{back}")(path(method))
    call: Any = begin(iter([data]) if kind == "stream" else data, metadata=sent)
    return await outcome(call.read() if back == "stream" else call)


async def test_a_request_that_can_t_be_parsed_is_an_invalid_one(
    calls: Channel, admin: Metadata, caplog: pytest.LogCaptureFixture
):
    for name, (kind, data) in product(KINDS, UNPARSABLE.items()):
        answer = await told(calls, name, admin, data)
        assert answer == "INVALID_FIELD", (name, kind)
    assert caplog.text == ""


async def test_json_too_deep_to_be_parsed_is_invalid_too(
    calls: Channel, admin: Metadata, caplog: pytest.LogCaptureFixture
):
    for name, data in DEEP.items():
        assert await told(calls, name, admin, data) == "INVALID_FIELD", name
    assert caplog.text == ""


async def test_of_who_is_not_known_nothing_is_parsed(
    calls: Channel, caplog: pytest.LogCaptureFixture
):
    for name in KINDS:
        assert await told(calls, name, (), b"\xff") == "UNAUTHENTICATED", name
    assert caplog.text == ""


async def test_nobody_may_send_what_can_t_be_parsed_to_what_is_open_to_all(
    calls: Channel, caplog: pytest.LogCaptureFixture
):
    for name in ("Login", "RefreshToken", "Logout"):
        assert await told(calls, name, (), b"\xff") == "INVALID_FIELD", name
    assert caplog.text == ""


async def test_fields_that_nobody_knows_are_left_out(calls: Channel, admin: Metadata):
    data = pb.ListSymbolsRequest(page_size=1).SerializeToString()
    assert await told(calls, "ListSymbols", admin, data + field(15, b"x")) == "OK"


async def test_a_method_that_is_not_there_is_not_told_from_one_that_is_misspelt(
    calls: Channel, admin: Metadata
):
    for name in ("/x", "x", "/quantplane.v1.UserService/ListUsers/", "/" + "x" * 9_999):
        call: Any = calls.opened.unary_unary(name)(b"", metadata=admin)
        assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
