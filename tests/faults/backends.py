"""PostgreSQL and Valkey in a data folder, started and killed from another process.

To start PostgreSQL as root forks, and a fork of a process whose gRPC is busy crashes.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from quantplane_server.embedded import Postgres, Valkey

Kind = Literal["postgres", "valkey"]
KINDS = {"postgres": Postgres, "valkey": Valkey}


class Service:
    """One of them. Its address does not change."""

    def __init__(self, kind: Kind, folder: Path, pool: ProcessPoolExecutor) -> None:
        self.data = folder / kind
        self._kind = kind
        self._pool = pool
        self.address: str = pool.submit(_open, kind, folder).result()

    async def start(self) -> None:
        """Return when it takes commands; at once if it already does."""
        await self._do("start")

    async def kill(self) -> None:
        """Send SIGKILL."""
        await self._do("kill")

    async def close(self) -> None:
        await self._do("close")

    async def _do(self, what: str) -> None:
        await asyncio.wrap_future(self._pool.submit(_do, self._kind, what))


@contextmanager
def backends(folder: Path) -> Iterator[tuple[Service, Service]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        services = Service("postgres", folder, pool), Service("valkey", folder, pool)
        try:
            yield services
        finally:
            for service in services:
                asyncio.run(service.close())


_services: dict[Kind, Postgres | Valkey] = {}  # in the other process


def _open(kind: Kind, folder: Path) -> str:
    service = _services[kind] = KINDS[kind](folder)
    return service.address


def _do(kind: Kind, what: str) -> None:
    asyncio.run(getattr(_services[kind], what)())
