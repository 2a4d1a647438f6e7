"""grpc.health.v1, following the backends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from quantplane.tls import explain, open_channel

logger = logging.getLogger(__name__)

CHECK_S = 1.0

Check = Callable[[], Awaitable[object]]
Status = health_pb2.HealthCheckResponse


class Health(health.HealthServicer):  # type: ignore[misc]
    """Says of each service whether the backends it can't do without answer."""

    async def follow(self, needs: Mapping[str, list[Check]]) -> None:
        """Check until cancelled. `needs` names services; "" is the whole server."""
        while True:
            for service, checks in needs.items():
                serving = await _all_answer(checks)
                await self.set(
                    service, Status.SERVING if serving else Status.NOT_SERVING
                )
            await asyncio.sleep(CHECK_S)


async def _all_answer(checks: list[Check]) -> bool:
    try:
        async with asyncio.timeout(CHECK_S):
            for check in checks:
                await check()
    except Exception as error:
        logger.debug("not healthy: %r", error)
        return False
    return True


async def check(target: str) -> str:
    """Return what the server at `target` says of itself, or UNREACHABLE."""
    try:
        return await ask(target)
    except grpc.aio.AioRpcError as error:
        if why := explain(error):
            logger.warning("%s: %s", target, why)
        return "UNREACHABLE"


async def ask(target: str) -> str:
    """Return what the server at `target` says of itself. Raises AioRpcError."""
    async with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_S)
    return str(Status.ServingStatus.Name(response.status))
