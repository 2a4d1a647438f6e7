"""Work in the background: ending it for certain, and saying once that it fails."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

AGAIN_S = 0.2
CLOSE_S = 1.0


class Outage:
    """What keeps from being done some work that is tried again and again.

    As a context manager it takes what the work raises. It is said once that the work
    fails, and once that it works again: after a block that ends without an error, or
    when work that goes on calls `over`. Errors that are `known` to pass are one line,
    and all of them one outage; any other has its traceback, and is said besides.
    """

    def __init__(
        self,
        logger: logging.Logger,
        work: str,
        known: tuple[type[Exception], ...] = (),
    ) -> None:
        """`work` is for people: "recording"."""
        self._logger = logger
        self._work = work
        self._known = known
        self._told: set[type[Exception] | None] = set()
        self._since_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            self.over()
            return False
        if not isinstance(error, Exception):
            return False
        self._tell(error)
        return True

    def over(self) -> None:
        """Say that the work is done again, if it was not."""
        if self._told:
            self._told.clear()
            lasted_s = monotonic() - self._since_s
            self._logger.info("%s works again, after %.1f s", self._work, lasted_s)

    def _tell(self, error: Exception) -> None:
        is_known = isinstance(error, self._known)
        kind = None if is_known else type(error)
        if kind in self._told:
            return
        if not self._told:
            self._since_s = monotonic()
        self._told.add(kind)
        self._logger.warning(
            "%s fails, trying again: %r",
            *(self._work, error),
            exc_info=None if is_known else error,
        )


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


async def closed(
    close: Callable[[], Awaitable[None]], what: str, at_most_s: float = CLOSE_S
) -> None:
    """Finish something at the end of a process, or leave it.

    A backend that hangs, or is away, would keep the process otherwise, or fail it.
    """
    try:
        async with asyncio.timeout(at_most_s):
            await close()
    except TimeoutError:
        logger.warning("left unfinished after %g s: %s", at_most_s, what)
    except Exception as error:
        logger.warning("left unfinished: %s: %r", what, error)
