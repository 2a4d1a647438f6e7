"""UserService: who there is, what roles permit, and the keys of processes."""

from quantplane import v1 as pb
from quantplane.v1 import users_pb2_grpc as rpc
from quantplane_server import pages as places
from quantplane_server.db import Database
from quantplane_server.errors import (
    KeyReused,
    ResultTooLarge,
    Unauthenticated,
    UnknownUser,
)
from quantplane_server.identity import changes, checks, queries
from quantplane_server.identity.changes import By
from quantplane_server.identity.logins import Logins
from quantplane_server.identity.passwords import Passwords
from quantplane_server.identity.sessions import Changed
from quantplane_server.principal import principal
from quantplane_server.reference import pages
from quantplane_server.rpc.caller import caller
from quantplane_server.rpc.interceptor import Context
from quantplane_server.tokens import Tokens

VIEWER = "viewer"  # the role of a user who is created without one
MAX_PERMISSIONS = 10_000


class UserService(rpc.UserServiceServicer):
    """Kept in the database; `changed` is awaited after each change."""

    def __init__(
        self,
        db: Database,
        tokens: Tokens,
        passwords: Passwords,
        logins: Logins,
        changed: Changed,
    ) -> None:
        self._db = db
        self._tokens = tokens
        self._passwords = passwords
        self._logins = logins
        self._changed = changed

    # --- Users ---

    async def CreateUser(
        self, request: pb.CreateUserRequest, context: Context
    ) -> pb.CreateUserResponse:
        asked, password = request.user, request.password
        asked.role = asked.role or VIEWER
        checks.check_create_user(request)
        hash = await self._passwords.hash(password) if password else None
        user, is_new = await changes.create_user(self._db, _by(context), asked, hash)
        if not is_new:
            await self._check_same(user, request, context)
        await self._changed()
        return pb.CreateUserResponse(user=user)

    async def _check_same(
        self, user: pb.User, request: pb.CreateUserRequest, context: Context
    ) -> None:
        """Raise KeyReused unless a user who is there is as it was asked for."""
        name, asked = user.username, request.user
        if (asked.email, asked.role) != (user.email, user.role):
            raise KeyReused("username", name)
        if request.password:
            try:
                await self._logins.check(
                    "create", name, request.password, caller(context)
                )
            except Unauthenticated:
                raise KeyReused("username", name) from None

    async def GetUser(
        self, request: pb.GetUserRequest, context: Context
    ) -> pb.GetUserResponse:
        checks.check_username(request)
        async with self._db.connection() as conn:
            user = await queries.user(conn, request.username)
        if user is None:
            raise UnknownUser(request.username)
        return pb.GetUserResponse(user=user)

    async def ListUsers(
        self, request: pb.ListUsersRequest, context: Context
    ) -> pb.ListUsersResponse:
        checks.check_page_size(request)
        behind, limit = pages.begin(self._tokens, request)
        async with self._db.transaction(readonly=True) as conn:
            rows = queries.users_after(conn, behind, limit + 1)
            page, more = await pages.cut(rows, limit)
        response = pb.ListUsersResponse(users=page)
        if more:
            response.next_page_token = pages.token_behind(
                self._tokens, request, page[-1].username
            )
        return response

    async def UpdateUser(
        self, request: pb.UpdateUserRequest, context: Context
    ) -> pb.UpdateUserResponse:
        checks.check_update_user(request)
        user = await changes.update_user(
            self._db, _by(context), request.user, request.update_mask.paths
        )
        await self._changed()
        return pb.UpdateUserResponse(user=user)

    async def SetPassword(
        self, request: pb.SetPasswordRequest, context: Context
    ) -> pb.SetPasswordResponse:
        by = _by(context)
        request.username = name = request.username or by.caller.name
        is_own = name == by.caller.name
        checks.check_set_password(request, is_own)
        known = None
        if is_own:
            known = await self._logins.check(
                "set_password", name, request.old_password, by.caller
            )
        else:  # before the work of hashing, which anybody known could have done
            async with self._db.connection() as conn:
                await changes.check_permits(conn, by, "users", "update")
        hash = await self._passwords.hash(request.new_password)
        await changes.set_password(self._db, by, name, hash, known)
        await self._changed()
        return pb.SetPasswordResponse()

    # --- Permissions ---

    async def ListPermissions(
        self, request: pb.ListPermissionsRequest, context: Context
    ) -> pb.ListPermissionsResponse:
        async with self._db.connection() as conn:
            permissions = await queries.permissions(conn, MAX_PERMISSIONS + 1)
        if len(permissions) > MAX_PERMISSIONS:
            raise ResultTooLarge(MAX_PERMISSIONS, "permissions")
        return pb.ListPermissionsResponse(permissions=permissions)

    async def GrantPermission(
        self, request: pb.GrantPermissionRequest, context: Context
    ) -> pb.GrantPermissionResponse:
        checks.check_permission(request.permission)
        await changes.grant(self._db, _by(context), request.permission)
        await self._changed()
        return pb.GrantPermissionResponse()

    async def RevokePermission(
        self, request: pb.RevokePermissionRequest, context: Context
    ) -> pb.RevokePermissionResponse:
        checks.check_permission(request.permission)
        await changes.ungrant(self._db, _by(context), request.permission)
        await self._changed()
        return pb.RevokePermissionResponse()

    # --- API keys ---

    async def CreateApiKey(
        self, request: pb.CreateApiKeyRequest, context: Context
    ) -> pb.CreateApiKeyResponse:
        asked, by = request.key, _by(context)
        checks.check_create_key(asked)
        asked.username = asked.username or by.caller.name
        key, secret = await changes.create_key(self._db, by, asked)
        await self._changed()
        return pb.CreateApiKeyResponse(key=key, secret=secret)

    async def ListApiKeys(
        self, request: pb.ListApiKeysRequest, context: Context
    ) -> pb.ListApiKeysResponse:
        checks.check_list_keys(request)
        place = places.place(self._tokens, request)
        limit = request.page_size or pages.PAGE
        async with self._db.connection() as conn:
            keys = await queries.keys_before(conn, request.username, place, limit + 1)
        response = pb.ListApiKeysResponse(keys=keys[:limit])
        if len(keys) > limit:
            last = response.keys[-1]
            response.next_page_token = places.token_behind(
                self._tokens, request, last.created_at, last.key_id
            )
        return response

    async def RevokeApiKey(
        self, request: pb.RevokeApiKeyRequest, context: Context
    ) -> pb.RevokeApiKeyResponse:
        checks.check_key_id(request)
        key = await changes.revoke_key(self._db, _by(context), request.key_id)
        await self._changed()
        return pb.RevokeApiKeyResponse(key=key)


def _by(context: Context) -> By:
    known = principal()
    if known is None:
        raise Unauthenticated
    return By(caller(context), known.role, known.strategy_id)
