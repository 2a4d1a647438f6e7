"""Work that comes while some is under way is done together next.

A commit costs the same for one command as for a hundred, so the commands of many
callers share one: at low load there is no delay, at high load rounds are large.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from quantplane_server.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Hands items to `work` by rounds of at most `most`, one round at a time.

    `work` returns a result for each item, in their order. Beyond `limit` waiting items
    callers are refused.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        most: int,
        limit: int,
    ) -> None:
        self._work = work
        self._most = most
        self._limit = limit
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def do(self, items: Sequence[Item]) -> list[Result]:
        """Return what came of each item. Raises what `work` raised, and Overloaded.

        A caller that gives up leaves its items to be done.
        """
        if len(self._waiting) + len(items) > self._limit:
            raise Overloaded(self._limit)
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return [await future for future in futures]

    async def close(self) -> None:
        """Return once everything that was taken is done."""
        if self._task:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while self._waiting:
            count = min(self._most, len(self._waiting))
            items, futures = zip(
                *(self._waiting.popleft() for _ in range(count)), strict=True
            )
            try:
                results = await self._work(list(items))
                for future, result in zip(futures, results, strict=True):
                    if not future.done():  # else its caller has given up
                        future.set_result(result)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # nobody may be there to retrieve it
            finally:
                for future in futures:
                    future.cancel()  # where neither came: this task is cancelled
