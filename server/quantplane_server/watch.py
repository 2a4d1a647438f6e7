"""State that lives in the database, and its readers: a snapshot, then what changes.

Who has committed a change announces its topics over the bus. Every process that serves
readers of a topic then reads the state again, once for all of them, and each reader
gets what differs from what it was given before. So a slow reader skips states but never
the latest, and holds no more than the last one it got.

An announcement is a hurry, not the truth: each state is also read again now and then,
and whenever the bus was away. A reader is shown nothing older than its request.
"""

import asyncio
import logging
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.bus import Bus
from quantplane_server.checks import seconds
from quantplane_server.errors import InvalidResumeToken
from quantplane_server.streams import HEARTBEAT_S, goodbye, heartbeat
from quantplane_server.tasks import Outage
from quantplane_server.tokens import Tokens, purpose

logger = logging.getLogger(__name__)

State: TypeAlias = Mapping[Hashable, Message]  # key -> row, in a fixed order
Read: TypeAlias = Callable[[], Awaitable[State]]

REFRESH_S = 10.0  # after the last read, if nothing is announced nor chosen
READ_S = 30.0  # before a read counts as failed
RETRY_S = 0.5
AWAY = (*databases.UNAVAILABLE, *buses.UNAVAILABLE)


class Part(NamedTuple):
    """One of the states that a stream consists of."""

    key: Hashable  # the same for the same state, whoever reads it
    topics: Sequence[str]  # announced when it may have changed
    read: Read
    refresh_s: float | None = None  # read again at the latest after; None: REFRESH_S
    rest_s: float = 0.0  # read again at the earliest after


@dataclass
class Version:
    """A state at one time."""

    state: State
    digest: bytes
    replaced_at: float = math.inf  # by a newer one, by the event loop's clock


class Watched:
    """One state, read by one task for all readers that this process has of it."""

    def __init__(self, part: Part) -> None:
        self.topics = frozenset(part.topics)
        self.bells: list[Callable[[], None]] = []  # of its readers
        self.version = Version({}, b"")  # as last read
        self.error: Exception | None = None  # of the last try to read
        self._part = part
        self._stale = asyncio.Event()
        self._next_read = asyncio.Event()  # set when a read that has yet to begin ends
        self._task = asyncio.create_task(self._keep_current())

    def refresh(self) -> asyncio.Event:
        """Have the state read; return what is set once it was, or failed to be."""
        self._stale.set()
        return self._next_read

    def close(self) -> None:
        self._task.cancel()

    async def _keep_current(self) -> None:
        while self.bells:
            self._stale.clear()  # whatever is announced from here on counts
            done, self._next_read = self._next_read, asyncio.Event()
            await self._update()
            done.set()
            for ring in self.bells:
                ring()
            await asyncio.sleep(self._part.rest_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s() - self._part.rest_s):
                    await self._stale.wait()

    def _refresh_s(self) -> float:
        """Return when to read again, after the last read, if nothing is announced."""
        if self.error:
            return RETRY_S
        chosen = self._part.refresh_s
        return REFRESH_S if chosen is None else chosen

    async def _update(self) -> None:
        try:
            async with asyncio.timeout(READ_S):
                state = await self._part.read()
        except Exception as error:
            if not self.error:
                logger.warning("a state can't be read, trying again: %r", error)
            self.error = error
        else:
            self.error = None
            if (digest := _digest(state)) != self.version.digest:
                self.version.replaced_at = asyncio.get_running_loop().time()
                self.version = Version(state, digest)


