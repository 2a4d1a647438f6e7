"""One adapter that turns context managers around a call into an interceptor.

A layer is an async context manager: what it does before `yield` happens before the
handler, what it does after happens after, and it sees the handler's exceptions. The
guard's is the inner one, and may yield a function that each request of the call must
pass. The adapter fits them to the four shapes of RPC.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
)
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from quantplane_server.errors import InvalidRequest
from quantplane_server.streams import OUTLET, Outlet

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# A response's bytes, ready-made, where the stubs know only messages.
Serialised: TypeAlias = Any

REQUEST_S = 10.0  # in which the request of a caller who is not known must come


class Call(NamedTuple):
    method: str  # "/quantplane.v1.MarketDataService/ListBars"
    context: Context
    streams: bool = False  # requests, responses or both


Layer = Callable[[Call], AbstractAsyncContextManager[None]]
Receive = Callable[[Any], None]  # raises for a request that is refused


class Guard(Protocol):
    """Lets calls in, or refuses them."""

    def layer(self, call: Call) -> AbstractAsyncContextManager[Receive | None]: ...

    def knows(self, details: grpc.HandlerCallDetails) -> bool:
        """Tell whether a call that begins is of somebody known."""


class Observed(Protocol):
    """What is told of a call as it goes on."""

    def asked(self, request: Any) -> None: ...

    def told(self, response: Any) -> None: ...


Observe = Callable[[Call], AbstractContextManager[Observed]]


class Unobserved:
    """Looks away."""

    def __init__(self, call: Call) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def asked(self, request: Any) -> None:
        pass

    def told(self, response: Any) -> None:
        pass


class Unguarded:
    """Lets anybody call anything."""

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        yield

    def knows(self, details: grpc.HandlerCallDetails) -> bool:
        return True


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs `layer`, and that of the guard in it, around every call.

    `observe` is around both.
    """

    def __init__(
        self,
        layer: Layer,
        guard: Guard | None = None,
        observe: Observe = Unobserved,
    ) -> None:
        self._layer = layer
        self._guard = guard or Unguarded()
        self._observe = observe

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
            call = _call(method, context, handler.request_streaming)
            with self._observe(call) as seen:
                async with self._layer(call), self._guard.layer(call) as receive:
                    came = Came(handler.request_deserializer, receive, seen)
                    response = await respond(came.received(request), context)
                    seen.told(response)
                    return response

        field = "stream_unary" if handler.request_streaming else "unary_unary"
        return handler._replace(**{field: wrapped}, request_deserializer=None)

    def _around_stream(self, handler: Any, method: str) -> Any:
        respond = handler.stream_stream or handler.unary_stream

        async def wrapped(request: Any, context: Context) -> None:
            call = _call(method, context, streams=True)
            with self._observe(call) as seen:
                async with self._layer(call), self._guard.layer(call) as receive:
                    came = Came(handler.request_deserializer, receive, seen)
                    responses = respond(came.received(request), context)
                    await _write(responses, context, seen)

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
            call = _call(method, context, handler.response_streaming)
            with self._observe(call) as seen:
                async with self._layer(call), self._guard.layer(call) as receive:
                    came = Came(handler.request_deserializer, receive, seen)
                    request = came.received(await _only(requests, context))
                    if handler.response_streaming:
                        responses = handler.unary_stream(request, context)
                        await _write(responses, context, seen)
                    else:
                        response = await handler.unary_unary(request, context)
                        seen.told(response)
                        await context.write(response)

        return grpc.stream_stream_rpc_method_handler(wrapped, None, serialized)


def _call(method: str, context: Context, streams: bool) -> Call:
    OUTLET.set(Outlet(method, context))
    return Call(method, context, streams)


class Came(NamedTuple):
    """What is done to a request that has come.

    It is parsed here, within the layers: gRPC itself answers what is no message with
    UNKNOWN, and a traceback in the log.
    """

    parse: Callable[[bytes], Any]
    receive: Receive | None
    seen: Observed

    def received(self, request: Any) -> Any:
        """Have a request, or each of a stream of them, be parsed and pass."""
        if not isinstance(request, bytes):
            return self._each(request)
        message = self._passed(request)
        self.seen.asked(message)
        return message

    async def _each(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        first = True
        async for request in requests:
            message = self._passed(request)
            if first:
                self.seen.asked(message)
                first = False
            yield message

    def _passed(self, request: bytes) -> Any:
        try:
            message = self.parse(request)
        except DecodeError as error:
            raise InvalidRequest([("request", f"can't be parsed: {error}")]) from None
        if self.receive is not None:
            self.receive(message)
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


async def _write(responses: Any, context: Context, seen: Observed) -> None:
    """Write what a handler yields."""
    outlet = OUTLET.get()
    async with aclosing(responses):
        async for response in responses:
            data = serialized(response)
            outlet.begin(len(data))
            try:
                await context.write(data)
            except grpc.aio.InternalError:
                return  # the reader has gone
            outlet.sent()
            seen.told(response)


def serialized(response: Message | bytes) -> bytes:
    """Return the wire form; streams hand over what they share ready-made."""
    if isinstance(response, bytes):
        return response
    return response.SerializeToString()
