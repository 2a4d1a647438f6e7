"""Users that a server makes for the programs of its own machine, with their keys."""

import platform
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from google.protobuf.json_format import MessageToDict

from quantplane import v1 as pb
from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import UNAVAILABLE, Database
from quantplane_server.identity import queries
from quantplane_server.identity.keys import hash_of, new_secret
from quantplane_server.rpc.caller import Caller

USERNAME = "local"
MAX_NAME = 64
NOT_FROM_A_NETWORK = Caller()


class OwnKey(NamedTuple):
    """An API key that is made here."""

    name: str
    role: str
    secret: str


class Secrets(NamedTuple):
    """The keys of what `up` runs, by their roles: none permits more than it needs."""

    admin: str
    broker: str
    strategy: str


@asynccontextmanager
async def local_keys(dsn: str, listen: str) -> AsyncIterator[Secrets]:
    """Yield keys of the user "local", who may do everything; remove them at the end.

    They are new each time, and those that a killed server has left are removed, so
    whatever else listened there meanwhile has been shown nothing of use.
    """
    secrets = Secrets(new_secret(), new_secret(), new_secret())
    place = f"{listen} on {platform.node()}"
    keys = [
        OwnKey(f"{role} at {place}"[:MAX_NAME], role, secret)
        for role, secret in secrets._asdict().items()
    ]
    await put_keys(dsn, USERNAME, keys)
    try:
        yield secrets
    finally:
        with suppress(*UNAVAILABLE):  # the next start removes them
            await put_keys(dsn, USERNAME, keys, gone=True)


async def put_keys(
    dsn: str, username: str, keys: Sequence[OwnKey], gone: bool = False
) -> None:
    """Have an active admin without a password, with these keys, or without them.

    Keys of the same names are removed. `dsn` is of the reference data.
    """
    db = await Database.open(dsn, 1)
    try:
        async with db.transaction() as conn:
            await queries.lock(conn)
            entries = []
            is_new = await queries.put_admin(conn, username)
            if is_new is not None:
                action = "create" if is_new else "update"
                told = {"role": "admin", "is_active": True}
                entries.append(Entry(action, "user", username, new=told))
            names = [key.name for key in keys]
            removed = await queries.remove_keys(conn, username, names)
            entries += [Entry("delete", "api_key", key_id) for key_id in removed]
            for key in [] if gone else keys:
                asked = pb.ApiKey(username=username, name=key.name, role=key.role)
                made = await queries.add_key(conn, asked, hash_of(key.secret))
                told = MessageToDict(asked, preserving_proto_field_name=True)
                entries.append(Entry("create", "api_key", made.key_id, new=told))
            await record(conn, NOT_FROM_A_NETWORK, entries)
    finally:
        await db.close()
