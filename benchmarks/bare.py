"""A bare grpc.aio server: the baseline of what quantplane's server adds."""

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

import grpc

from benchmarks.child import Parent
from benchmarks.tape import Tape
from quantplane import v1 as pb

BATCHES = "/bare/Batches"
SINGLES = "/bare/Singles"
ECHO = "/bare/Echo"
WAIT = "/bare/Wait"

Context = Any


async def serve(parent: Parent, tape: dict[str, Any] | None = None) -> None:
    """Serve; once the parent says so, write the tape to every open stream."""
    handlers = Handlers(Tape(**tape) if tape else None)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([handlers.generic()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parent.say(target=f"127.0.0.1:{port}")
    await parent.hear()
    parent.say(began=perf_counter())
    handlers.go.set()
    await server.wait_for_termination()


class Handlers:
    """What the server answers; requests and most responses are bytes as they are."""

    def __init__(self, tape: Tape | None) -> None:
        self.go = asyncio.Event()
        self._tape = tape
        self._batches: list[bytes] = []
        if tape:
            for quotes in tape.batches():
                message = pb.StreamQuotesResponse(quotes=quotes).SerializeToString()
                self._batches.append(message)

    def generic(self) -> grpc.GenericRpcHandler:
        methods = {
            BATCHES: grpc.unary_stream_rpc_method_handler(self.batches),
            SINGLES: grpc.unary_stream_rpc_method_handler(
                self.singles, response_serializer=_serialized
            ),
            ECHO: grpc.unary_unary_rpc_method_handler(self.echo),
            WAIT: grpc.stream_stream_rpc_method_handler(self.wait),
        }
        by_name = {
            name.rpartition("/")[2]: handler for name, handler in methods.items()
        }
        return grpc.method_handlers_generic_handler("bare", by_name)

    async def batches(self, request: bytes, context: Context) -> None:
        """Write the tape's batches, serialised beforehand."""
        await context.write(b"\x10\x00")  # the stream is open
        await self.go.wait()
        for message in self._batches:
            await context.write(message)

    async def singles(self, request: bytes, context: Context) -> None:
        """Build each quote of the tape and write it, as a plain handler does."""
        assert self._tape
        await context.write(pb.Quote())
        await self.go.wait()
        for i in range(self._tape.quotes):
            await context.write(self._tape.quote(i))

    async def echo(self, request: bytes, context: Context) -> bytes:
        return b""

    async def wait(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Answer the first request, and wait."""
        async for _ in requests:
            await context.write(b"\x10\x00")


def _serialized(quote: pb.Quote) -> bytes:
    return quote.SerializeToString()
