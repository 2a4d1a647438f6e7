"""Who may call what: one layer around every call, by what the contract says of it.

    credential → principal → limits → permission → strategy → the handler

The picture of users, keys and permissions is in memory, so a call costs some look-ups.
Streams are judged again whenever the picture changes: those that may no longer go on
end with the reason.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Protocol

import grpc

from quantplane import v1 as pb
from quantplane_server.errors import (
    PermissionDenied,
    QuantplaneError,
    RateLimited,
    Unauthenticated,
)
from quantplane_server.principal import PRINCIPAL, Principal
from quantplane_server.rpc.caller import Caller, address, caller
from quantplane_server.rpc.interceptor import Call, Context, Receive
from quantplane_server.rpc.limits import Buckets, Limits
from quantplane_server.rpc.rules import CLOSED, Rule, bound_elsewhere, confine
from quantplane_server.telemetry.metrics import CALLS_REFUSED

logger = logging.getLogger(__name__)

HEADER, SCHEME = "authorization", "bearer "
WRONG_PER_S = 1  # credentials of an address, on average
WRONG_AT_ONCE = 20
LOOK_S = 1.0  # for the picture to be made current
AGAIN_S = 0.2  # between two tries to end a stream
OF_STRANGERS = 1_000  # calls of an address that nobody need be known for, at a time
REFUSALS = (Unauthenticated, PermissionDenied, RateLimited)
CLOSED_TO_BOUND = (pb.STRATEGY_SCOPE_UNSPECIFIED, pb.STRATEGY_SCOPE_ALL)


class Directory(Protocol):
    """Users, keys and permissions, as they were a moment ago."""

    changed: list[Callable[[], None]]

    def find(self, token: str) -> Principal | None:
        """Return whom a token stands for; None for whatever is wrong with it."""

    def named(self, username: str) -> Principal | None:
        """Return an active user."""

    def current(self, known: Principal) -> Principal | None:
        """Return what somebody known before is now; None: no longer known."""

    def permits(self, role: str, resource: str, action: str) -> bool: ...

    async def refresh(self) -> None:
        """Make the picture current."""


class Stream:
    """A call that may be ended before its end."""

    def __init__(self, known: Principal, rule: Rule) -> None:
        self.known = known
        self.rule = rule
        self.refusal: QuantplaneError | None = None
        self._task = asyncio.current_task()

    def end(self, refusal: QuantplaneError) -> None:
        self.refusal = refusal
        assert self._task
        self._task.cancel()

    def settle(self) -> None:
        """Take back the cancellation, for the refusal is still to be sent."""
        assert self._task
        while self._task.uncancel():
            pass


class Guard:
    """Lets calls through to their handlers, or refuses them."""

    def __init__(
        self,
        directory: Directory,
        rules: Mapping[str, Rule],
        limits: Limits,
        by_certificate: bool,
        note: Callable[[Caller, str, QuantplaneError], None],
    ) -> None:
        """With `by_certificate`, clients' certificates are verified.

        Who sends no credential is then the user that the certificate's common name
        names. `note` hears of every caller and method that was refused.
        """
        self._directory = directory
        self._rules = rules
        self._limits = limits
        self._by_certificate = by_certificate
        self._note = note
        self._strangers = Limits(OF_STRANGERS, OF_STRANGERS)
        self._wrong = Buckets(WRONG_PER_S, WRONG_AT_ONCE)
        self._streams: set[Stream] = set()
        directory.changed.append(self.judge)

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[Receive | None]:
        """Check a call; yield what its requests must pass, if anything."""
        PRINCIPAL.set(None)  # nothing of whoever began this server
        rule = self._rules.get(call.method, CLOSED)
        try:
            if rule.open_to_all:
                with self._strangers.held(address(call.context) or ""):
                    yield None
                return
            known = await self._known(call.context)
            PRINCIPAL.set(known)
            with self._limits.held(known.key_id or known.user_id):
                if refusal := self._refusal(known, rule):
                    raise refusal
                with self._judged(known, rule):
                    yield _receive(known, rule)
        except REFUSALS as refusal:  # by a service too
            CALLS_REFUSED.add(1, refusal.reason_name)
            if not (rule.open_to_all or isinstance(refusal, RateLimited)):
                self._note(caller(call.context), call.method, refusal)
            raise

    def knows(self, details: grpc.HandlerCallDetails) -> bool:
        """Tell whether a call shows a good credential; certificates are not seen."""
        rule = self._rules.get(details.method, CLOSED)
        if rule.open_to_all:
            return False
        token = _token(details.invocation_metadata or ())
        return token is not None and self._directory.find(token) is not None

    @contextmanager
    def _judged(self, known: Principal, rule: Rule) -> Iterator[None]:
        """Have a stream end once it would be refused.

        A call that is no stream ends by itself, and its caller learns what it did.
        """
        if not rule.is_stream:
            yield
            return
        stream = Stream(known, rule)
        self._streams.add(stream)
        try:
            yield
        except BaseException:
            if stream.refusal is None:
                raise
            stream.settle()
            raise stream.refusal from None
        finally:
            self._streams.remove(stream)

    def judge(self) -> None:
        """End the streams that would be refused if they began now."""
        for stream in self._streams:
            if not stream.refusal and (
                refusal := self._refusal(stream.known, stream.rule)
            ):
                logger.info("a stream of %r ends: %s", stream.known.username, refusal)
                self._end(stream, refusal)

    def _end(self, stream: Stream, refusal: QuantplaneError) -> None:
        """End a stream for certain: a library may take a cancellation for its own."""
        if stream in self._streams:
            stream.end(refusal)
            again = partial(self._end, stream, refusal)
            asyncio.get_running_loop().call_later(AGAIN_S, again)

    async def _known(self, context: Context) -> Principal:
        """Return who makes a call. Raises Unauthenticated, RateLimited."""
        metadata = context.invocation_metadata() or ()
        if self._by_certificate and not any(key == HEADER for key, _ in metadata):
            known = self._directory.named(_common_name(context))
        else:
            known = await self._find(_token(metadata), context)
        if known is None:
            raise Unauthenticated
        return known

    async def _find(self, token: str | None, context: Context) -> Principal | None:
        if token is None:
            return None
        if known := self._directory.find(token):
            return known
        # It may be newer than the picture; who is often wrong does not have us look.
        sender = address(context) or ""
        if wait_s := self._wrong.wait_s(sender):
            raise _too_often(wait_s)
        try:
            async with asyncio.timeout(LOOK_S):
                await self._directory.refresh()
        except TimeoutError:
            return None
        if known := self._directory.find(token):
            return known
        if wait_s := self._wrong.take(sender):  # others came at the same time
            raise _too_often(wait_s)
        return None

    def _refusal(self, known: Principal, rule: Rule) -> QuantplaneError | None:
        """Return why somebody may not make a call, if so."""
        current = self._directory.current(known)
        if current is None:
            return Unauthenticated()
        if not rule.open_to_known and not (
            rule.permission and self._directory.permits(current.role, *rule.permission)
        ):
            resource, action = rule.permission or ("", "")
            return PermissionDenied(
                f"the role {current.role!r} does not permit {resource}.{action}",
                resource=resource,
                action=action,
            )
        if current.strategy_id != known.strategy_id or (
            known.strategy_id and rule.scope in CLOSED_TO_BOUND
        ):
            return bound_elsewhere(current.strategy_id or known.strategy_id)
        return None


def _token(metadata: Iterable[tuple[str, Any]]) -> str | None:
    """Return the only token that a call shows, if it is one."""
    sent = [value for key, value in metadata if key == HEADER]
    if len(sent) != 1 or sent[0][: len(SCHEME)].lower() != SCHEME:
        return None
    return str(sent[0][len(SCHEME) :])


def _too_often(wait_s: float) -> RateLimited:
    return RateLimited(WRONG_AT_ONCE, "wrong credentials", wait_s)


def _receive(known: Principal, rule: Rule) -> Receive | None:
    if known.strategy_id and rule.scope == pb.STRATEGY_SCOPE_REQUEST:
        return partial(confine, strategy_id=known.strategy_id)
    return None


def _common_name(context: Context) -> str:
    """Return the common name of the client's certificate, if there is just one."""
    names = context.auth_context().get("x509_common_name", ())
    try:
        (name,) = names
        return bytes(name).decode()
    except ValueError:
        return ""
