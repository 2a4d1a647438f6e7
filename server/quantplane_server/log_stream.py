"""The server's side of a log stream: what is now, then every event, without loss.

    snapshot or token  →  entries behind the position  →  wait for more
                               ↑                              ↓
                               └──────────────────────────────┘

The position is all that a stream holds: what its reader is sent next comes from what
the process remembers of the log, or, for who is far behind, from the table. So a slow
reader takes no memory, and resuming is the same as being slow.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from time import time_ns
from typing import Any

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server import log as logs
from quantplane_server.checks import seconds
from quantplane_server.db import Connection, Database
from quantplane_server.errors import InvalidResumeToken
from quantplane_server.log import CHECK_BYTES, START, Entry, Logs, Position, Tail
from quantplane_server.origin import Origin
from quantplane_server.streams import HEARTBEAT_S, goodbye, heartbeat
from quantplane_server.telemetry import tracing
from quantplane_server.tokens import Tokens, purpose


class LogStream:
    """One reader of a log.

    A subclass says what the snapshot is, which events are wanted, and what responses
    look like.
    """

    log: str
    response: type[Any]

    def __init__(self, db: Database, logs: Logs, tokens: Tokens, request: Any) -> None:
        self._db = db
        self._logs = logs
        self._tokens = tokens
        self._resume_token: bytes = request.resume_token
        self._purpose = purpose(request, "resume_token", "heartbeat_interval")
        self._heartbeat_s = seconds(request.heartbeat_interval) or HEARTBEAT_S
        self._position = START
        self._tail: Tail | None = None  # once it reads on
        self._wake = asyncio.Event()
        self._draining = False

    async def snapshot(self, conn: Connection) -> Sequence[Message]:
        """Return the responses that tell what is, in the transaction of `conn`."""
        raise NotImplementedError

    def wants(self, event: Any) -> bool:
        """Tell whether the reader wants an event."""
        return True

    def data(self, entries: Sequence[Entry]) -> bytes:
        """Return the serialised response that tells these; b"" if there is none."""
        raise NotImplementedError

    def drain(self) -> None:
        """End the stream with a Goodbye."""
        self._draining = True
        self._wake.set()

    def report(self, told: pb.Subscription) -> None:
        """Fill in how far the stream is behind the end of the log."""
        told.heartbeat_interval.FromTimedelta(timedelta(seconds=self._heartbeat_s))
        if self._tail is None:
            told.state = pb.SUBSCRIPTION_STATE_STARTING
            return
        behind = self._tail.behind(self._position)
        told.pending_entries = behind.entries
        told.lag.FromTimedelta(timedelta(seconds=behind.lag_s))
        if not behind.near:
            told.state = pb.SUBSCRIPTION_STATE_CATCHING_UP

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield serialised responses until drained. Raises Compacted."""
        with self._logs.following(self.log, self._wake.set) as tail:
            async for message in self._begin(tail):
                yield message
            beat_at = self._now() + self._heartbeat_s
            self._tail = tail
            while not self._draining:
                self._wake.clear()
                before = self._position
                wanted = self._taken(await tail.read(before))
                if wanted and (data := self.data(wanted)):
                    since_ns = time_ns()
                    yield data + self._sealed()
                    self._trace(wanted, since_ns)
                if self._now() >= beat_at:
                    beat_at = self._now() + self._heartbeat_s
                    yield self._sealed(event=heartbeat())
                if self._position == before:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(beat_at - self._now()):
                            await self._wake.wait()
            yield self._sealed(event=goodbye())

    async def _begin(self, tail: Tail) -> AsyncIterator[bytes]:
        """Yield all there is, or nothing to a reader that comes back."""
        subscribed = pb.StreamEvent(subscribed=pb.Subscribed())
        if self._resume_token:
            self._position = self._opened()
            await tail.read(self._position)  # can it go on? refuse it here if not
            yield self.response(event=subscribed).SerializeToString()
        else:
            async with self._db.transaction("repeatable_read", readonly=True) as conn:
                self._position = await logs.head(conn, self.log)
                responses = await self.snapshot(conn)
            yield self.response(event=subscribed).SerializeToString()
            for response in responses:
                yield response.SerializeToString()
        complete = pb.StreamEvent(snapshot_complete=pb.SnapshotComplete())
        yield self._sealed(event=complete)

    def _taken(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Move on behind these; return what is wanted of them."""
        if entries:
            self._position = entries[-1].position
        return [entry for entry in entries if self.wants(entry.message)]

    def _trace(self, entries: Sequence[Entry], since_ns: int) -> None:
        """Tell that these were delivered, in the traces of what caused them."""
        if tracing.tracer:
            name = self.response.__name__.removesuffix("Response")
            events = (entry.message for entry in entries)
            came = (
                (Origin(event.trace_id, event.span_id), event.time.ToNanoseconds())
                for event in events
            )
            tracing.delivered(name, came, since_ns)

    def _opened(self) -> Position:
        payload = self._tokens.open(self._purpose, self._resume_token)
        if payload is None:
            raise InvalidResumeToken
        revision, check = payload[:-CHECK_BYTES], payload[-CHECK_BYTES:]
        return Position(int.from_bytes(revision, "big"), check)

    def _sealed(self, **event: Any) -> bytes:
        """Return a response, or the end of one, with the token of the position."""
        revision, check = self._position
        payload = revision.to_bytes(8, "big") + check
        token = self._tokens.seal(self._purpose, payload)
        rest: bytes = self.response(resume_token=token, **event).SerializeToString()
        return rest

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
