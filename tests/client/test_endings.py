"""What a server says last is heard, also by who was writing and not reading then."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from quantplane.credentials import Credentials, KnownChannel

RESPONSES = 20
REQUEST = 5_000 * b"x"

Method = Callable[..., Any]


async def refuse(requests: AsyncIterator[bytes], context: Any) -> None:
    """Answer some requests, while more of them come, and then refuse the rest."""
    for _ in range(RESPONSES):
        await anext(requests)
        await context.write(b"response")
    await context.abort(grpc.StatusCode.ABORTED, "no more")


class Refusing(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(refuse)


@pytest.fixture
async def method() -> AsyncIterator[Method]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Refusing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield KnownChannel(channel, Credentials()).stream_stream("/service/Method")
    await server.stop(None)


async def heard(call: Any) -> tuple[int, str]:
    """Return how many responses a call had, and how it ended."""
    responses = 0
    try:
        while await call.read():
            responses += 1
    except grpc.aio.AioRpcError as error:
        return responses, f"{error.code().name}: {error.details()}"
    return responses, "OK"


async def test_a_write_that_comes_too_late_hides_nothing_that_the_server_said(
    method: Method,
):
    call = method()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        while True:
            await call.write(REQUEST)
    assert "`read` says why" in (late.value.details() or "")
    assert await heard(call) == (RESPONSES, "ABORTED: no more")


async def test_an_iterator_of_requests_hides_nothing_that_the_server_said(
    method: Method,
):
    dropped = asyncio.Event()

    async def requests() -> AsyncIterator[bytes]:
        try:
            while True:
                yield REQUEST
        finally:
            dropped.set()

    call = method(requests())
    await dropped.wait()
    assert await heard(call) == (RESPONSES, "ABORTED: no more")


async def test_two_writes_at_once_are_an_error_of_the_caller_as_ever(method: Method):
    call = method()
    await call.write(REQUEST)
    results = await asyncio.gather(
        *(call.write((1 << 20) * b"x") for _ in range(5)), return_exceptions=True
    )
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert errors[0].code() is grpc.StatusCode.INTERNAL
    call.cancel()
