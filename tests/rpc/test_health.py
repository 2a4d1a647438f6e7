"""What a server says of its health, asked over the wire, and what makes it say so."""

import asyncio
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import services
from quantplane_server import main
from quantplane_server.admin import backlog
from quantplane_server.config import Settings
from quantplane_server.embedded import Valkey
from quantplane_server.main import recording, serving
from quantplane_server.migrate import head_revision
from quantplane_server.rpc import health
from tests.admin import connected
from tests.conftest import Server
from tests.market_data import quotes

SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"
PATIENCE_S = 30
ROOT = Path(__file__).parents[2]
Statuses = health_pb2.HealthCheckResponse.ServingStatus


def named(name: str) -> str:
    return f"quantplane.v1.{name}"


SERVICES = ["", "recorder", *map(named, main.NEEDS)]


@pytest.fixture(autouse=True)
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers is checked often, and not given up because the machine is busy."""
    monkeypatch.setattr(health, "INTERVAL_S", 0.1)
    monkeypatch.setattr(health, "CHECK_S", PATIENCE_S)
    monkeypatch.setattr(main, "CHECK_S", PATIENCE_S)


class Watcher:
    """What is told of a service, as it is told."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def next(self) -> str:
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert response != grpc.aio.EOF
        return str(Statuses.Name(response.status))

    async def until(self, wanted: str) -> None:
        while await self.next() != wanted:
            pass


