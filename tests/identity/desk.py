"""AuthService and UserService on a channel, called as whom a test says."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
from argon2 import PasswordHasher

from quantplane import v1 as pb
from quantplane_server.constraints import refusal
from quantplane_server.db import Database
from quantplane_server.identity import access
from quantplane_server.identity.auth import AuthService
from quantplane_server.identity.logins import Logins
from quantplane_server.identity.passwords import Passwords
from quantplane_server.identity.sessions import Sessions
from quantplane_server.identity.users import UserService
from quantplane_server.principal import PRINCIPAL, Principal
from quantplane_server.rpc.errors import errors_to_status
from quantplane_server.rpc.interceptor import Call, Interceptor, Unguarded
from quantplane_server.tokens import Tokens
from tests.reference import fetch

PASSWORD = "correct horse battery"
WRONG = "incorrect horse battery"
# As a hash of the server's, but quick to verify.
HASH = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", {})


class Desk:
    """The two services, and a look at what is behind them."""

    def __init__(self, db: Database, dsn: str, channel: grpc.aio.Channel) -> None:
        self.db = db
        self.dsn = dsn
        self.auth = pb.AuthServiceStub(channel)
        self.user = pb.UserServiceStub(channel)
        self.changes = 0  # that the services have told

    async def add(self, username: str = "ann", role: str = "viewer") -> None:
        """Store a user with PASSWORD."""
        await fetch(
            self.dsn,
            """
            INSERT INTO users (username, email, password_hash, role)
            VALUES ($1, $1 || '@desk', $2, $3)
            """,
            *(username, HASH, role),
        )

    async def permit(self, role: str, *permissions: str) -> None:
        """Have a role permit "resource.action"."""
        for permission in permissions:
            await fetch(
                self.dsn,
                "INSERT INTO permissions (role, resource, action) VALUES ($1, $2, $3)",
                *(role, *permission.split(".")),
            )

    async def log_in(
        self, username: str = "ann", password: str = PASSWORD
    ) -> pb.Tokens:
        request = pb.LoginRequest(username=username, password=password)
        return (await self.auth.Login(request)).tokens

    async def refresh(self, token: str) -> pb.Tokens:
        request = pb.RefreshTokenRequest(refresh_token=token)
        return (await self.auth.RefreshToken(request)).tokens

    async def log_out(self, token: str) -> None:
        await self.auth.Logout(pb.LogoutRequest(refresh_token=token))

    async def call(self, request: Any, by: str = "root", bound: str = "") -> Any:
        """Call the method of UserService that a request is of, as this user."""
        method = type(request).__name__.removesuffix("Request")
        metadata = (("as", by), ("bound", bound))
        return await getattr(self.user, method)(request, metadata=metadata)

    async def update(
        self, username: str, mask: Sequence[str], by: str = "root", **fields: Any
    ) -> pb.User:
        request = pb.UpdateUserRequest(
            user=pb.User(username=username, **fields),
            update_mask={"paths": mask},  # type: ignore[arg-type]
        )
        user: pb.User = (await self.call(request, by)).user
        return user

    async def get(self, username: str = "ann") -> pb.User:
        user: pb.User = (await self.call(pb.GetUserRequest(username=username))).user
        return user

    async def value(self, query: str, *args: Any) -> Any:
        ((value,),) = await fetch(self.dsn, query, *args)
        return value

    async def execute(self, query: str, *args: Any) -> None:
        await fetch(self.dsn, query, *args)

    async def audited(self) -> list[tuple[str, str, str]]:
        """Return what the audit log says was done: action, kind, name."""
        return await fetch(
            self.dsn,
            "SELECT action, resource_type, resource_id FROM audit_logs ORDER BY log_id",
        )

    async def claims(self, tokens: pb.Tokens) -> access.Claims | None:
        """Return what the access token says to a server that verifies it now."""
        return await self.claims_at(tokens, datetime.now(UTC))

    async def claims_at(self, tokens: pb.Tokens, now: datetime) -> access.Claims | None:
        rows = await fetch(
            self.dsn, "SELECT key_id, secret, created_at FROM signing_keys"
        )
        keys = [access.SigningKey(*row) for row in rows]
        return access.verify(keys, tokens.access_token, now)


class AsTold(Unguarded):
    """Lets anybody call, as the user that the metadata names."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        metadata = dict(call.context.invocation_metadata() or ())
        if name := metadata.get("as"):
            query = "SELECT user_id::text, username, role FROM users WHERE username=$1"
            async with self._db.connection() as conn:
                user = Principal(*await conn.fetchrow(query, name))
            bound = str(metadata.get("bound", ""))
            PRINCIPAL.set(user._replace(strategy_id=bound))
        yield


@asynccontextmanager
async def open_desk(dsn: str) -> AsyncIterator[Desk]:
    """Serve the two; who calls is in the metadata "as", and not checked.

    There is one user, root, an admin.
    """
    db = await Database.open(dsn)
    async with db.connection() as conn:
        tokens = await Tokens.load(conn)
        await conn.execute("TRUNCATE users, login_failures CASCADE")
    passwords = Passwords()

    async def changed() -> None:
        desk.changes += 1

    logins = Logins(db, passwords)
    server = grpc.aio.server(
        interceptors=[Interceptor(errors_to_status(refusal), AsTold(db))]
    )
    auth = AuthService(db, logins, Sessions(db, tokens, changed))
    users = UserService(db, tokens, passwords, logins, changed)
    pb.add_AuthServiceServicer_to_server(auth, server)
    pb.add_UserServiceServicer_to_server(users, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            desk = Desk(db, dsn, channel)
            await desk.add("root", "admin")
            yield desk
    finally:
        await server.stop(0)
        passwords.close()
        await db.close()
