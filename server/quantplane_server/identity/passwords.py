"""Passwords are kept as Argon2id hashes, which take memory and time to compute.

That work is done in threads, a few at a time: it can neither hold up the server's
other calls nor fill its memory, however many log in at once.
"""

import asyncio
import base64
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from quantplane_server.errors import Overloaded

AT_A_TIME = 2
MAX_WAITING = 100
NO_PASSWORD = "!"  # kept of a user who can't log in

HASHER = PasswordHasher(
    time_cost=2, memory_cost=64 << 10, parallelism=1, hash_len=32, salt_len=16
)

T = TypeVar("T")


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


# A hash of no known password. Verified where there is no other, so that it takes as
# long to learn that.
DUMMY = (
    f"$argon2id$v=19$m={HASHER.memory_cost},t={HASHER.time_cost},"
    f"p={HASHER.parallelism}${_encoded(secrets.token_bytes(16))}"
    f"${_encoded(secrets.token_bytes(32))}"
)


class Passwords:
    """Hashes and verifies. Raises Overloaded where too many wait."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_A_TIME, "passwords")
        self._waiting = 0

    def close(self) -> None:
        """Return once what is computed is."""
        self._threads.shutdown(cancel_futures=True)

    async def hash(self, password: str) -> str:
        return await self._do(lambda: HASHER.hash(password))

    async def verify(self, kept: str | None, password: str) -> bool:
        """Tell whether this is the password of a hash; None: of nobody's."""
        is_one = kept is not None and kept != NO_PASSWORD
        hash = kept if kept is not None and is_one else DUMMY
        return await self._do(lambda: _matches(hash, password)) and is_one

    async def _do(self, work: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise Overloaded(MAX_WAITING)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def _matches(hash: str, password: str) -> bool:
    try:
        return HASHER.verify(hash, password)
    except (VerificationError, InvalidHashError):
        return False
