"""One adapter that turns context managers around a call into an interceptor.

A layer is an async context manager: what it does before `yield` happens before the
handler, what it does after happens after, and it sees the handler's exceptions. The
guard's is the inner one, and may yield a function that each request of the call must
pass. The adapter fits them to the four shapes of RPC.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from quantplane_server.errors import InvalidRequest

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# A response's bytes, ready-made, where the stubs know only messages.
Serialised: TypeAlias = Any

REQUEST_S = 10.0  # in which the request of a caller who is not known must come


class Call(NamedTuple):
    method: str  # "/quantplane.v1.MarketDataService/ListBars"
    context: Context


Layer = Callable[[Call], AbstractAsyncContextManager[None]]
Parse = Callable[[bytes], Any]
Receive = Callable[[Any], None]  # raises for a request that is refused


class Guard(Protocol):
    """Lets calls in, or refuses them."""

    def layer(self, call: Call) -> AbstractAsyncContextManager[Receive | None]: ...

    def knows(self, details: grpc.HandlerCallDetails) -> bool:
        """Tell whether a call that begins is of somebody known."""


class Unguarded:
    """Lets anybody call anything."""

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        yield

    def knows(self, details: grpc.HandlerCallDetails) -> bool:
        return True


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs `layer`, and that of the guard in it, around every call."""

    def __init__(self, layer: Layer, guard: Guard | None = None) -> None:
        self._layer = layer
        self._guard = guard or Unguarded()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(details)
        if handler is None:
            return None
        if not (handler.request_streaming or self._guard.knows(details)):
            return self._ahead(handler, details.method)
        if handler.response_streaming:
            return self._around_stream(handler, details.method)
        return self._around_unary(handler, details.method)

    def _around_unary(self, handler: Any, method: str) -> Any:
        respond = handler.stream_unary or handler.unary_unary

        async def wrapped(request: Any, context: Context) -> Any:
            call = Call(method, context)
            async with self._layer(call), self._guard.layer(call) as receive:
                received = _received(request, handler.request_deserializer, receive)
                return await respond(received, context)

        field = "stream_unary" if handler.request_streaming else "unary_unary"
        return handler._replace(**{field: wrapped}, request_deserializer=None)

    def _around_stream(self, handler: Any, method: str) -> Any:
        respond = handler.stream_stream or handler.unary_stream

        async def wrapped(request: Any, context: Context) -> None:
            call = Call(method, context)
            async with self._layer(call), self._guard.layer(call) as receive:
                received = _received(request, handler.request_deserializer, receive)
                await _write(respond(received, context), context)

        field = "stream_stream" if handler.request_streaming else "unary_stream"
        return handler._replace(
            **{field: wrapped},
            request_deserializer=None,
            response_serializer=serialized,
        )

    def _ahead(self, handler: Any, method: str) -> Any:
        """Check a call ahead of its request, which otherwise comes before anything.

        So nobody who is not known holds a call with a request that never comes. It is
        served as a stream of requests would be: there is no difference to the peer.
        """

        async def wrapped(requests: AsyncIterator[Any], context: Context) -> None:
            call = Call(method, context)
            async with self._layer(call), self._guard.layer(call) as receive:
                request = await _only(requests, context)
                request = _received(request, handler.request_deserializer, receive)
                if handler.response_streaming:
                    await _write(handler.unary_stream(request, context), context)
                else:
                    await context.write(await handler.unary_unary(request, context))

        return grpc.stream_stream_rpc_method_handler(wrapped, None, serialized)


def _received(request: Any, parse: Parse, receive: Receive | None) -> Any:
    """Parse a request, or each of a stream of them, and have it pass.

    Here, within the layers: gRPC itself answers what is no message with UNKNOWN, and
    a traceback in the log.
    """
    if isinstance(request, bytes):
        return _passed(request, parse, receive)
    return _each_passed(request, parse, receive)


async def _each_passed(
    requests: AsyncIterator[bytes], parse: Parse, receive: Receive | None
) -> AsyncIterator[Any]:
    async for request in requests:
        yield _passed(request, parse, receive)


def _passed(request: bytes, parse: Parse, receive: Receive | None) -> Any:
    try:
        message = parse(request)
    except DecodeError as error:
        raise InvalidRequest([("request", f"can't be parsed: {error}")]) from None
    if receive is not None:
        receive(message)
    return message


async def _only(requests: AsyncIterator[Any], context: Context) -> Any:
    try:
        async with asyncio.timeout(REQUEST_S):
            return await anext(aiter(requests))
    except TimeoutError:
        code = grpc.StatusCode.DEADLINE_EXCEEDED
        await context.abort(code, f"no request came in {REQUEST_S:g} s")
    except StopAsyncIteration:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there is no request")


async def _write(responses: Any, context: Context) -> None:
    """Write what a handler yields, unless it writes by itself, as that of health."""
    if not isinstance(responses, AsyncIterator):
        await responses
        return
    async with aclosing(responses):  # type: ignore[type-var]
        async for response in responses:
            try:
                await context.write(response)
            except grpc.aio.InternalError:
                return  # the reader has gone


def serialized(response: Message | bytes) -> bytes:
    """Return the wire form; streams hand over what they share ready-made."""
    if isinstance(response, bytes):
        return response
    return response.SerializeToString()
