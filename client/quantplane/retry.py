"""Calls that are made again until the server has answered."""

import asyncio
import logging
from typing import Any

import grpc

from quantplane.errors import describe, is_transient
from quantplane.follow import Backoff

logger = logging.getLogger(__name__)


async def answered(method: Any, request: Any) -> Any:
    """Return the server's answer, however long it is away.

    For calls that are safe to repeat. Raises AioRpcError for what would not pass.
    """
    backoff = Backoff()
    while True:
        try:
            return await method(request)
        except grpc.aio.AioRpcError as error:
            if not is_transient(error):
                raise
            delay = backoff.next()
            logger.warning("%s; trying again in %.1f s", describe(error), delay)
        await asyncio.sleep(delay)
