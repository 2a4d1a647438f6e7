"""PostgreSQL and Valkey from wheels, run and watched by the server itself.

Both listen on sockets only that this user can reach, and stop when the process
that started them is gone, however it went. For Linux and macOS.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from . import folder
from .errors import EmbeddedError
from .postgres import Postgres
from .valkey import Valkey

__all__ = ["EmbeddedError", "Postgres", "Services", "Valkey", "running", "services"]


@dataclass(frozen=True)
class Services:
    postgres_dsn: str
    redis_url: str
    postgres: Postgres
    valkey: Valkey


@asynccontextmanager
async def services(data_dir: Path | None) -> AsyncIterator[Services]:
    """Run both in `data_dir`; None is a folder that is removed at the end."""
    postgres, valkey = Postgres(data_dir), Valkey(data_dir)
    try:
        await _both(postgres.start(), valkey.start())
        yield Services(postgres.dsn, valkey.url, postgres, valkey)
    finally:
        await _both(postgres.close(), valkey.close())


def running(data_dir: Path) -> tuple[str, str] | None:
    """The DSN and the URL of services that another process runs in `data_dir`."""
    dsn = folder.running(data_dir / f"{Postgres.name}.lock")
    url = folder.running(data_dir / f"{Valkey.name}.lock")
    return (dsn, url) if dsn and url else None


async def _both(*steps: Coroutine[None, None, None]) -> None:
    # Each step ends before an error leaves: none is left half done.
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
