"""The client: one channel, and on it every service of quantplane."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default as default_pool

from quantplane import v1 as pb
from quantplane.credentials import (
    Credentials,
    KnownChannel,
    Token,
    check_private,
    given,
)
from quantplane.follow import Follower, Request, Response, StreamMethod
from quantplane.keys import fill_keys
from quantplane.login import Session, log_in
from quantplane.publish import QuotePublisher
from quantplane.tls import Tls, open_channel

TARGET = "127.0.0.1:50051"

OPTIONS = [
    # Otherwise the window grows with the bandwidth, and the server writes far
    # ahead of a slow reader: quotes grow old in between.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that counts, 60 s by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
]

# Of a unary call that chooses none. gRPC counts 1 to 2 s of it as gone already, for
# its clock of calls starts at a whole second before the process.
TIMEOUT = "10s"
RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


class Client:
    """All services of a quantplane server, each an attribute with its methods.

    The target is QUANTPLANE_TARGET, or 127.0.0.1:50051, where none is given. TLS is
    what QUANTPLANE_TLS_CA, _CLIENT_CERT, _CLIENT_KEY and _NAME say where none is
    given; without any, the connection is plaintext. Raises TlsProblem for a file.

    Every call shows the token, an API key or an access token, or what a callable
    returns; where none is given QUANTPLANE_API_KEY, or on loopback the key that
    `quantplane-server up` leaves for its user. Beyond loopback a credential needs
    TLS, or QUANTPLANE_INSECURE=true. Raises CredentialProblem, and StateProblem for
    a key that others could read.

    Unary methods that are safe to repeat are retried while the server is away,
    and end within 10 s unless they are long_running; all others are called once.
    An empty idempotency key is filled before the first try, in a copy of the
    request: whoever repeats a call after its error sets the key.
    """

    market_data: pb.MarketDataServiceStub
    options: pb.OptionsServiceStub
    model: pb.ModelServiceStub
    signal: pb.SignalServiceStub
    order: pb.OrderServiceStub
    broker: pb.BrokerServiceStub
    portfolio: pb.PortfolioServiceStub
    strategy: pb.StrategyServiceStub
    configuration: pb.ConfigurationServiceStub
    audit: pb.AuditServiceStub
    auth: pb.AuthServiceStub
    user: pb.UserServiceStub
    admin: pb.AdminServiceStub

    def __init__(
        self,
        target: str | None = None,
        tls: Tls | None = None,
        token: Token | None = None,
    ) -> None:
        self.target = target or os.environ.get("QUANTPLANE_TARGET") or TARGET
        config = json.dumps(service_config(service for service, _ in services()))
        options = [*OPTIONS, ("grpc.service_config", config)]
        self._tls = tls
        self._credentials = Credentials()
        given(self._credentials, token, self.target)
        if self._credentials.shows:
            check_private(self.target, tls)
        self._channel = open_channel(self.target, options, tls)
        self._known: Any = KnownChannel(self._channel, self._credentials)
        self._streams: WeakSet[Follower[Any] | QuotePublisher] = WeakSet()
        self._session: Session | None = None
        self._renewing: asyncio.Task[None] | None = None
        for service, stub in services():
            methods = stub(self._known)
            fill_keys(methods, service)
            setattr(self, attribute_of(service), methods)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; followed streams end, and publishers at once."""
        for stream in list(self._streams):
            await stream.aclose()
        self._leave()
        await self._channel.close()

    async def login(self, username: str, password: str) -> None:
        """Log in; calls show the session's token from now on, renewed in time.

        The session lives on when the client is closed: see `logout`. Raises
        AioRpcError, and CredentialProblem where others could read the password.
        """
        check_private(self.target, self._tls)
        auth = self.without_credentials()
        self.use(Session(auth, await log_in(auth, username, password)))

    async def logout(self) -> None:
        """End the session of `login`. Raises AioRpcError."""
        if self._session is not None:
            await self._session.end()
            self._leave()

    def use(self, session: Session) -> None:
        """Show the token of `session` from now on, and renew it until the end."""
        check_private(self.target, self._tls)
        self._leave()
        self._session = session
        self._credentials.use(session.token, session.renew)
        self._renewing = asyncio.create_task(session.run())

    def without_credentials(self) -> Any:
        """Return a stub of AuthService whose calls show no credential."""
        return pb.AuthServiceStub(self._channel)

    def _leave(self) -> None:
        self._session = None
        if self._renewing is not None:
            self._renewing.cancel()

    def follow(
        self, method: StreamMethod[Request, Response], request: Request
    ) -> Follower[Response]:
        """Return the responses of a stream, which goes on after any interruption.

        `method` is an attribute of a service: `client.market_data.StreamQuotes`.
        """
        follower = Follower(method, request, self._channel)
        self._streams.add(follower)
        return follower

    def publish_quotes(self, feed: str | None = None) -> QuotePublisher:
        """Return a publisher to enter with `async with`.

        A feed that goes on where it stopped, or may be replaced by another
        process, needs a name; without one it gets a new name each time.
        """
        publisher = QuotePublisher(self._channel, self._known, feed)
        self._streams.add(publisher)
        return publisher


def services() -> list[tuple[ServiceDescriptor, type[Any]]]:
    """Return each service of quantplane.v1 and its generated stub."""
    package = pb.Quote.DESCRIPTOR.file.package
    return [
        (
            default_pool().FindServiceByName(f"{package}.{name.removesuffix('Stub')}"),
            stub,
        )
        for name, stub in vars(pb).items()
        if name.endswith("ServiceStub")
    ]


def attribute_of(service: ServiceDescriptor) -> str:
    """Return "market_data" for MarketDataService."""
    name = service.name.removesuffix("Service")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def service_config(services: Iterable[ServiceDescriptor]) -> dict[str, Any]:
    """Return gRPC's service config, which says what may be retried and how."""
    timed: list[dict[str, str]] = []
    untimed: list[dict[str, str]] = []
    for service in services:
        for method in filter(_unary, service.methods):
            if _repeatable(method):
                long = method.GetOptions().Extensions[pb.long_running]
                name = {"service": service.full_name, "method": method.name}
                (untimed if long else timed).append(name)
    config = {"waitForReady": True, "retryPolicy": RETRY}
    configs = [
        {"name": timed, **config, "timeout": TIMEOUT},
        {"name": untimed, **config},
    ]
    return {"methodConfig": [each for each in configs if each["name"]]}


def _unary(method: MethodDescriptor) -> bool:
    return not (method.client_streaming or method.server_streaming)


def _repeatable(method: MethodDescriptor) -> bool:
    unknown = MethodOptions.IDEMPOTENCY_UNKNOWN
    return bool(method.GetOptions().idempotency_level != unknown)
