"""Sessions: what a password is exchanged for, renewed for as long as they are used."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from quantplane import v1 as pb
from quantplane.errors import describe
from quantplane.retry import answered

logger = logging.getLogger(__name__)

# A third of an access token's life, so that a clock of this machine, however wrong,
# does not matter.
RENEW_S = 300.0
LOOK_S = 5.0  # between two looks at the clock: a machine may have slept


class Session:
    """The tokens of one login, exchanged for new ones before they expire."""

    def __init__(self, auth: Any, tokens: pb.Tokens) -> None:
        """`auth` is a stub of AuthService whose calls show no credential."""
        self._auth = auth
        self._tokens = tokens
        self._at_s = time.time()
        self._lock = asyncio.Lock()

    @property
    def tokens(self) -> pb.Tokens:
        return self._tokens

    def token(self) -> str:
        """Return the access token of now."""
        return str(self._tokens.access_token)

    async def run(self) -> None:
        """Renew the tokens until cancelled, or until the session has ended."""
        while True:
            # By the clock on the wall: others stand still while a machine sleeps.
            if abs(time.time() - self._at_s) < RENEW_S:
                await asyncio.sleep(min(LOOK_S, RENEW_S))
                continue
            try:
                await self.renew()
            except grpc.aio.AioRpcError as error:
                logger.warning("the session has ended: %s", describe(error))
                return

    async def renew(self) -> None:
        """Exchange the tokens; callers that come meanwhile wait for the same ones.

        Waits for a server that is away. Raises AioRpcError if the session has ended.
        """
        before = self._tokens
        async with self._lock:
            if self._tokens is before:
                self._tokens = await self._exchange(before)
                self._at_s = time.time()

    async def _exchange(self, tokens: pb.Tokens) -> pb.Tokens:
        request = pb.RefreshTokenRequest(refresh_token=tokens.refresh_token)
        response = await answered(self._auth.RefreshToken, request)
        renewed: pb.Tokens = response.tokens
        return renewed

    async def end(self) -> None:
        """End the session. Raises AioRpcError."""
        async with self._lock:
            token = self._tokens.refresh_token
            await self._auth.Logout(pb.LogoutRequest(refresh_token=token))


async def log_in(auth: Any, username: str, password: str) -> pb.Tokens:
    """Return the tokens of a new session. Raises AioRpcError."""
    request = pb.LoginRequest(username=username, password=password)
    tokens: pb.Tokens = (await auth.Login(request)).tokens
    return tokens
