"""Which trace a call belongs to."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from quantplane_server.rpc.trace import trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@pytest.fixture
async def call() -> AsyncIterator[Any]:
    """A method that answers with the trace id that its handler finds."""

    async def answer(request: bytes, context: Any) -> bytes:
        return trace_id(context).encode()

    server = grpc.aio.server()
    handlers = {"Trace": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_unary("/test/Trace")
    await server.stop(None)


@pytest.mark.parametrize(
    "parent",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-00",
        f"00-{TRACE}-{SPAN}-ff",
        f"01-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-what-a-later-version-adds",
        f"fe-{TRACE}-{SPAN}-01-",
    ],
)
async def test_a_trace_parent_names_the_trace(call: Any, parent: str):
    assert await call(b"", metadata=[("traceparent", parent)]) == TRACE.encode()


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "-",
        TRACE,
        f"{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-001",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"0g-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01",
        f"00-{TRACE}-{SPAN[1:]}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00_{TRACE}_{SPAN}_01",
    ],
)
async def test_what_is_no_trace_parent_names_no_trace(call: Any, parent: str):
    assert await call(b"", metadata=[("traceparent", parent)]) == b""


async def test_a_call_may_have_no_trace_parent(call: Any):
    assert await call(b"") == b""
