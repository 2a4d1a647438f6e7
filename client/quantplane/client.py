"""The client: one channel, and on it every service of quantplane."""

from __future__ import annotations

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
from quantplane.follow import Follower, Request, Response, StreamMethod
from quantplane.keys import fill_keys
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
    admin: pb.AdminServiceStub

    def __init__(self, target: str | None = None, tls: Tls | None = None) -> None:
        self.target = target or os.environ.get("QUANTPLANE_TARGET") or TARGET
        config = json.dumps(service_config(service for service, _ in services()))
        options = [*OPTIONS, ("grpc.service_config", config)]
        self._channel = open_channel(self.target, options, tls)
        self._streams: WeakSet[Follower[Any] | QuotePublisher] = WeakSet()
        for service, stub in services():
            methods = stub(self._channel)
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
        await self._channel.close()

    def follow(
        self, method: StreamMethod[Request, Response], request: Request
    ) -> Follower[Response]:
        """Return the responses of a stream, which goes on after any interruption.

        `method` is an attribute of a service: `client.market_data.StreamQuotes`.
        """
        follower = Follower(method, request)
        self._streams.add(follower)
        return follower

    def publish_quotes(self, feed: str | None = None) -> QuotePublisher:
        """Return a publisher to enter with `async with`.

        A feed that goes on where it stopped, or may be replaced by another
        process, needs a name; without one it gets a new name each time.
        """
        publisher = QuotePublisher(self._channel, feed)
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
