"""Follows a stream for as long as the application wants it.

Every stream of quantplane has one shape: a response carries data or one control
event, and a resume token that means "delivered through here". So one `Follower`
keeps any of them going over broken connections and restarted servers.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.credentials import is_renewed, shown_by
from quantplane.errors import describe, is_transient, metadata_of, reason_of
from quantplane.latency import Latency
from quantplane.reaching import is_cut_off, why_cut_off

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0  # the server's, where a request does not choose one
SILENT_HEARTBEATS = 2.5  # missed, and the stream counts as dead
TICKS = 10  # checks for silence in that time
MAX_UNACKNOWLEDGED = 16  # responses, where a request does not choose


class StreamRequest(Protocol):
    """The first request of any stream."""

    DESCRIPTOR: Descriptor
    resume_token: bytes


class StreamResponse(Protocol):
    """A response of any stream."""

    resume_token: bytes

    @property
    def event(self) -> pb.StreamEvent: ...


Request = TypeVar("Request", bound=StreamRequest)
Response = TypeVar("Response", bound=StreamResponse)
StreamMethod: TypeAlias = (
    "grpc.aio.UnaryStreamMultiCallable[Request, Response]"
    " | grpc.aio.StreamStreamMultiCallable[Request, Response]"
)


class Backoff:
    """Delays before the next try: anywhere up to 0.1 s, then 0.2 s, ... then 10 s."""

    FIRST_S, LAST_S = 0.1, 10.0

    def __init__(self) -> None:
        self._limit = self.FIRST_S

    def reset(self) -> None:
        self._limit = self.FIRST_S

    def next(self) -> float:
        """Return seconds."""
        delay = random.uniform(0, self._limit)
        self._limit = min(2 * self._limit, self.LAST_S)
        return delay


class Follower(Generic[Response]):
    """Yields the responses of a stream; ends only with `Complete` or an error.

    After a broken connection, a silent one, or a `Goodbye`, it opens the stream
    again behind the last response. Heartbeats are kept from the application; it
    gets a `Gap` where the server no longer had what came next.

    A response counts as handled, and is acknowledged, once the next is asked for.
    """

    _call: Any = None

    def __init__(
        self,
        method: StreamMethod[Request, Response],
        request: Request,
        channel: grpc.aio.Channel,
    ) -> None:
        self.reconnects = 0
        self.gaps = 0
        self.latency = Latency()
        described = _method_of(request.DESCRIPTOR)
        self._name = described.name
        self._response_type: Any = GetMessageClass(described.output_type)
        self._method: Any = method
        self._channel = channel
        self._request = _copy(request)
        self._token = request.resume_token
        self._resumed_from = b""
        self._both_ways = described.client_streaming
        self._stamped = "stamps" in described.output_type.fields_by_name
        self._acknowledge_every = sys.maxsize
        if self._both_ways:
            self._request.max_unacknowledged = (
                self._request.max_unacknowledged or MAX_UNACKNOWLEDGED
            )
            self._acknowledge_every = max(1, self._request.max_unacknowledged // 2)
        self._updates: list[Any] = []  # which the token may not cover yet
        self._updates_in_force = 0
        self._sequence = self._acknowledged = 0
        self._must_acknowledge = False
        self._requests: _Requests | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._opened = False
        self._shown = ""  # by the call, of credentials
        self._was_let_in = True
        self._backoff = Backoff()
        self._tick_s = _silence_s(request) / TICKS
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = False  # for the wire, not for the application
        self._said_why = False  # the server can't be reached
        self._saying: asyncio.Task[None] | None = None
        self._server_time: Timestamp | None = None
        self._delivered_ns = 0
        self._complete = False  # all that was asked for has come
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream; a task that waits for a response sees iteration end."""
        self._ended.set()
        self._disconnect()

    def __del__(self) -> None:
        # The channel keeps every call that has not ended. Any thread may come here.
        if self._call is not None:
            with suppress(RuntimeError):  # the loop is closed, the call with it
                self._loop.call_soon_threadsafe(self._call.cancel)
                if self._beginning is not None:
                    self._loop.call_soon_threadsafe(self._beginning.cancel)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Response:
        while not self._ended.is_set():
            try:
                response = await self._receive()
                if self._take(response):
                    return response
            except _Lost as lost:
                self._disconnect()
                if self._complete:
                    break
                await self._pause(lost)
            except grpc.aio.AioRpcError as error:
                self._disconnect()
                if reason_of(error) != "COMPACTED":
                    self._ended.set()
                    raise
                await self._pause(_Lost(describe(error)))
                return self._start_afresh(error)
        raise StopAsyncIteration

    async def update(
        self,
        *,
        symbols: Iterable[str] = (),
        add_symbols: Iterable[str] = (),
        remove_symbols: Iterable[str] = (),
    ) -> None:
        """Replace the symbols if `symbols` is not empty, then add and remove some.

        The change outlives reconnects. Responses that were on their way may still
        show the old symbols; the next `Subscribed` is the first with the new.
        """
        if not self._both_ways:
            raise TypeError(f"the symbols of {self._name} can't be changed")
        update = type(self._request)(
            symbols=symbols, add_symbols=add_symbols, remove_symbols=remove_symbols
        )
        self._updates.append(update)
        if self._requests is not None:
            await self._requests.write(update)

    # One connection.

    async def _receive(self) -> Response:
        self._waiting = True
        try:
            call = self._call or await self._connect()
            if self._must_acknowledge or (
                self._sequence - self._acknowledged >= self._acknowledge_every
            ):
                await self._acknowledge()
            response: Response = await call.read()
        except grpc.aio.AioRpcError as error:
            if is_transient(error) or await self._is_renewed(error):
                raise _Lost(describe(error)) from error
            raise
        except asyncio.CancelledError:
            self._disconnect()
            if _caller_cancels():
                raise
            raise _Lost("no sign of life from the server") from None
        finally:
            self._waiting = False
            self._ticks = 0
        if not response:
            raise _Lost("the server ended the stream")
        self._was_let_in = True
        self._said_why = False
        return response

    async def _is_renewed(self, error: grpc.RpcError) -> bool:
        """Say whether to show another credential; a second one in a row, no more."""
        was_let_in, self._was_let_in = self._was_let_in, False
        return was_let_in and await is_renewed(self._method, self._shown, error)

    async def _connect(self) -> Any:
        self.reconnects += self._opened
        self._opened = True
        if not self._token:  # nothing to go on from, so nothing that they may miss
            self._fold(len(self._updates))
        self._request.resume_token = self._resumed_from = self._token
        self._sequence = self._acknowledged = 0
        self._must_acknowledge = False
        self._updates_in_force = -1  # the first Subscribed stands for no update
        self._loop = asyncio.get_running_loop()
        self._tick()
        self._shown = shown_by(self._method)
        if self._both_ways:
            call = self._call = self._method(wait_for_ready=True)
            self._requests = _Requests(call)
            # gRPC never ends a write to a call that is cancelled before its server
            # can be reached. Reading does end, so it must not wait for the write.
            first = self._requests.write(self._request, *self._updates)
            self._beginning = asyncio.create_task(first)
        else:
            call = self._call = self._method(self._request, wait_for_ready=True)
        return call

    def _disconnect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._beginning is not None:
            self._beginning.cancel()
        if self._call is not None:
            self._call.cancel()
        self._call = self._requests = None

    async def _acknowledge(self) -> None:
        self._acknowledged = self._sequence
        self._must_acknowledge = False
        if self._requests is not None:
            acknowledge = type(self._request)(acknowledge=self._sequence)
            await self._requests.write(acknowledge)

    def _tick(self) -> None:
        # The reference is weak, for the timer must not keep a follower that the
        # application has dropped.
        self._timer = self._loop.call_later(self._tick_s, _tick, weakref.ref(self))
        self._ticks += self._waiting
        if self._waiting and not self._said_why and is_cut_off(self._channel):
            self._saying = asyncio.create_task(self._say_why())
        if self._ticks > TICKS and self._call is not None:
            self._call.cancel()

    async def _say_why(self) -> None:
        why = await why_cut_off(self._channel)
        if why and not self._said_why:
            self._said_why = True
            logger.warning("%s: the server can't be reached: %s", self._name, why)

    async def _pause(self, lost: _Lost) -> None:
        delay = self._backoff.next()
        if lost.retry_after_s:
            delay += lost.retry_after_s * random.uniform(1, 1.5)
        logger.warning("%s: %s; reconnecting in %.1f s", self._name, lost, delay)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._ended.wait()

    # What a response means.

    def _take(self, response: Any) -> bool:
        """Note what `response` says; return whether the application gets it."""
        if self._both_ways:
            self._sequence = response.sequence
        kind = None
        if response.HasField("event"):
            kind = response.event.WhichOneof("event")
            self._updates_in_force += kind == "subscribed"
        if token := response.resume_token:
            self._token = token
            if token != self._resumed_from:
                self._resumed_from = b""  # a state, and its token, may come back
            if self._updates_in_force > 0:
                self._fold(self._updates_in_force)
                self._updates_in_force = 0
        if kind is not None:
            return self._take_event(kind, response.event)
        self._backoff.reset()
        self._delivered_ns = time.time_ns()
        if self._stamped and response.HasField("stamps") and response.quotes:
            self.latency.record(response, self._delivered_ns)
        return not token or token != self._resumed_from

    def _take_event(self, kind: str, event: pb.StreamEvent) -> bool:
        match kind:
            case "heartbeat":
                self._backoff.reset()
                self._server_time = event.heartbeat.server_time
                self._must_acknowledge = self._both_ways
                return False
            case "gap":
                self.gaps += 1
                self._updates_in_force -= 1  # a Subscribed of its own follows
            case "goodbye":
                after = event.goodbye.retry_after.ToTimedelta().total_seconds()
                raise _Lost("the server says goodbye", after)
            case "complete":
                self._complete = True
                return False
        return True

    def _start_afresh(self, error: grpc.RpcError) -> Response:
        """Give up the token; return the Gap that this leaves."""
        self.gaps += 1
        self._token = b""
        fields = self._request.DESCRIPTOR.fields_by_name
        if "start_time" in fields and "end_time" not in fields:
            self._request.ClearField("start_time")  # its history was delivered
        response: Response = self._response_type()
        gap = response.event.gap
        if self._server_time is not None:
            gap.start_time.CopyFrom(self._server_time)
        elif self._delivered_ns:
            gap.start_time.FromNanoseconds(self._delivered_ns)
        gap.end_time.GetCurrentTime()
        cause = "GAP_CAUSE_" + metadata_of(error).get("cause", "")
        known = cause in pb.GapCause.keys()
        gap.cause = pb.GapCause.Value(cause) if known else pb.GAP_CAUSE_COMPACTED
        return response

    def _fold(self, count: int) -> None:
        """Make the first `count` updates part of the request."""
        for update in self._updates[:count]:
            kept = update.symbols or self._request.symbols
            symbols = dict.fromkeys([*kept, *update.add_symbols])
            for symbol in update.remove_symbols:
                symbols.pop(symbol, None)
            self._request.symbols[:] = symbols
        del self._updates[:count]


