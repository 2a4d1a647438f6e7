"""A proxy between clients and a server that breaks calls as it is told.

It passes on bytes and metadata, knows no message, and gives each call the deadline
and the cancellation that its client gives it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor

from quantplane.client import services
from quantplane.sync import Loop

Metadata = tuple[tuple[str, str | bytes], ...]

OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # who is told of a fault is the client
    ("grpc.http2.bdp_probe", 0),  # a slow reader stays one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
]


class FaultInjector:
    """Clients connect to its `target`; it passes their calls on to `server`.

    A fault befalls the next `times` calls of a method, and several faults of one
    method follow each other. A method is named "SubmitOrder", or in full
    "/quantplane.v1.OrderService/SubmitOrder". It works in a thread of its own: both
    asynchronous and synchronous code may use it.
    """

    def __init__(self, server: str) -> None:
        self.target = ""
        self._upstream = server
        self._faults: dict[str, deque[_Fault]] = {path: deque() for path in _METHODS}
        self._calls: Counter[str] = Counter()
        self._running: set[asyncio.Task[_Status]] = set()
        self._parted = False

    def __enter__(self) -> Self:
        self._loop = Loop()
        self._loop.run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.run(self._stop())
        self._loop.close()

    def calls(self, method: str) -> int:
        """Return how often clients have called it, retries and failures included."""
        return self._calls[_path(method)]

    def drop(self, method: str, times: int = 1) -> None:
        """The call never reaches the server; the caller is told UNAVAILABLE."""
        self._plan(method, times, _drop)

    def delay(self, method: str, seconds: float, times: int = 1) -> None:
        """The call reaches the server that much later."""
        self._plan(method, times, partial(_delay, seconds))

    def duplicate(self, method: str, times: int = 1) -> None:
        """The server gets the call twice; the caller gets the second answer."""
        self._plan(method, times, _duplicate, streams=False)

    def answer_unavailable(self, method: str, times: int = 1) -> None:
        """The server does what it is asked; the caller is told UNAVAILABLE."""
        self._plan(method, times, _answer_unavailable, streams=False)

    def cut(self, method: str, after: int, times: int = 1) -> None:
        """The stream ends with UNAVAILABLE after that many responses, events too."""
        self._plan(method, times, partial(_cut, after), streams=True)

    @contextmanager
    def partition(self) -> Iterator[None]:
        """Nothing passes: running calls and new ones end with UNAVAILABLE."""
        self._loop.run(self._part())
        try:
            yield
        finally:
            self._parted = False

    def _plan(
        self, method: str, times: int, fault: _Fault, streams: bool | None = None
    ) -> None:
        path = _path(method)
        if streams is not None and streams != _is_stream(_METHODS[path]):
            what = "a stream" if streams else "a unary method"
            raise ValueError(f"{method} is not {what}, which this fault is for")
        self._faults[path].extend([fault] * times)

    # What follows runs in the proxy's own thread.

    async def _start(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._upstream, OPTIONS)
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers([_Handler(self._handle)])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.target = f"127.0.0.1:{port}"
        await self._server.start()

    async def _stop(self) -> None:
        await self._server.stop(None)
        await self._channel.close()

    async def _part(self) -> None:
        self._parted = True
        for relay in self._running:
            relay.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _handle(self, path: str, requests: Any, context: Any) -> None:
        self._calls[path] += 1
        status = UNAVAILABLE
        if not self._parted:
            call = _Call(self._channel.stream_stream(path), requests, context)
            faults = self._faults.get(path)
            fault = faults.popleft() if faults else _Call.relay
            status = await self._outcome(fault(call))
        if status.code is not grpc.StatusCode.OK:
            await context.abort(*status)
        context.set_trailing_metadata(status.trailing)

    async def _outcome(self, relayed: Coroutine[Any, Any, _Status]) -> _Status:
        relay = asyncio.create_task(relayed)
        self._running.add(relay)
        try:
            await asyncio.wait([relay])
        finally:  # also if the client has gone
            self._running.discard(relay)
            relay.cancel()
        return UNAVAILABLE if relay.cancelled() else relay.result()


class _Handler(grpc.GenericRpcHandler):
    """Takes every call, whatever its method, as a stream of bytes both ways."""

    def __init__(self, handle: Callable[[str, Any, Any], Awaitable[None]]) -> None:
        self._handle = handle

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def handle(requests: Any, context: Any) -> None:
            await self._handle(details.method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)


class _Status(NamedTuple):
    """How a call ends."""

    code: grpc.StatusCode
    details: str = ""
    trailing: Metadata = ()


# With no response and no metadata before it, gRPC may try the call again.
UNAVAILABLE = _Status(grpc.StatusCode.UNAVAILABLE, "a fault was injected")


class _Call:
    """A client's call, and how to pass it on."""

    def __init__(self, method: Any, requests: Any, context: Any) -> None:
        self.requests = requests
        self._method = method
        self._context = context

    async def relay(self, requests: Any = None, most: int | None = None) -> _Status:
        """Pass on both ways until the server ends it or `most` responses have come."""
        upstream = self._open(requests or self.requests)
        delivered = 0
        try:
            while delivered != most:
                if delivered == 0 and (metadata := await upstream.initial_metadata()):
                    await self._context.send_initial_metadata(tuple(metadata))
                response = await _read(upstream)
                if response is grpc.aio.EOF:
                    return await _status(upstream)
                await self._context.write(response)
                delivered += 1
        except grpc.aio.InternalError:
            pass  # the client has gone
        finally:
            upstream.cancel()
        return UNAVAILABLE

    async def carry_out(self, requests: Any = None) -> None:
        """Let the server do it, and tell the client nothing."""
        upstream = self._open(requests or self.requests)
        try:
            while await _read(upstream) is not grpc.aio.EOF:
                pass
        finally:
            upstream.cancel()

    def _open(self, requests: Any) -> Any:
        return self._method(
            requests,
            metadata=_own(self._context.invocation_metadata()),
            timeout=self._context.time_remaining(),
        )


_Fault = Callable[[_Call], Coroutine[Any, Any, _Status]]


async def _drop(call: _Call) -> _Status:
    return UNAVAILABLE


async def _delay(seconds: float, call: _Call) -> _Status:
    await asyncio.sleep(seconds)
    return await call.relay()


async def _duplicate(call: _Call) -> _Status:
    requests = [request async for request in call.requests]
    await call.carry_out(requests)
    return await call.relay(requests)


async def _answer_unavailable(call: _Call) -> _Status:
    await call.carry_out()
    return UNAVAILABLE


async def _cut(after: int, call: _Call) -> _Status:
    return await call.relay(most=after)


async def _read(call: Any) -> Any:
    """Return the next response; EOF at the end, of which `_status` tells more."""
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return grpc.aio.EOF


async def _status(call: Any) -> _Status:
    trailing = tuple(await call.trailing_metadata())
    return _Status(await call.code(), await call.details(), trailing)


def _own(metadata: Metadata) -> Metadata:
    """Return what is the application's, which is all but what gRPC itself adds."""
    return tuple(pair for pair in metadata if pair[0] != "user-agent")


def _path(method: str) -> str:
    """Return the full name of a method of the contract."""
    found = [path for path in _METHODS if method in (path, path.rpartition("/")[2])]
    if len(found) != 1:
        known = ", ".join(sorted(path.rpartition("/")[2] for path in _METHODS))
        raise ValueError(f"there is no method {method}; there are {known}")
    return found[0]


def _is_stream(method: MethodDescriptor) -> bool:
    return bool(method.client_streaming or method.server_streaming)


_METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for service, _ in services()
    for method in service.methods
}
