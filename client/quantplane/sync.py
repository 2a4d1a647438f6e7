"""The client for code without asyncio.

It only bridges: the asynchronous client works on an event loop in a thread of its
own, and whoever calls here waits for it. Objects may be shared between threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from quantplane import client, follow
from quantplane import v1 as pb
from quantplane.credentials import Token
from quantplane.latency import Latency
from quantplane.tls import Tls

Result = TypeVar("Result")

WAIT_S = 0.25


class Client:
    """As quantplane.Client: all services of a server, each an attribute."""

    market_data: Service
    options: Service
    model: Service
    signal: Service
    order: Service
    broker: Service
    portfolio: Service
    strategy: Service
    configuration: Service
    audit: Service
    auth: Service
    user: Service
    admin: Service

    def __init__(
        self,
        target: str | None = None,
        tls: Tls | None = None,
        token: Token | None = None,
    ) -> None:
        self._loop = Loop()
        self._client = self._loop.run(_open(target, tls, token))
        for service, _ in client.services():
            name = client.attribute_of(service)
            setattr(self, name, Service(self._loop, getattr(self._client, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; iterations over followed streams end."""
        if self._loop.alive:
            self._loop.run(self._client.close())
            self._loop.close()

    def login(self, username: str, password: str) -> None:
        """Log in; calls show the session's token from now on, renewed in time."""
        self._loop.run(self._client.login(username, password))

    def logout(self) -> None:
        """End the session of `login`."""
        self._loop.run(self._client.logout())

    def follow(self, method: Method, request: Any) -> Follower:
        """Return the responses of a stream, which goes on after any interruption."""
        return Follower(self._loop, self._client.follow(method.asynchronous, request))

    def publish_quotes(self, feed: str | None = None) -> QuotePublisher:
        """Return a publisher to enter with `with`."""
        return QuotePublisher(self._loop, self._client, feed)


class Service:
    """The methods of one service."""

    def __init__(self, loop: Loop, stub: Any) -> None:
        self._loop = loop
        self._stub = stub

    def __getattr__(self, name: str) -> Method:
        return Method(self._loop, getattr(self._stub, name))


class Method:
    """A method of a service. Only unary ones can be called; others are followed."""

    def __init__(self, loop: Loop, asynchronous: Any) -> None:
        self._loop = loop
        self.asynchronous = asynchronous

    def __call__(self, request: Any, **options: Any) -> Any:
        """Return the response. `options` are gRPC's: timeout in seconds, metadata."""
        if not isinstance(self.asynchronous, grpc.aio.UnaryUnaryMultiCallable):
            raise TypeError("a stream is read with client.follow(method, request)")
        return self._loop.run(_call(self.asynchronous, request, options))


class Follower:
    """As quantplane.follow.Follower, an ordinary iterator."""

    def __init__(self, loop: Loop, follower: follow.Follower[Any]) -> None:
        self._loop = loop
        self._follower = follower

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream; a thread that waits for a response sees iteration end."""
        if self._loop.alive:  # closing the client has closed it too
            self._loop.run(self._follower.aclose())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._loop.run(self._follower.__anext__())
        except (StopAsyncIteration, CancelledError):  # cancelled: the client is closed
            raise StopIteration from None

    @property
    def reconnects(self) -> int:
        return self._follower.reconnects

    @property
    def gaps(self) -> int:
        return self._follower.gaps

    @property
    def latency(self) -> Latency:
        return self._follower.latency

    def update(
        self,
        *,
        symbols: Iterable[str] = (),
        add_symbols: Iterable[str] = (),
        remove_symbols: Iterable[str] = (),
    ) -> None:
        """Replace the symbols if `symbols` is not empty, then add and remove some."""
        self._loop.run(
            self._follower.update(
                symbols=symbols,
                add_symbols=add_symbols,
                remove_symbols=remove_symbols,
            )
        )


class QuotePublisher:
    """As quantplane.publish.QuotePublisher, an ordinary context manager."""

    def __init__(self, loop: Loop, client: client.Client, feed: str | None) -> None:
        self._loop = loop
        self._publisher = client.publish_quotes(feed)

    def __enter__(self) -> Self:
        self._loop.run(self._publisher.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.run(self._publisher.__aexit__(kind, error, traceback))

    def send(self, quotes: Sequence[pb.Quote]) -> int:
        """Take over `quotes` and return their batch number; wait only for room."""
        return self._loop.run(self._publisher.send(quotes))

    def flush(self) -> None:
        """Wait until everything sent is accepted."""
        self._loop.run(self._publisher.flush())

    def durable(self) -> None:
        """Wait until everything sent is committed in the database."""
        self._loop.run(self._publisher.durable())

    @property
    def feed(self) -> str:
        return self._publisher.feed

    @property
    def accepted_through(self) -> int:
        return self._publisher.accepted_through

    @property
    def durable_through(self) -> int:
        return self._publisher.durable_through

    @property
    def hold(self) -> pb.HoldReason.ValueType:
        return self._publisher.hold

    @property
    def unaccepted(self) -> list[int]:
        return self._publisher.unaccepted

    @property
    def reconnects(self) -> int:
        return self._publisher.reconnects

    @property
    def lost(self) -> int:
        return self._publisher.lost


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._main(),), name="quantplane", daemon=True
        )
        self._thread.start()
        self._started.wait()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._started.set()
        await self._stop.wait()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        if not self.alive:
            coroutine.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            # In pieces: a Ctrl-C just before the wait, and any on Windows, is only
            # seen after it.
            while not future.done():
                with suppress(TimeoutError):
                    future.result(timeout=WAIT_S)
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for the rest
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


async def _open(
    target: str | None, tls: Tls | None, token: Token | None
) -> client.Client:
    return client.Client(target, tls, token)


async def _call(method: Any, request: Any, options: dict[str, Any]) -> Any:
    return await method(request, **options)