class _Lost(Exception):
    """The connection has ended, and another one can go on."""

    def __init__(self, why: str, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class _Requests:
    """Writes the requests of one call, one at a time, for several tasks."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._queue: deque[Any] = deque()
        self._writing = False

    async def write(self, *requests: Any) -> None:
        self._queue.extend(requests)
        if self._writing:
            return  # whoever writes goes on with these
        self._writing = True
        try:
            while self._queue:
                await self._call.write(self._queue.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call has ended: its reader learns why
        except asyncio.CancelledError:
            if _caller_cancels():
                raise
        finally:
            self._writing = False


def _tick(follower: weakref.ref[Follower[Any]]) -> None:
    if (alive := follower()) is not None:
        alive._tick()


def _caller_cancels() -> bool:
    """Tell a cancelled task from a cancelled call: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _method_of(request: Descriptor) -> MethodDescriptor:
    """Return the method that takes `request`: no two take the same."""
    return next(
        method
        for service in request.file.services_by_name.values()
        for method in service.methods
        if method.input_type is request
    )


def _copy(request: Any) -> Any:
    """Return a copy whose fields are for this module to change, of any type."""
    return copy.deepcopy(request)


def _silence_s(request: Any) -> float:
    heartbeat_s = HEARTBEAT_S
    if "heartbeat_interval" in request.DESCRIPTOR.fields_by_name:
        chosen = request.heartbeat_interval.ToTimedelta().total_seconds()
        heartbeat_s = chosen or HEARTBEAT_S
    return SILENT_HEARTBEATS * heartbeat_s
