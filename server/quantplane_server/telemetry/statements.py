"""Spans of statements and commands, within calls that are recorded.

Of SQL they have a summary: the operation and its first table. Arguments are nobody's
business. Whoever opens connections takes these classes in, and only where something is
traced.
"""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from time import time_ns
from typing import Any, NamedTuple

import redis.asyncio as redis
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from redis.asyncio.client import Pipeline

from quantplane_server.telemetry import tracing

WRITES = re.compile(r"\b(INSERT INTO|UPDATE|DELETE FROM|MERGE INTO)\s+([a-z_]\w*)")
READS = re.compile(r"\bSELECT\b.*?\bFROM\s+([a-z_]\w*+)(?!\s*\()", re.DOTALL)
OTHER = re.compile(r"\s*(\w+)")
VERSION = re.compile(r"_[0-9a-f]{8}(?=_)")  # in the names of the bus's functions


NOTHING = nullcontext()
WAIT_S = 0.001  # for a connection, that has a span


class Part:
    """The span of one exchange with a backend."""

    def __init__(
        self, tracer: Tracer, name: str, attributes: Mapping[str, str | int]
    ) -> None:
        """Attributes that are empty don't count."""
        told = {key: value for key, value in attributes.items() if value}
        self._span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=told)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error:
            self._span.set_attribute("error.type", type(error).__name__)
            if state := getattr(error, "sqlstate", None):
                self._span.set_attribute("db.response.status_code", state)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


# --- PostgreSQL ---------------------------------------------------------------------


def waited(seconds: float) -> None:
    """Tell how long a call has just waited for a connection, if that is long."""
    if seconds > WAIT_S and tracing.tracer and tracing.current():
        now = time_ns()
        since_ns = now - int(seconds * 1e9)
        span = tracing.tracer.start_span("wait for a connection", start_time=since_ns)
        span.end(now)


class Summary(NamedTuple):
    """What a statement does, in few words."""

    operation: str
    table: str

    def __str__(self) -> str:
        return f"{self.operation} {self.table}".rstrip()


@lru_cache(maxsize=1_000)
def summary(query: str) -> Summary:
    """Return what a statement writes first, else reads, else its first word."""
    if written := WRITES.search(query):
        return Summary(written[1].split()[0], written[2])
    if read := READS.search(query):
        return Summary("SELECT", read[1])
    word = OTHER.match(query)
    return Summary(word[1].upper() if word else "", "")


class Statements:
    """What a class of asyncpg's connections gets beside asyncpg's own."""

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        with _statement(self, query):
            return await super().execute(query, *args, **options)  # type: ignore[misc]

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        with _statement(self, query):
            return await super().fetch(query, *args, **options)  # type: ignore[misc]

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        with _statement(self, query):
            return await super().fetchrow(query, *args, **options)  # type: ignore[misc]

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        with _statement(self, query):
            return await super().fetchval(query, *args, **options)  # type: ignore[misc]

    async def copy_to_table(self, table: str, **options: Any) -> Any:
        with _statement(self, f"COPY {table}", Summary("COPY", table)):
            return await super().copy_to_table(table, **options)  # type: ignore[misc]

    async def copy_from_query(self, query: str, *args: Any, **options: Any) -> Any:
        with _statement(self, query, Summary("COPY", summary(query).table)):
            return await super().copy_from_query(query, *args, **options)  # type: ignore[misc]

    def cursor(self, query: str, *args: Any, **options: Any) -> Any:
        cursor = super().cursor(query, *args, **options)  # type: ignore[misc]
        return Cursor(self, query, cursor) if tracing.current() else cursor


class Cursor:
    """A cursor whose span reaches from its first row to its last."""

    def __init__(self, connection: Any, query: str, cursor: Any) -> None:
        self._connection = connection
        self._query = query
        self._cursor = cursor

    def __await__(self) -> Any:
        return self._cursor.__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        with _statement(self._connection, self._query):
            async for row in self._cursor:
                yield row


def _statement(
    connection: Any, query: str, done: Summary | None = None
) -> AbstractContextManager[None]:
    if not (tracing.tracer and tracing.current()):
        return NOTHING
    done = done or summary(query)
    told = {
        "db.system.name": "postgresql",
        "db.namespace": str(connection._params.database or ""),
        "db.operation.name": done.operation,
        "db.collection.name": done.table,
        "db.query.summary": str(done),
    }
    return Part(tracing.tracer, str(done), told)


# --- Redis --------------------------------------------------------------------------


class Commands(redis.Redis):
    """A client of Redis or Valkey."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _command(args):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(
        self, transaction: bool = True, shard_hint: str | None = None
    ) -> "Pipelined":
        made = (self.connection_pool, self.response_callbacks, transaction, shard_hint)
        return Pipelined(*made)


class Pipelined(Pipeline):
    """Commands that are sent together."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        first, count = self.command_stack[:1], len(self.command_stack)
        with _command(first[0][0] if first else (), count):
            return await super().execute(raise_on_error)


def _command(args: Any, count: int = 0) -> AbstractContextManager[None]:
    """Return the span of a command, or of so many in a pipeline, by its first."""
    if not (tracing.tracer and tracing.current()):
        return NOTHING
    name = str(args[0]) if args else ""
    function = str(args[1]) if name == "FCALL" else ""
    told: dict[str, str | int] = {
        "db.system.name": "redis",
        "db.operation.name": f"PIPELINE {name}" if count else name,
        "db.stored_procedure.name": function,
        "db.operation.batch.size": count if count > 1 else 0,
    }
    return Part(tracing.tracer, f"{name} {VERSION.sub('', function)}".rstrip(), told)
