"""A server that says what calls have shown, and lets in who shows the right token."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from quantplane import v1 as pb
from tests.client import refuse

SYMBOLS = pb.ListSymbolsRequest()


class Door(pb.MarketDataServiceServicer, pb.AuthServiceServicer):
    """Lets in who shows `good`; `shown` has what each call showed, None for nothing."""

    def __init__(self, good=""):
        self.good = good
        self.shown = []
        self.refreshed = []  # refresh tokens, in order
        self.target = ""

    async def _enter(self, context):
        metadata = dict(context.invocation_metadata())
        token = metadata.get("authorization")
        self.shown.append(token)
        if self.good and token != f"Bearer {self.good}":
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")

    async def ListSymbols(self, request, context):
        await self._enter(context)
        return pb.ListSymbolsResponse()

    async def StreamQuotes(self, request, context):
        await self._enter(context)
        yield pb.StreamQuotesResponse(quotes=[pb.Quote(symbol="A")])

    async def PublishQuotes(self, requests, context):
        await self._enter(context)
        yield pb.PublishQuotesResponse(next_batch=1)
        async for _ in requests:
            pass

    async def Login(self, request, context):
        self.shown.append(dict(context.invocation_metadata()).get("authorization"))
        if request.password != "right":
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        return pb.LoginResponse(tokens=self.tokens())

    async def RefreshToken(self, request, context):
        self.shown.append(dict(context.invocation_metadata()).get("authorization"))
        self.refreshed.append(request.refresh_token)
        if request.refresh_token != f"r{len(self.refreshed) - 1}":
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        return pb.RefreshTokenResponse(tokens=self.tokens())

    async def Logout(self, request, context):
        return pb.LogoutResponse()

    def tokens(self):
        """Return the next ones, and let in who shows them."""
        number = len(self.refreshed)
        self.good = f"a{number}"
        tokens = pb.Tokens(access_token=self.good, refresh_token=f"r{number}")
        tokens.access_expires_at.GetCurrentTime()
        tokens.access_expires_at.seconds += 900
        return tokens


@asynccontextmanager
async def serving(good: str = "") -> AsyncIterator[Door]:
    server = grpc.aio.server()
    door = Door(good)
    pb.add_MarketDataServiceServicer_to_server(door, server)
    pb.add_AuthServiceServicer_to_server(door, server)
    door.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield door
    finally:
        await server.stop(None)
