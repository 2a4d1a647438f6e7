"""What a client shows with its calls, so that the server knows who calls.

It is metadata, "authorization: Bearer TOKEN". The token is an API key, or the access
token of a login. Call credentials of gRPC would need TLS, and an interceptor would
make every call slower; here the methods of the channel are wrapped.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import grpc
from grpc.aio import Metadata

from quantplane import state, tracing
from quantplane.endings import heard
from quantplane.tls import Tls, from_environment, is_loopback, port_of

Token: TypeAlias = str | Callable[[], str]
Renew: TypeAlias = Callable[[], Awaitable[None]]

HEADER = "authorization"
VARIABLE = "QUANTPLANE_API_KEY"
GOOD = re.compile(r"[A-Za-z0-9._~+/=-]{1,4096}")
TRUE = {"1", "true", "t", "yes", "y", "on"}

# How long a server that has just started may take to leave its key.
LEAVING_S, LOOK_S = 2.0, 0.05


class CredentialProblem(ValueError):
    """A credential that can't be shown. The text says why, and not what it is."""


class Credentials:
    """What the calls of one client show: the token of now, or nothing."""

    def __init__(self) -> None:
        self._give: Callable[[], str] | None = None
        self._renew: Renew | None = None
        self._token = ""
        self._metadata: Metadata | None = None

    def use(self, token: Token, renew: Renew | None = None) -> None:
        """Show `token` from the next call on.

        `renew` may see to it that a callable gives another one. Raises
        CredentialProblem.
        """
        self._give = token if callable(token) else lambda: token
        self._renew = renew
        if isinstance(token, str | LocalKey):
            self.metadata()

    @property
    def shows(self) -> bool:
        """Whether there is anything to show, now or later."""
        return self._give is not None

    def token(self) -> str:
        """Return the token of now; "" for none."""
        return self._give().strip() if self._give else ""

    def metadata(self) -> Metadata | None:
        """Return what a call carries. Raises CredentialProblem."""
        token = self.token()
        if token != self._token:
            if token and not GOOD.fullmatch(token):
                raise CredentialProblem(
                    "what should be an API key or an access token has characters "
                    "that none has"
                )
            bearer = Metadata((HEADER, f"Bearer {token}"))
            self._token, self._metadata = token, bearer if token else None
        return self._metadata

    async def renewed(self, shown: str) -> bool:
        """Say whether there is another token than `shown`, or is one now."""
        if self._renew and self.token() == shown:
            await self._renew()
        return self.token() != shown


class KnownChannel:
    """A channel whose calls show credentials."""

    def __init__(self, channel: grpc.aio.Channel, credentials: Credentials) -> None:
        self._channel = channel
        self._credentials = credentials

    def unary_unary(self, path: str, *arguments: Any, **options: Any) -> UnaryMethod:
        method = self._channel.unary_unary(path, *arguments, **options)
        return UnaryMethod(path, method, self._credentials)

    def unary_stream(self, *arguments: Any, **options: Any) -> StreamMethod:
        method = self._channel.unary_stream(*arguments, **options)
        return StreamMethod(method, self._credentials)

    def stream_unary(self, *arguments: Any, **options: Any) -> WrittenMethod:
        method = self._channel.stream_unary(*arguments, **options)
        return WrittenMethod(method, self._credentials)

    def stream_stream(self, *arguments: Any, **options: Any) -> WrittenMethod:
        method = self._channel.stream_stream(*arguments, **options)
        return WrittenMethod(method, self._credentials)


class KnownMethod:
    """A method whose calls show credentials, beside the caller's own metadata."""

    def __init__(self, method: Any, credentials: Credentials) -> None:
        self._method = method
        self.credentials = credentials

    def __call__(self, *request: Any, metadata: Any = None, **options: Any) -> Any:
        shown = self.credentials.metadata()
        if metadata:
            own = list(metadata)
            if shown is None or HEADER in dict(own):
                shown = metadata
            else:
                shown = Metadata(*shown, *own)
        return self._method(*request, metadata=shown, **options)


