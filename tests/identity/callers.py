"""Users and keys as rows, and calls of every method of the contract."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from quantplane import reason_of
from quantplane.client import services
from quantplane_server.identity import keys

METHODS: list[MethodDescriptor] = [m for s, _ in services() for m in s.methods]

Metadata = Sequence[tuple[str, str]]


def path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def named(name: str) -> MethodDescriptor:
    (method,) = (method for method in METHODS if method.name == name)
    return method


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


class People:
    """Changes who may do what, as an administrator with SQL does."""

    def __init__(self, conn: asyncpg.Connection) -> None:
        self.conn = conn

    async def user(self, name: str, role: str = "viewer") -> str:
        """Add a user; return the id."""
        return str(
            await self.conn.fetchval(
                "INSERT INTO users (username, email, password_hash, role)"
                " VALUES ($1, $1 || '@desk.test', '!', $2) RETURNING user_id",
                *(name, role),
            )
        )

    async def key(self, role: str, **columns: Any) -> Metadata:
        """Add a key of a role, of a user of its own; return what its calls carry."""
        secret = keys.new_secret()
        columns = {
            "name": "test", "role": role, "key_hash": keys.hash_of(secret)
        } | columns  # fmt: skip
        if "user_id" not in columns:
            columns["user_id"] = await self.user(secret[3:20], role)
        values = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
        await self.conn.execute(
            f"INSERT INTO api_keys ({', '.join(columns)}) VALUES ({values})",
            *columns.values(),
        )
        return bearer(secret)

    async def permissions(self) -> set[tuple[str, str, str]]:
        rows = await self.conn.fetch("SELECT role, resource, action FROM permissions")
        return {tuple(row) for row in rows}


@asynccontextmanager
async def people_of(dsn: str) -> AsyncIterator[People]:
    conn = await asyncpg.connect(dsn)
    try:
        yield People(conn)
    finally:
        await conn.close()


async def outcome(call: Awaitable[Any]) -> str:
    """Await a call; return the reason of its error, or its code, or OK."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error) or error.code().name
    return "OK"


class Channel:
    """Calls any method, and says what comes of it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.opened = channel

    def begin(
        self, method: MethodDescriptor, metadata: Metadata, request: Any = None
    ) -> Any:
        """Begin a call; a stream of requests has the one, and stays open."""
        kind = (
            f"{'stream' if method.client_streaming else 'unary'}"
            f"_{'stream' if method.server_streaming else 'unary'}"
        )
        request = request or message(method)
        call = getattr(self.opened, kind)(
            path(method),
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        if not method.client_streaming:
            return call(request, metadata=metadata)
        return call(_only(request), metadata=metadata)

    async def response(
        self, method: MethodDescriptor, metadata: Metadata, request: Any = None
    ) -> Any:
        """Return the response, or the first one."""
        call = self.begin(method, metadata, request)
        if not method.server_streaming:
            return await call
        try:
            return await call.read()
        finally:
            call.cancel()

    async def answer(
        self, method: MethodDescriptor, metadata: Metadata, request: Any = None
    ) -> str:
        """Return the reason of the error, or OK."""
        return await outcome(self.response(method, metadata, request))

    async def answers(self, metadata: Metadata) -> dict[str, str]:
        """Return what every method of the contract says to an empty request."""
        return {path(m): await self.answer(m, metadata) for m in METHODS}


@asynccontextmanager
async def channel(target: str) -> AsyncIterator[Channel]:
    async with grpc.aio.insecure_channel(target) as opened:
        yield Channel(opened)


def message(method: MethodDescriptor, **fields: Any) -> Any:
    return GetMessageClass(method.input_type)(**fields)


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request
