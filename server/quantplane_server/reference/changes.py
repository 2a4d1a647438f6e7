"""Changes of reference data: each with its audit entry, in one transaction."""

from collections.abc import Collection
from typing import Any

from google.protobuf.json_format import MessageToDict

from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Connection, Database
from quantplane_server.errors import EtagMismatch, KeyReused
from quantplane_server.reference import queries
from quantplane_server.reference.queries import CONFIGURATIONS, Resource
from quantplane_server.rpc.caller import Caller

SECRETS = {"password", "secret", "token", "key", "dsn"}
REDACTED = "[redacted]"


async def create(db: Database, resource: Resource, asked: Any, caller: Caller) -> Any:
    """Return the row of these fields, new or as it is. Raises KeyReused."""
    key = getattr(asked, resource.key)
    setattr(asked, resource.author, caller.name)
    async with db.transaction() as conn:
        row, is_new = await queries.claim(conn, resource, asked)
        if is_new:
            await _record(conn, resource, caller, "create", key, new=row)
        elif await queries.update(conn, resource, asked, resource.columns):
            raise KeyReused(resource.key, key)  # and the change is undone
    return row


async def update(
    db: Database,
    resource: Resource,
    asked: Any,
    fields: Collection[str],
    caller: Caller,
) -> Any | None:
    """Set fields of a row; return it, None if it is not there. Raises EtagMismatch.

    What is as asked already is returned as it is, whatever the etag: the call is a
    retry.
    """
    key = getattr(asked, resource.key)
    setattr(asked, resource.author, caller.name)
    async with db.transaction() as conn:
        old = await _locked(conn, resource, key)
        if old is None:
            return None
        new = await queries.update(conn, resource, asked, fields)
        if new is None:
            return old
        _check_etag(resource, old, asked.etag)  # or the change is undone
        await _record(conn, resource, caller, "update", key, old, new)
    return new


async def delete(
    db: Database, resource: Resource, key: str, etag: str, caller: Caller
) -> None:
    """Delete a row if it is there. Raises EtagMismatch."""
    async with db.transaction() as conn:
        old = await _locked(conn, resource, key)
        if old is None:
            return
        _check_etag(resource, old, etag)
        await queries.delete(conn, resource, key)
        await _record(conn, resource, caller, "delete", key, old)


async def _locked(conn: Connection, resource: Resource, key: str) -> Any | None:
    return (await queries.find(conn, resource, [key], lock=True)).get(key)


def _check_etag(resource: Resource, row: Any, etag: str) -> None:
    if etag and etag != row.etag:
        name = f"{resource.kind} {getattr(row, resource.key)!r}"
        raise EtagMismatch(name, row.etag)


async def _record(
    conn: Connection,
    resource: Resource,
    caller: Caller,
    action: str,
    key: str,
    old: Any = None,
    new: Any = None,
) -> None:
    values = (_audited(resource, row) for row in (old, new))
    await record(conn, caller, [Entry(action, resource.kind, key, *values)])


def _audited(resource: Resource, row: Any) -> dict[str, Any] | None:
    """Return a row as JSON, without what is secret."""
    if row is None:
        return None
    value: dict[str, Any] = MessageToDict(row, preserving_proto_field_name=True)
    del value["etag"]
    if resource is CONFIGURATIONS and is_secret(row.key):
        value["value"] = REDACTED
    return value


def is_secret(key: str) -> bool:
    """Tell whether the value under a key is kept out of the audit log."""
    return key.rpartition(".")[2].lower() in SECRETS
