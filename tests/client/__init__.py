"""A server that plays scripts, and short ways to say what it answers.

A script is one call, as the server's side of it: an async generator that takes the
call's request (or requests) and context and yields responses. The calls of a test
play its scripts in turn, whatever their method.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from quantplane import Client
from quantplane import v1 as pb

Script = Callable[[Any, Any], AsyncIterator[Any]]


class ScriptedServer(pb.MarketDataServiceServicer):
    """Plays scripts; `requests` are all that came in, call by call."""

    def __init__(self, scripts: Iterable[Script]) -> None:
        self._scripts = list(scripts)
        self.requests: list[list[Any]] = []
        self.times: list[float] = []  # when each call came in

    async def _play(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.times.append(asyncio.get_running_loop().time())
        received: list[Any] = []
        self.requests.append(received)
        if not self._scripts:
            await asyncio.Event().wait()
        if hasattr(request, "__aiter__"):
            request = _recorded(request, received)
        else:
            received.append(request)
        async for response in self._scripts.pop(0)(request, context):
            yield response

    PublishQuotes = StreamQuotes = SubscribeQuotes = StreamBars = PublishBars = _play

    async def GetLatestQuotes(self, request: Any, context: Any) -> Any:
        return await anext(self._play(request, context))

    ListBars = ListSymbols = GetLatestQuotes


async def _recorded(requests: Any, received: list[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        received.append(request)
        yield request


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[tuple[Client, ScriptedServer]]:
    """Serve the scripts; give a client and the server's record."""
    server = grpc.aio.server()
    scripted = ScriptedServer(scripts)
    pb.add_MarketDataServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(f"127.0.0.1:{port}") as client:
            yield client, scripted
    finally:
        await server.stop(None)


async def refuse(
    context: Any,
    code: grpc.StatusCode,
    reason: str = "",
    violations: Iterable[tuple[str, str]] = (),
    **metadata: str,
) -> NoReturn:
    """End the call with an error as quantplane's server does, or a bare one."""
    details = status(reason, violations, metadata)
    trailing = (("grpc-status-details-bin", details),) if reason else ()
    await context.abort(code, "refused", trailing)
    raise AssertionError  # abort has raised


def status(
    reason: str, violations: Iterable[tuple[str, str]], metadata: dict[str, str]
) -> bytes:
    details = [ErrorInfo(reason=reason, domain="quantplane", metadata=metadata)]
    if violations:
        fields = [
            BadRequest.FieldViolation(field=field, description=text)
            for field, text in violations
        ]
        details.append(BadRequest(field_violations=fields))
    packed = [Packed() for _ in details]
    for into, detail in zip(packed, details, strict=True):
        into.Pack(detail)
    return Status(message="refused", details=packed).SerializeToString()


async def until(reached: Callable[[], object]) -> None:
    """Let everyone else go on until `reached()`."""
    while not reached():
        await asyncio.sleep(0)


async def silence() -> None:
    """Say nothing until the call ends."""
    await asyncio.Event().wait()


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(value * 1e6))
    return duration
