"""One adapter that turns a context manager around a call into an interceptor.

A layer is an async context manager: what it does before `yield` happens before the
handler, what it does after happens after, and it sees the handler's exceptions. The
adapter fits it to the four shapes of RPC. Handlers of streams are generators.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import Message

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# A response's bytes, ready-made, where the stubs know only messages.
Serialised: TypeAlias = Any


class Call(NamedTuple):
    method: str  # "/quantplane.v1.MarketDataService/ListBars"
    context: Context


Layer = Callable[[Call], AbstractAsyncContextManager[None]]


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs `layer` around every call of the package's own services."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(details)
        if handler is None or not details.method.startswith("/quantplane."):
            return handler
        if handler.response_streaming:
            return self._around_stream(handler, details.method)
        return self._around_unary(handler, details.method)

    def _around_unary(self, handler: Any, method: str) -> Any:
        respond = handler.stream_unary or handler.unary_unary

        async def wrapped(request: Any, context: Context) -> Any:
            async with self._layer(Call(method, context)):
                return await respond(request, context)

        field = "stream_unary" if handler.request_streaming else "unary_unary"
        return handler._replace(**{field: wrapped})

    def _around_stream(self, handler: Any, method: str) -> Any:
        respond = handler.stream_stream or handler.unary_stream

        async def wrapped(request: Any, context: Context) -> None:
            async with self._layer(Call(method, context)):
                async with aclosing(respond(request, context)) as responses:
                    async for response in responses:
                        try:
                            await context.write(response)
                        except grpc.aio.InternalError:
                            return  # the reader has gone

        field = "stream_stream" if handler.request_streaming else "unary_stream"
        return handler._replace(**{field: wrapped}, response_serializer=serialized)


def serialized(response: Message | bytes) -> bytes:
    """Return the wire form; streams hand over what they share ready-made."""
    if isinstance(response, bytes):
        return response
    return response.SerializeToString()
