"""Ending tasks for certain."""

import asyncio
import logging
from typing import Any

logger = logging.getLogger(__name__)

AGAIN_S = 0.2


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended.

    Once is not always enough: a library that times an operation out may take a
    cancellation that comes at the same moment for its own.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                logger.error("a background task failed", exc_info=error)