class StreamMethod(KnownMethod):
    """As KnownMethod, of several requests or responses."""

    def __call__(self, *request: Any, metadata: Any = None, **options: Any) -> Any:
        metadata = tracing.with_current(metadata)
        return super().__call__(*request, metadata=metadata, **options)


class WrittenMethod(StreamMethod):
    """As StreamMethod, of several requests."""

    def __call__(self, *request: Any, metadata: Any = None, **options: Any) -> Any:
        return heard(super().__call__(*request, metadata=metadata, **options))


class UnaryMethod(KnownMethod, grpc.aio.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    """As KnownMethod, of one request and one response."""

    def __init__(self, path: str, method: Any, credentials: Credentials) -> None:
        super().__init__(method, credentials)
        self._name = path.removeprefix("/")

    def __call__(self, *request: Any, metadata: Any = None, **options: Any) -> Any:
        trace = tracing.UnaryTrace.begin(self._name, metadata)
        if trace is None:
            return super().__call__(*request, metadata=metadata, **options)
        try:
            metadata = trace.metadata(metadata)
            call = super().__call__(*request, metadata=metadata, **options)
        except BaseException as error:
            trace.fail(error)
            raise
        trace.end_with(call)
        return call


def shown_by(method: Any) -> str:
    """Return what a call of `method` shows now; "" for nothing."""
    known: Credentials | None = getattr(method, "credentials", None)
    return known.token() if known else ""


async def is_renewed(method: Any, shown: str, error: grpc.RpcError) -> bool:
    """Say whether a call that showed `shown` and ended so may be let in now."""
    known: Credentials | None = getattr(method, "credentials", None)
    if known is None or error.code() is not grpc.StatusCode.UNAUTHENTICATED:
        return False
    return await known.renewed(shown)


def given(credentials: Credentials, token: Token | None, target: str) -> None:
    """Have credentials show `token`, or QUANTPLANE_API_KEY, or this machine's key.

    Raises CredentialProblem, StateProblem.
    """
    if found := token or os.environ.get(VARIABLE):
        credentials.use(found)
    elif name := local_name(target):
        key = LocalKey(name)
        credentials.use(key, key.renew)


class LocalKey:
    """The key that `quantplane-server up` leaves for its user's programs.

    Another `up` leaves another one, so the file is looked at before every call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._path = state.folder() / name
        self._seen: tuple[int, int] | None = None
        self._key = ""

    def __call__(self) -> str:
        """Return the key; the last one, where there is none now; "" before any."""
        with suppress(OSError):
            found = os.stat(self._path)
            seen = found.st_ino, found.st_mtime_ns
            if seen != self._seen:
                self._key = (state.read(self._name) or self._key).strip()
                self._seen = seen
        return self._key

    async def renew(self) -> None:
        """Wait a little for another one: a server serves before it leaves its key."""
        before = self()
        for _ in range(round(LEAVING_S / LOOK_S)):
            if self() != before:
                break
            await asyncio.sleep(LOOK_S)


def local_name(target: str) -> str | None:
    """Return the name of the file with the key of this machine's server at `target`.

    None: no key of this machine's is for it.
    """
    port = port_of(target)
    here = port and is_loopback(target) and state.usable()
    return f"up-{port}.key" if here else None


@contextmanager
def left_key(address: str, key: str) -> Iterator[bool]:
    """Leave the key of a server for its user's programs while the block runs.

    Only on loopback, and where there is a home: yields whether it did. Another
    server's may be there by the end: it stays. Raises StateProblem.
    """
    name = local_name(address)
    if name:
        state.write(name, f"{key}\n")
    try:
        yield name is not None
    finally:
        if name and (state.read(name) or "").strip() == key:
            state.remove(name)


def check_private(target: str, tls: Tls | None) -> None:
    """Raise CredentialProblem where a credential could be read on its way."""
    if tls or from_environment() or is_loopback(target):
        return
    if os.environ.get("QUANTPLANE_INSECURE", "").lower() in TRUE:
        return
    raise CredentialProblem(
        f"{target} is beyond loopback, where a credential in plaintext can be read: "
        "set QUANTPLANE_TLS_CA, or QUANTPLANE_INSECURE=true where the network is closed"
    )