class Asker:
    """Asks a server of its health."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = health_pb2_grpc.HealthStub(channel)

    async def __call__(self, service: str = "") -> str:
        request = health_pb2.HealthCheckRequest(service=service)
        response = await self._stub.Check(request, timeout=PATIENCE_S)
        return str(Statuses.Name(response.status))

    async def all(self) -> dict[str, str]:
        return {service: await self(service) for service in SERVICES}

    async def becomes(self, wanted: str, service: str = "") -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self(service) != wanted:
                await asyncio.sleep(0.02)

    def watch(self, service: str = "") -> Watcher:
        request = health_pb2.HealthCheckRequest(service=service)
        return Watcher(self._stub.Watch(request))


@asynccontextmanager
async def asking(target: str) -> AsyncIterator[Asker]:
    async with grpc.aio.insecure_channel(target) as channel:
        yield Asker(channel)


@pytest.fixture
async def ask(server: Server) -> AsyncIterator[Asker]:
    async with asking(server.target) as asker:
        yield asker


@pytest.fixture
async def conn(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(dsn) as conn:
        yield conn


async def backends(client: Client) -> dict[str, pb.BackendStatus]:
    status = await client.admin.GetServerStatus(pb.GetServerStatusRequest())
    return {backend.name: backend for backend in status.backends}


def needing(*backends: str) -> set[str]:
    return {named(s) for s, needs in main.NEEDS.items() if set(needs) & set(backends)}


# --- What is told -------------------------------------------------------------------


async def test_a_server_whose_backends_answer_serves_everything(ask: Asker):
    assert await ask.all() == dict.fromkeys(SERVICES, SERVING)


def test_every_service_says_what_it_needs():
    assert main.NEEDS.keys() == {service.name for service, _ in services()}


def test_the_manual_has_every_name_and_what_it_needs():
    text = (ROOT / "docs" / "operations.md").read_text()
    _, _, section = text.partition("\n## Health\n")
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    for service, needs in main.NEEDS.items():
        (row,) = [row for row in rows if f"{service}`" in row.split("|")[1]]
        named_there = set(re.findall("`(\\w+)`", row.split("|")[2]))
        assert named_there == set(needs), service
    (recorder,) = [row for row in rows if "less than" in row]
    assert f"less than {backlog.STUCK_S:g} s" in recorder


async def test_a_service_that_is_not_there_is_not_found(ask: Asker):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask("quantplane.v1.NoService")
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert await ask.watch("quantplane.v1.NoService").next() == "SERVICE_UNKNOWN"


async def test_the_command_s_check_tells_of_a_service(server: Server):
    check = health.check
    assert await check(server.target) == SERVING
    assert await check(server.target, named("OrderService")) == SERVING
    assert await check(server.target, "OrderService") == "SERVICE_UNKNOWN"
    assert await check("127.0.0.1:1", "recorder") == "UNREACHABLE"


@pytest.mark.parametrize(
    ("service", "said", "code"),
    [("", "serving", 0), ("recorder", "serving", 0), ("x", "service_unknown", 1)],
)
async def test_the_command_says_it_and_ends_with_1_unless_it_is_serving(
    server: Server, service: str, said: str, code: int
):
    words = ["-m", "quantplane_server", "health", "--target", server.target]
    words += ["--service", service] if service else []
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert (out.decode().strip(), process.returncode) == (said, code)


async def test_a_watcher_is_told_what_is_and_each_change(
    ask: Asker, conn: asyncpg.Connection
):
    watchers = [ask.watch(), ask.watch(named("OrderService"))]
    quotes_watcher = ask.watch(named("MarketDataService"))
    for watcher in (*watchers, quotes_watcher):
        assert await watcher.next() == SERVING
    await conn.execute("UPDATE alembic_version SET version_num = '0001'")
    for watcher in watchers:
        assert await watcher.next() == NOT_SERVING
    needed = head_revision()
    await conn.execute("UPDATE alembic_version SET version_num = $1", needed)
    for watcher in watchers:
        assert await watcher.next() == SERVING
    reading = asyncio.ensure_future(quotes_watcher.next())
    assert not reading.done()
    reading.cancel()


# --- What makes it so ---------------------------------------------------------------


async def test_without_the_bus_only_what_needs_it_is_not_served(dsn: str):
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(Valkey())
        settings = Settings(
            postgres_dsn=dsn, redis_url=valkey.url, listen="127.0.0.1:0", grace_s=2
        )
        target = await stack.enter_async_context(serving(settings))
        ask = await stack.enter_async_context(asking(target))
        client = await stack.enter_async_context(Client(target))
        await valkey.kill()
        await ask.becomes(NOT_SERVING)
        await ask.becomes(NOT_SERVING, "recorder")
        told = await ask.all()
        bus = (await backends(client))["bus"]
        await valkey.start()
        await ask.becomes(SERVING)
        await ask.becomes(SERVING, "recorder")
        mended = (await backends(client))["bus"]
    away = {service for service, status in told.items() if status == NOT_SERVING}
    assert away == {"", "recorder"} | needing("bus")
    assert not bus.up
    assert bus.problem
    assert mended.up
    assert not mended.problem
    assert mended.change_time.ToNanoseconds() > bus.change_time.ToNanoseconds()


async def test_what_goes_is_told_once_and_once_more_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    away = iter((False, False, True, True, True, False, False))

    async def check() -> None:
        if next(away):
            raise ConnectionError("it\nwent")

    told = health.Health({"bus": check}, {"": ["bus"]})
    changes = []
    for _ in range(7):
        await told.check()
        changes.append(told.backends["bus"].changed_at)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [("WARNING", "bus: it went"), ("INFO", "bus is well")]
    assert len(set(changes)) == 3


async def test_a_schema_that_is_not_current_is_told_by_what_needs_it(
    ask: Asker, client: Client, conn: asyncpg.Connection
):
    await conn.execute("UPDATE alembic_version_reference SET version_num = '0001'")
    await ask.becomes(NOT_SERVING)
    told = await ask.all()
    assert {s for s, status in told.items() if status == NOT_SERVING} == {
        "", *needing("reference"),
    }  # fmt: skip
    assert "run `quantplane-server migrate`" in (await backends(client))[
        "reference"
    ].problem  # fmt: skip


async def test_a_database_that_is_being_restored_is_not_served(
    ask: Asker, conn: asyncpg.Connection
):
    await conn.execute("CREATE SCHEMA quantplane_restoring")
    await ask.becomes(NOT_SERVING, named("OrderService"))
    await conn.execute("DROP SCHEMA quantplane_restoring")
    await ask.becomes(SERVING, named("OrderService"))


async def test_who_has_no_connection_left_says_so_and_serves_again_by_itself(
    settings: Settings, conn: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(main, "CHECK_S", 0.2)
    settings = settings.model_copy(update={"pool_size": 2})
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(serving(settings))
        ask = await stack.enter_async_context(asking(target))
        client = await stack.enter_async_context(Client(target))
        async with conn.transaction():
            await conn.execute("LOCK TABLE strategies")
            request = pb.ListStrategiesRequest()
            stuck = [
                asyncio.ensure_future(client.strategy.ListStrategies(request))
                for _ in range(4)
            ]
            await ask.becomes(NOT_SERVING)
            status = await client.admin.GetServerStatus(pb.GetServerStatusRequest())
        await ask.becomes(SERVING)
        await asyncio.gather(*stuck)
        quiet = await client.admin.GetServerStatus(pb.GetServerStatusRequest())
    (pool,) = status.pools
    assert (pool.in_use, pool.max_size) == (2, 2)
    assert pool.waiting >= 2
    problems = {b.name: b.problem for b in status.backends if not b.up}
    assert problems["db"] == "all 2 connections are in use"
    assert quiet.pools[0].waiting == 0


async def test_a_recorder_that_does_not_get_on_is_told_apart(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backlog, "STUCK_S", 0.5)
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(serving(settings))
        ask = await stack.enter_async_context(asking(target))
        client = await stack.enter_async_context(Client(target))
        async with client.publish_quotes("feed") as publisher:
            await publisher.send(quotes("A", range(1, 4)))
            await ask.becomes(NOT_SERVING, "recorder")
            assert await ask() == SERVING  # nothing that is served waits for it
            problem = (await backends(client))["recorder"].problem
            async with recording(settings):
                await ask.becomes(SERVING, "recorder")
    assert "not recorded" in problem


async def test_a_server_that_starts_late_knows_since_when_recording_is_behind(
    settings: Settings,
):
    async with serving(settings) as target, Client(target) as client:
        async with client.publish_quotes("feed") as publisher:
            await publisher.send(quotes("A", range(1, 4)))
            await publisher.flush()
            published_at = datetime.now(UTC)
    async with serving(settings) as target, Client(target) as client:
        status = pb.GetServerStatusResponse()
        while not status.HasField("bus"):
            request = pb.GetServerStatusRequest()
            status = await client.admin.GetServerStatus(request)
    began_at = status.start_time.ToDatetime(UTC)
    assert status.bus.recorder_lag.ToTimedelta() >= began_at - published_at
    assert status.bus.unrecorded_bytes > 0


# --- The end ------------------------------------------------------------------------


async def test_who_watches_a_server_that_drains_is_told_and_let_go(settings: Settings):
    settings = settings.model_copy(update={"grace_s": 30})
    async with AsyncExitStack() as stack:
        async with serving(settings) as target:
            ask = await stack.enter_async_context(asking(target))
            watcher, other = ask.watch(), ask.watch("quantplane.v1.NoService")
            assert await watcher.next() == SERVING
            assert await other.next() == "SERVICE_UNKNOWN"
            loop = asyncio.get_running_loop()
            began = loop.time()
        took = loop.time() - began
        assert await watcher.next() == NOT_SERVING
        assert await watcher.call.read() == grpc.aio.EOF
        assert await other.call.read() == grpc.aio.EOF
        assert took < settings.grace_s  # nobody who watches keeps it from ending


async def test_a_draining_server_does_not_serve_though_its_backends_answer():
    async def well() -> None:
        pass

    told = health.Health({"db": well}, {"": ["db"]})
    told.drain()
    await told.check()
    request = health_pb2.HealthCheckRequest()
    assert (await told.Check(request, None)).status == Statuses.Value(NOT_SERVING)  # type: ignore[arg-type]
