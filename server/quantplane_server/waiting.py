"""Waiting for what a process stands on: as long as it takes, and said."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import monotonic
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import asyncpg
from redis.exceptions import AuthenticationError, AuthorizationError, ResponseError

from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.db import Database

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 0.2
TELL_S = 10.0  # between two lines that say what is waited for
AWAY = databases.UNAVAILABLE + buses.UNAVAILABLE

# No later try would pass, whoever waits. Some of these are kinds of AWAY.
FINAL = (
    *(asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError),
    *(AuthenticationError, AuthorizationError, ResponseError),
    ssl.SSLCertVerificationError,
)


class Refused(RuntimeError):
    """A backend is there, and does not let this process in. The text names it."""

    def __init__(self, what: str, error: Exception) -> None:
        super().__init__(f"{what} refuses: {error}")


async def awaited(
    what: str,
    attempt: Callable[[], Awaitable[T]],
    at_most_s: float | None = None,
    quiet: bool = False,
) -> T:
    """Return what `attempt` does, made until the backend `what` is up.

    It is said at once that it is waited for, and why, and again every TELL_S; not if
    `quiet`. Raises Refused, and what `attempt` raised last once `at_most_s` are over.
    """
    began_s = tell_s = monotonic()
    while True:
        try:
            result = await attempt()
        except (*AWAY, *FINAL) as error:
            if final := next((e for e in _chain(error) if isinstance(e, FINAL)), None):
                raise Refused(what, final) from error
            now_s = monotonic()
            if at_most_s is not None and now_s - began_s >= at_most_s:
                raise
            if now_s >= tell_s and not quiet:
                tell_s = now_s + TELL_S
                logger.warning("waiting for %s: %s", what, error or repr(error))
            await asyncio.sleep(RETRY_S)
        else:
            if tell_s > began_s:
                waited_s = monotonic() - began_s
                logger.info("%s is up, after %.1f s", what, waited_s)
            return result


async def databases_up(*dsns: str, at_most_s: float | None = None) -> None:
    """Return once databases are up, each after at most so long. Raises as `awaited`."""
    for dsn in dict.fromkeys(dsns):
        attempt = partial(_look_at, dsn)
        await awaited(f"PostgreSQL at {place(dsn)}", attempt, at_most_s)


async def _look_at(dsn: str) -> None:
    db = await Database.open(dsn)
    await db.close()


def place(url: str) -> str:
    """Return where a DSN or URL leads, without what it says of the user."""
    parts = urlsplit(url)
    host = parse_qs(parts.query).get("host", [""])[0] or parts.hostname
    if not host:  # a socket
        return parts.path
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:  # several hosts
        port = ""
    return f"{host}{port}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
