"""grpc.health.v1, following the backends.

    the backends, each checked once a second  →  the services that need them

A server that drains is not serving, whatever its backends do.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quantplane.tls import explain, open_channel
from quantplane_server.rpc.interceptor import Context

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0  # between checks
CHECK_S = 1.0  # that a check may take

Check = Callable[[], Awaitable[object]]  # raises where something is wrong
Status = health_pb2.HealthCheckResponse


@dataclass
class Backend:
    """What services stand on, as it was found last."""

    changed_at: datetime
    problem: str = ""  # empty: it is up

    @property
    def up(self) -> bool:
        return not self.problem


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says of each service whether the backends it can't do without answer."""

    def __init__(
        self, checks: Mapping[str, Check], needs: Mapping[str, Iterable[str]]
    ) -> None:
        """`needs` says of each service which of the backends; "" is the server.

        All are taken to be up: who starts has just reached them.
        """
        self.backends = {name: Backend(datetime.now(UTC)) for name in checks}
        self._checks = checks
        self._needs = {service: list(names) for service, names in needs.items()}
        self._statuses = dict.fromkeys(needs, Status.SERVING)
        self._draining = False
        self._changed = asyncio.Event()  # replaced whenever it is set

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(INTERVAL_S)

    async def check(self) -> None:
        """Check all backends, side by side."""
        problems = await asyncio.gather(*map(_problem, self._checks.values()))
        for name, problem in zip(self._checks, problems, strict=True):
            self._note(name, problem)
        self._update()

    def drain(self) -> None:
        """Serve no more; whoever watches is told so, for the last time."""
        self._draining = True
        self._update()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> Any:
        if request.service not in self._statuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return Status(status=self._statuses[request.service])

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[Any]:
        told = None
        while True:
            changed, draining = self._changed, self._draining
            status = self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
            if status != told:
                yield Status(status=status)
                told = status
            if draining:
                return
            await changed.wait()

    def _note(self, name: str, problem: str) -> None:
        backend = self.backends[name]
        if bool(problem) != bool(backend.problem):
            backend.changed_at = datetime.now(UTC)
            if problem:
                logger.warning("%s: %s", name, problem)
            else:
                logger.info("%s is well", name)
        backend.problem = problem

    def _update(self) -> None:
        statuses = {service: self._status(service) for service in self._needs}
        if statuses != self._statuses or self._draining:
            self._statuses = statuses
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def _status(self, service: str) -> int:
        up = all(self.backends[name].up for name in self._needs[service])
        serving = up and not self._draining
        return int(Status.SERVING if serving else Status.NOT_SERVING)


async def _problem(check: Check) -> str:
    """Return what is wrong, in a line; empty if nothing is."""
    try:
        async with asyncio.timeout(CHECK_S):
            await check()
    except TimeoutError:
        return f"no answer in {CHECK_S:g} s"
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


async def check(target: str, service: str = "") -> str:
    """Return what the server at `target` says of a service, or UNREACHABLE."""
    try:
        return await ask(target, service)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return "SERVICE_UNKNOWN"
        if why := explain(error):
            logger.warning("%s: %s", target, why)
        return "UNREACHABLE"


async def ask(target: str, service: str = "") -> str:
    """Return what the server at `target` says of a service; "" is all of it.

    Raises AioRpcError.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    async with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(request, timeout=CHECK_S)
    return str(Status.ServingStatus.Name(response.status))
