"""AuthService: people log in, stay logged in, and log out."""

from quantplane import v1 as pb
from quantplane.v1 import auth_pb2_grpc as rpc
from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Database
from quantplane_server.errors import Unauthenticated
from quantplane_server.identity import checks, queries
from quantplane_server.identity.logins import Logins
from quantplane_server.identity.sessions import Sessions
from quantplane_server.principal import principal
from quantplane_server.rpc.caller import caller
from quantplane_server.rpc.interceptor import Context


class AuthService(rpc.AuthServiceServicer):
    """Sessions live in the database; what their tokens say is checked without it."""

    def __init__(self, db: Database, logins: Logins, sessions: Sessions) -> None:
        self._db = db
        self._logins = logins
        self._sessions = sessions

    async def Login(
        self, request: pb.LoginRequest, context: Context
    ) -> pb.LoginResponse:
        checks.check_login(request)
        name, by = request.username, caller(context)
        verified = await self._logins.check("login", name, request.password, by)
        async with self._db.transaction() as conn:
            # Meanwhile the user may have been disabled, or got another password.
            if await queries.account(conn, name, lock=True) != verified:
                raise Unauthenticated
            tokens = await self._sessions.begin(conn, verified.user_id)
            await queries.logged_in(conn, verified.user_id)
            by = by._replace(name=name, user_id=verified.user_id)
            await record(conn, by, [Entry("login", "user", name)])
        await self._sessions.limit(verified.user_id)
        return pb.LoginResponse(tokens=tokens)

    async def RefreshToken(
        self, request: pb.RefreshTokenRequest, context: Context
    ) -> pb.RefreshTokenResponse:
        tokens = await self._sessions.refresh(request.refresh_token, caller(context))
        return pb.RefreshTokenResponse(tokens=tokens)

    async def Logout(
        self, request: pb.LogoutRequest, context: Context
    ) -> pb.LogoutResponse:
        await self._sessions.end(request.refresh_token, caller(context))
        return pb.LogoutResponse()

    async def WhoAmI(
        self, request: pb.WhoAmIRequest, context: Context
    ) -> pb.WhoAmIResponse:
        known = principal()
        if known is None:
            raise Unauthenticated
        async with self._db.connection() as conn:
            permissions = await queries.permissions_of(conn, known.role)
        return pb.WhoAmIResponse(
            user_id=known.user_id,
            username=known.username,
            role=known.role,
            key_id=known.key_id,
            strategy_id=known.strategy_id,
            permissions=permissions,
        )
