"""grpc.health.v1, following the backends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

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
    request = health_pb2.HealthCheckRequest()
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            response = await stub.Check(request, timeout=CHECK_S)
        except grpc.aio.AioRpcError:
            return "UNREACHABLE"
    return str(Status.ServingStatus.Name(response.status))