class Watches:
    """The states that this process has readers of."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._watched: dict[Hashable, Watched] = {}
        self._outage = Outage(logger, "hearing of changes", buses.UNAVAILABLE)

    async def run(self) -> None:
        """Follow the announcements, until cancelled."""
        while True:
            with self._outage:
                async for topics in self._bus.follow_changes():
                    self._outage.over()
                    self._refresh(topics)
            await asyncio.sleep(RETRY_S)

    async def announce(self, topics: Iterable[str]) -> None:
        """Tell every process what has changed; call it once that is committed."""
        topics = set(topics)
        try:
            await self._bus.announce_changes(topics)
        except buses.UNAVAILABLE:
            self._refresh(topics)  # others notice when they read again

    @contextmanager
    def watching(self, part: Part, ring: Callable[[], None]) -> Iterator[Watched]:
        """Share a state with whoever watches the same; `ring` is called once read."""
        watched = self._watched.get(part.key)
        if watched is None:
            watched = self._watched[part.key] = Watched(part)
        watched.bells.append(ring)
        try:
            yield watched
        finally:
            watched.bells.remove(ring)
            if not watched.bells:
                del self._watched[part.key]
                watched.close()

    def _refresh(self, topics: set[str] | None) -> None:
        for watched in self._watched.values():
            if topics is None or not watched.topics.isdisjoint(topics):
                watched.refresh()


class WatchStream:
    """The server's side of a stream of state: one reader.

    A subclass says what its responses look like.
    """

    def __init__(
        self, watches: Watches, tokens: Tokens, request: Any, parts: Sequence[Part]
    ) -> None:
        self._watches = watches
        self._tokens = tokens
        self._parts = parts
        self._resume_token: bytes = request.resume_token
        self._purpose = purpose(request, "resume_token", "heartbeat_interval")
        self._heartbeat_s = seconds(request.heartbeat_interval) or HEARTBEAT_S
        self._watched: Sequence[Watched] = ()
        self._sent: list[Version] = []
        self._wake = asyncio.Event()
        self._draining = False

    def statuses(self, states: Sequence[State]) -> list[pb.KeyStatus]:
        """Return what Subscribed says of each key; `states` are those of the parts."""
        raise NotImplementedError

    def data(self, state: State, changed: State, whole: bool) -> Any:
        """Return the response that tells a part's changes, or all of it if `whole`."""
        raise NotImplementedError

    def event(self, event: pb.StreamEvent) -> Any:
        """Return the response that carries an event."""
        raise NotImplementedError

    def drain(self) -> None:
        """End the stream with a Goodbye."""
        self._draining = True
        self._wake.set()

    def report(self, told: pb.Subscription) -> None:
        """Fill in which states the reader lacks the newest version of."""
        told.keys = len(self._parts)
        told.heartbeat_interval.FromTimedelta(timedelta(seconds=self._heartbeat_s))
        if not self._sent:
            told.state = pb.SUBSCRIPTION_STATE_STARTING
        missing = [
            sent.replaced_at
            for one, sent in zip(self._watched, self._sent, strict=False)
            if one.version.digest != sent.digest
        ]
        told.pending_entries = len(missing)
        now = self._now()
        lag_s = now - min(missing, default=now)
        told.lag.FromTimedelta(timedelta(seconds=lag_s))

    async def messages(self) -> AsyncIterator[Any]:
        """Yield responses until drained."""
        with ExitStack() as stack:
            watched = [
                stack.enter_context(self._watches.watching(part, self._wake.set))
                for part in self._parts
            ]
            self._watched = watched
            async for message in self._snapshot(watched):
                yield message
            beat_at = self._now() + self._heartbeat_s
            while not self._draining:
                self._wake.clear()
                for message in self._changes(watched):
                    yield message
                if self._now() >= beat_at:
                    beat_at = self._now() + self._heartbeat_s
                    yield self._sealed(self.event(heartbeat()))
                with suppress(TimeoutError):
                    async with asyncio.timeout(beat_at - self._now()):
                        await self._wake.wait()
            yield self._sealed(self.event(goodbye()))

    async def _snapshot(self, watched: Sequence[Watched]) -> AsyncIterator[Any]:
        """Yield all there is, or nothing to a reader that has it already."""
        known = self._opened()
        for read in [one.refresh() for one in watched]:
            await read.wait()
        for one in watched:
            if one.error:
                raise one.error
        self._sent = [one.version for one in watched]
        states = [version.state for version in self._sent]
        keys = self.statuses(states)
        yield self.event(pb.StreamEvent(subscribed=pb.Subscribed(keys=keys)))
        if known != self._digest():
            for state in states:
                if state:
                    yield self.data(state, state, whole=True)
        complete = pb.StreamEvent(snapshot_complete=pb.SnapshotComplete())
        yield self._sealed(self.event(complete))

    def _changes(self, watched: Sequence[Watched]) -> Iterator[Any]:
        """Yield what differs from what was sent; nothing while a backend is away."""
        for number, one in enumerate(watched):
            if one.error and not isinstance(one.error, AWAY):
                raise one.error
            if one.version.digest == self._sent[number].digest:
                self._sent[number] = one.version
                continue
            sent, state = self._sent[number].state, one.version.state
            self._sent[number] = one.version
            if sent.keys() <= state.keys():
                changed = {
                    key: row for key, row in state.items() if sent.get(key) != row
                }
                yield self._sealed(self.data(state, changed, whole=False))
            else:  # rows are gone
                yield self._sealed(self.data(state, state, whole=True))

    def _sealed(self, response: Any) -> Any:
        """Return a response with the token that stands for all that was sent."""
        response.resume_token = self._tokens.seal(self._purpose, self._digest())
        return response

    def _opened(self) -> bytes | None:
        """Return the digest of what the reader has, if it comes back."""
        if not self._resume_token:
            return None
        digest = self._tokens.open(self._purpose, self._resume_token)
        if digest is None:
            raise InvalidResumeToken
        return digest

    def _digest(self) -> bytes:
        digests = b"".join(version.digest for version in self._sent)
        return blake2b(digests, digest_size=16).digest()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _digest(state: State) -> bytes:
    digest = blake2b(digest_size=16)
    for key, row in state.items():
        data = row.SerializeToString(deterministic=True)
        digest.update(f"{key!r} {len(data)} ".encode())
        digest.update(data)
    return digest.digest()
