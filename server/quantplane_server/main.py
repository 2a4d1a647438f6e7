"""The composition root: what a server consists of, and how it starts and stops."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

import grpc
from google.protobuf.descriptor_pool import Default as default_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2_grpc import (
    add_ServerReflectionServicer_to_server,
)

from quantplane import v1 as rpc
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.admin.backlog import Backlog
from quantplane_server.admin.maintenance import (
    Maintenance,
    Task,
    kept_since,
    own_tasks,
)
from quantplane_server.admin.service import AdminService
from quantplane_server.admin.status import Process
from quantplane_server.audit.service import AuditService
from quantplane_server.audit.transcriber import Transcriber
from quantplane_server.bus import SHARDS, Bus
from quantplane_server.config import Settings
from quantplane_server.constraints import refusal
from quantplane_server.db import Database
from quantplane_server.errors import BackendUnavailable, QuantplaneError
from quantplane_server.fanout import Fanout
from quantplane_server.identity.auth import AuthService
from quantplane_server.identity.directory import TOPIC, Directory
from quantplane_server.identity.logins import Logins
from quantplane_server.identity.passwords import Passwords
from quantplane_server.identity.queries import usernames
from quantplane_server.identity.refusals import Refusals
from quantplane_server.identity.sessions import Sessions
from quantplane_server.identity.upkeep import Upkeep
from quantplane_server.identity.users import UserService
from quantplane_server.log import Logs, trim_logs
from quantplane_server.market_data.daily import aggregate_days
from quantplane_server.market_data.latest import LatestQuotes
from quantplane_server.market_data.queries import pending_day_count
from quantplane_server.market_data.recorder import Recorder
from quantplane_server.market_data.service import MarketDataService
from quantplane_server.migrate import check_current
from quantplane_server.models.service import ModelService
from quantplane_server.options.service import OptionsService
from quantplane_server.orders import expiry as orders
from quantplane_server.orders.audit import order_drifts
from quantplane_server.orders.broker import BrokerService
from quantplane_server.orders.service import OrderService
from quantplane_server.orders.writer import Writer
from quantplane_server.portfolio.service import PortfolioService
from quantplane_server.portfolio.snapshots import Snapshots
from quantplane_server.readings import Subscribers, of_recorder, of_server
from quantplane_server.reference.configurations import ConfigurationService
from quantplane_server.reference.strategies import StrategyService
from quantplane_server.rpc.auth import Guard
from quantplane_server.rpc.errors import errors_to_status
from quantplane_server.rpc.health import CHECK_S, Check, Health
from quantplane_server.rpc.interceptor import Interceptor
from quantplane_server.rpc.limits import Limits
from quantplane_server.rpc.observe import Observer
from quantplane_server.rpc.reflection import Reflection
from quantplane_server.rpc.rules import OPEN_SERVICES, rules_of
from quantplane_server.rpc.tls import Certificates
from quantplane_server.signals import expiry as signals
from quantplane_server.signals.service import SignalService
from quantplane_server.streams import Streams
from quantplane_server.tasks import closed, end
from quantplane_server.telemetry import metrics
from quantplane_server.tokens import Tokens
from quantplane_server.waiting import awaited, place
from quantplane_server.watch import Watches

logger = logging.getLogger(__name__)

# What each service can't do without. Publishing and streaming quotes go on without
# the database, since the bus buffers; without the bus, changes are only told late.
NEEDS = {
    "MarketDataService": ["bus"],
    "OptionsService": ["db"],
    "ModelService": ["db"],
    "SignalService": ["db"],
    "OrderService": ["db"],
    "BrokerService": ["db"],
    "PortfolioService": ["db", "bus"],
    "StrategyService": ["reference"],
    "ConfigurationService": ["reference"],
    "AuditService": ["reference"],
    "AuthService": ["reference"],
    "UserService": ["reference"],
    "AdminService": ["db"],
}
PACKAGE = rpc.Quote.DESCRIPTOR.file.package
LOGS = {"orders": rpc.OrderEvent, "signals": rpc.SignalEvent}
STOP_S = 2.0  # beyond the grace, for what does not end by itself
RECORD_S = 2.0  # at most, for what is on the bus when a recorder stops
TELL_S = 2.0  # between two lines that say what a stopping server waits for

REFLECTIONS = 1_000  # streams of who asks which services there are
CALLS = 10_000  # at a time, beside the streams; begun ones count too

OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    # One number for both, so that it does not depend on chance what is refused.
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_allowed_incoming_connections", 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Beyond the 30 minutes after which an idle client leaves by itself.
    ("grpc.max_connection_idle_ms", 3_600_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # the one that counts, 60 s by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def _without_metadata(record: logging.LogRecord) -> bool:
    """Keep what gRPC says, but for metadata that is no UTF-8: a key may be in it."""
    return not str(record.msg).startswith("Invalid encoding on")


logging.getLogger("grpc._cython.cygrpc").addFilter(_without_metadata)


@asynccontextmanager
async def serving(settings: Settings, share_port: bool = False) -> AsyncIterator[str]:
    """Serve while the block runs; yield the address. Drains at the end.

    With `share_port`, other processes may serve on the same port; they are children of
    one that says what they wait for. Raises Refused.
    """
    async with AsyncExitStack() as stack:
        db, reference, bus = await _backends(settings, stack, quiet=share_port)
        async with db.connection() as conn:
            tokens = await Tokens.load(conn)
        fanout = Fanout(bus)
        stack.callback(fanout.close)
        watches = Watches(bus)
        directory = await _directory(settings, watches, stack)
        logs = Logs(db, bus, LOGS)
        streams = Streams(settings.max_streams)
        backlog = Backlog(bus)
        health = _health(db, reference, bus, backlog)
        subscribers = Subscribers(streams)
        process = Process(streams, health, backlog, {"reference": reference, "db": db})
        quotes = LatestQuotes(bus, db)
        writer = Writer(db, reference, logs, watches, quotes)
        stack.push_async_callback(closed, writer.close, "writing orders")
        market_data = MarketDataService(bus, fanout, db, tokens, streams)
        strategies = StrategyService(reference, watches, tokens, streams)
        stack.push_async_callback(closed, strategies.close, "reading strategies")
        passwords = Passwords()
        stack.callback(passwords.close)
        logins = Logins(reference, passwords)

        async def changed() -> None:
            await watches.announce([TOPIC])
            await directory.refresh()

        sessions = Sessions(reference, tokens, changed)
        refusals = Refusals(reference)
        servicers = {
            "AuthService": AuthService(reference, logins, sessions),
            "UserService": UserService(reference, tokens, passwords, logins, changed),
            "MarketDataService": market_data,
            "OptionsService": OptionsService(db, watches, tokens, streams),
            "ModelService": ModelService(db, watches, tokens, streams),
            "SignalService": SignalService(db, logs, tokens, streams),
            "OrderService": OrderService(db, writer, logs, tokens, streams),
            "BrokerService": BrokerService(db, writer, logs, tokens, streams),
            "PortfolioService": PortfolioService(
                db, reference, quotes, watches, tokens, streams, order_drifts
            ),
            "AuditService": AuditService(reference, tokens, usernames),
            "StrategyService": strategies,
            "ConfigurationService": ConfigurationService(reference, tokens),
            "AdminService": AdminService(
                db, reference, bus, _tasks(), pending_day_count, process, tokens
            ),
        }

        names = [f"{PACKAGE}.{name}" for name in servicers]
        names += OPEN_SERVICES
        server = grpc.aio.server(
            interceptors=[_interceptor(settings, directory, refusals, names)],
            options=[*OPTIONS, ("grpc.so_reuseport", int(share_port))],
            maximum_concurrent_rpcs=settings.max_streams + CALLS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        for name, servicer in servicers.items():
            getattr(rpc, f"add_{name}Servicer_to_server")(servicer, server)
        askers = Streams(REFLECTIONS)
        reflected = Reflection(names, askers)
        add_ServerReflectionServicer_to_server(reflected, server)

        work = (market_data.run(), watches.run(), logs.run(), writer.run())
        identity = (directory.run(), refusals.run(), Upkeep(reference, changed).run())
        looking = (health.run(), subscribers.run())
        await stack.enter_async_context(_background(*work, *identity, *looking))
        address = _bind(server, settings)
        looks = of_server(process, bus, logs, subscribers)
        endpoint = settings.metrics_address()
        # Around the end too: who looks then sees what is drained.
        await stack.enter_async_context(
            metrics.exposed(endpoint, "quantplane-server", looks)
        )
        await server.start()
        try:
            yield address
        finally:
            health.drain()
            for each in (streams, askers):
                each.drain()
            await _drained(server, settings.grace_s)


async def _drained(server: grpc.aio.Server, grace_s: float) -> None:
    """Return once all calls have ended, those that outlast the grace by force."""
    began_s = monotonic()
    left_s = grace_s
    stopping = asyncio.create_task(server.stop(grace_s))
    while not stopping.done() and left_s > 0:
        waits_for = _count(metrics.STREAMS, "stream"), _count(metrics.CALLS, "call")
        logger.info("draining: %s, %s", *waits_for)
        await asyncio.wait([stopping], timeout=min(TELL_S, left_s))
        left_s = began_s + grace_s - monotonic()
    await asyncio.wait([stopping], timeout=STOP_S)
    if left_s > 0:
        logger.info("drained in %.1f s", monotonic() - began_s)
    else:
        logger.warning("not drained in %g s, so ended: %s, %s", grace_s, *waits_for)


def _count(level: metrics.Level, noun: str) -> str:
    count = int(level.total())
    return f"{count} {noun}" + "s" * (count != 1)


def _health(db: Database, reference: Database, bus: Bus, backlog: Backlog) -> Health:
    checks: dict[str, Check] = {
        "bus": bus.ping,
        "db": partial(_check_database, db, "timeseries"),
        "reference": partial(_check_database, reference, "reference"),
    }
    needs = {f"{PACKAGE}.{name}": needs for name, needs in NEEDS.items()}
    needs[""] = list(checks)
    # Of another process, and nothing here waits for it: so it is no part of "".
    needs["recorder"] = ["recorder"]
    return Health(checks | {"recorder": backlog.check}, needs)


async def _check_database(db: Database, part: str) -> None:
    """Raise unless a connection is free and the schema is what it should be."""
    try:
        async with asyncio.timeout(0.9 * CHECK_S):  # before Health gives it up
            await check_current(db, part)
    except TimeoutError:
        pool = db.pool()
        if pool.in_use < pool.max_size:
            raise
        raise RuntimeError(f"all {pool.in_use} connections are in use") from None


@asynccontextmanager
async def recording(settings: Settings, quiet: bool = False) -> AsyncIterator[None]:
    """Record, and maintain the database, while the block runs.

    Waits for the backends, and says so unless `quiet`. Raises Refused.
    """
    async with AsyncExitStack() as stack:
        db, reference, bus = await _backends(settings, stack, quiet)
        recorder = Recorder(bus, db, (settings.window_mb << 20) // SHARDS)
        maintenance = Maintenance(db, _tasks(), settings.maintenance_s)
        logs, watches = Logs(db, bus, LOGS), Watches(bus)
        quotes = LatestQuotes(bus, db)
        writer = Writer(db, reference, logs, watches, quotes)
        stack.push_async_callback(closed, writer.close, "writing orders")
        expiry = (
            signals.Expiry(db, logs).run(),
            orders.Expiry(db, reference, writer).run(),
        )
        snapshots = Snapshots(db, reference, quotes)
        stack.push_async_callback(snapshots.close)
        audit = [Transcriber(db, reference, usernames, log).run() for log in LOGS]
        work = (recorder.run(), maintenance.run(), logs.run(), snapshots.run())
        await stack.enter_async_context(_background(*work, *expiry, *audit))
        stack.push_async_callback(closed, recorder.flush, "recording", RECORD_S)
        looks = of_recorder(db, reference, LOGS)
        address = settings.metrics_address()
        async with metrics.exposed(address, "quantplane-recorder", looks):
            yield


def _tasks() -> list[Task]:
    """What is done for the database now and then, in this order."""
    aggregate = "aggregate the days whose rows have changed"
    trim = "remove what the logs kept longer than retention_policies says"
    return [
        Task("daily bars", aggregate, _aggregate_days),
        *own_tasks(),
        Task("event log", trim, _trim_logs),
    ]


async def _aggregate_days(db: Database) -> str:
    return await aggregate_days(db, await kept_since(db, "market_data"))


async def _trim_logs(db: Database) -> str:
    return await trim_logs(db, await kept_since(db, "event_log"))


async def available(settings: Settings) -> None:
    """Return once the backends are up. Raises Refused."""
    async with AsyncExitStack() as stack:
        await _backends(settings, stack)


async def _backends(
    settings: Settings, stack: AsyncExitStack, quiet: bool = False
) -> tuple[Database, Database, Bus]:
    """Return the time series, the reference data (maybe the same), and the bus."""
    postgres_dsn, redis_url = settings.backends()
    db = reference = await _database(settings, postgres_dsn, stack, quiet, "db")
    if settings.reference_dsn:
        dsn = settings.reference_dsn
        reference = await _database(settings, dsn, stack, quiet, "reference")
    await check_current(db, "timeseries")
    await check_current(reference, "reference")
    bus = Bus(redis_url, (settings.cap_mb << 20) // SHARDS)
    stack.push_async_callback(closed, bus.close, "the bus")
    await awaited(f"Valkey at {place(redis_url)}", bus.open, quiet=quiet)
    return db, reference, bus


async def _database(
    settings: Settings, dsn: str, stack: AsyncExitStack, quiet: bool, name: str
) -> Database:
    attempt = partial(Database.open, dsn, settings.pool_size, name=name)
    db = await awaited(f"PostgreSQL at {place(dsn)}", attempt, quiet=quiet)
    stack.push_async_callback(closed, db.close, "the connections to PostgreSQL")
    return db


@asynccontextmanager
async def _background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these while the block runs; they retry by themselves and never return."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        await end(*tasks)


def _translate(error: Exception) -> QuantplaneError | None:
    """Return what an exception of a backend means to a caller, if anything."""
    if isinstance(error, (*databases.UNAVAILABLE, *buses.UNAVAILABLE)):
        return BackendUnavailable()
    return refusal(error)


async def _directory(
    settings: Settings, watches: Watches, stack: AsyncExitStack
) -> Directory:
    """Return the picture of users and keys, on a connection of its own.

    Who keeps the pool busy would otherwise put off that it is cut off.
    """
    dsn = settings.reference_dsn or settings.backends()[0]
    db = await Database.open(dsn, pool_size=1, name="directory")
    stack.push_async_callback(closed, db.close, "the directory's connection")
    directory = Directory(db, watches)
    await directory.load()
    return directory


def _interceptor(
    settings: Settings,
    directory: Directory,
    refusals: Refusals,
    names: Iterable[str],
) -> Interceptor:
    """Return what goes around the calls of services."""
    guard = Guard(
        directory,
        rules_of(map(default_pool().FindServiceByName, names)),
        Limits(settings.max_calls, settings.max_calls_per_s),
        by_certificate=bool(settings.tls_client_ca),
        note=refusals.note,
    )
    layer = errors_to_status(_translate)
    observer = Observer(settings.trace_stream_s)
    return Interceptor(layer, guard if settings.auth else None, observer)


def _bind(server: grpc.aio.Server, settings: Settings) -> str:
    listen, files = settings.listen, settings.tls()
    credentials = Certificates(*files).credentials() if files else None
    try:
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise RuntimeError(
            f"can't listen on {listen}: it must be HOST:PORT, and the port free"
        ) from error
    if listen.startswith("unix"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"
