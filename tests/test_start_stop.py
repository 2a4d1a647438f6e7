"""How processes start before what they need, and how they stop under way."""

import asyncio
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg
import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server import embedded, tasks
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from quantplane_server.market_data import service
from quantplane_server.tasks import Outage, closed
from quantplane_server.waiting import Refused, place
from tests.faults.backends import Service, backends
from tests.market_data import quote
from tests.postgres import KEY, database
from tests.test_cli import COMMAND, failed, free_port

PATIENCE_S = 60.0
LONG_S = 600.0  # a grace that no test waits for
HANG_S = 0.5  # in which a call that does not hang is answered
TRIES_S = 3.0  # in which what is tried again is tried several times

Backends = tuple[Service, Service]


class Run:
    """A command that runs; the lines of its log, and of its children's."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self.address = ""
        self._news = asyncio.Condition()
        self._reading = [
            asyncio.create_task(self._read_log()),
            asyncio.create_task(self._read_output()),
        ]

    async def _read_log(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            async with self._news:
                self.log.append(line.decode())
                self._news.notify_all()

    async def _read_output(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self._news:
                if line.startswith(b"quantplane ready on "):
                    self.address = line.split()[-1].decode()
                    self._news.notify_all()

    async def ready(self) -> str:
        """Return the address once it serves."""
        await self.until(lambda: bool(self.address), "it is ready")
        return self.address

    async def said(self, text: str, times: int = 1) -> None:
        """Return once so many lines of the log contain a text."""
        await self.until(lambda: self.count(text) >= times, f"it says {text!r}")

    def count(self, text: str) -> int:
        return sum(text in line for line in self.log)

    def pids(self, text: str) -> set[int]:
        """Return which processes have said something."""
        return {json.loads(line)["pid"] for line in self.log if text in line}

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def tell(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        for task in self._reading:
            task.cancel()
        print(*self.log)  # shown if the test fails

    async def until(self, reached: Any, what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S), self._news:
                await self._news.wait_for(reached)
        except TimeoutError:
            raise AssertionError(f"never {what}:\n{''.join(self.log)}") from None


@asynccontextmanager
async def running(*args: str, **environment: str) -> AsyncIterator[Run]:
    run = Run(
        await asyncio.create_subprocess_exec(
            *(COMMAND, *args),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "QUANTPLANE_LISTEN": "127.0.0.1:0", **environment},
        )
    )
    try:
        yield run
    finally:
        await run.close()


# --- Starting -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    with backends(tmp_path_factory.mktemp("two")) as services:
        yield services


@pytest.fixture
async def away(two: Backends) -> AsyncIterator[tuple[Service, Service, dict[str, str]]]:
    """PostgreSQL with a database, and Valkey, both killed; what a server needs."""
    postgres, valkey = two
    await postgres.start()
    async with database(postgres.address) as dsn:
        await postgres.kill()
        await valkey.kill()
        yield (
            *(postgres, valkey),
            {"QUANTPLANE_POSTGRES_DSN": dsn, "QUANTPLANE_REDIS_URL": valkey.address},
        )
        await postgres.start()


@pytest.mark.parametrize("command", ["serve", "record", "serve --workers 2"])
async def test_it_waits_for_its_backends_and_says_so_once(
    away: tuple[Service, Service, dict[str, str]], command: str
):
    postgres, valkey, environment = away
    if "workers" in command:
        environment["QUANTPLANE_LISTEN"] = f"127.0.0.1:{free_port()}"
    async with running(*command.split(), **environment) as run:
        await run.said("waiting for PostgreSQL at ")
        await postgres.start()
        await run.said("waiting for Valkey at ")
        await valkey.start()
        await run.ready()
        assert run.count("waiting for") == 2  # its children say nothing
        assert run.count("PostgreSQL at ") == run.count("Valkey at ") == 2
        if command != "record":
            async with Client(run.address) as client:
                await client.strategy.ListStrategies(pb.ListStrategiesRequest())
        run.tell()
        assert await run.ended() == 0


async def test_who_is_told_to_stop_waits_no_longer(
    away: tuple[Service, Service, dict[str, str]],
):
    _, _, environment = away
    serve = running("serve", **environment)
    paper = running("paper", "--target", f"127.0.0.1:{free_port()}")
    async with serve as server, paper as broker:
        await server.said("waiting for PostgreSQL at ")
        await broker.said("waiting for a server at ")
        children = server.children()
        for run in (server, broker):
            run.tell()
            assert await run.ended() == 0
            assert not run.address
    assert not psutil.wait_procs(children, timeout=20)[1]


async def test_a_paper_broker_waits_for_its_server(settings: Settings):
    port = free_port()
    settings = settings.model_copy(update={"listen": f"127.0.0.1:{port}"})
    async with running("paper", "--target", settings.listen) as run:
        await run.said(f"waiting for a server at {settings.listen}: ")
        assert not run.address
        async with serving(settings):
            await run.ready()
            run.tell()
            assert await run.ended() == 0


async def test_a_migration_waits_as_long_as_it_may(
    away: tuple[Service, Service, dict[str, str]],
):
    postgres, _, environment = away
    assert "can't be reached" in await failed("migrate", "--wait-s", "0", **environment)
    async with running("migrate", **environment) as run:
        await run.said("waiting for PostgreSQL at ")
        await postgres.start()
        assert await run.ended() == 0


def with_path(dsn: str, path: str) -> str:
    return urlsplit(dsn)._replace(path=path).geturl()


@pytest.mark.parametrize(
    ("setting", "change", "text"),
    [
        ("postgres_dsn", lambda dsn: with_path(dsn, "/nobodys"), "does not exist"),
        ("postgres_dsn", lambda dsn: dsn.replace("//", "//nobody@", 1), "nobody"),
        ("reference_dsn", lambda dsn: with_path(dsn, "/nobodys"), "does not exist"),
        ("redis_url", lambda url: f"{url}?password=wrong", "AUTH"),
    ],
)
async def test_what_no_waiting_would_mend_is_refused_at_once(
    settings: Settings, setting: str, change: Any, text: str
):
    given = getattr(settings, setting) or settings.postgres_dsn
    if "nobody@" in change("//"):
        given = f"postgresql://{given.partition('@')[2]}"
    wrong = settings.model_copy(update={setting: change(given)})
    with pytest.raises(Refused, match=text):
        async with recording(wrong):
            pass


async def test_a_refusal_is_one_sentence(settings: Settings):
    assert settings.postgres_dsn
    nobodys = with_path(settings.postgres_dsn, "/nobodys")
    environment = settings.environment() | {"QUANTPLANE_POSTGRES_DSN": nobodys}
    said = await failed("serve", **environment)
    assert said.endswith('refuses: database "nobodys" does not exist')


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://me:secret@db.example:5433/quotes", "db.example:5433"),
        ("postgresql://me@/quotes?host=/run/pg", "/run/pg"),
        ("postgresql://me:secret@one:1,two:2/quotes", "one"),
        ("redis://:secret@cache:6380/0", "cache:6380"),
        ("redis://cache", "cache"),
        ("unix:///run/valkey.sock?db=0", "/run/valkey.sock"),
    ],
)
def test_what_is_waited_for_is_said_without_its_password(url: str, where: str):
    assert place(url) == where


# --- Stopping -------------------------------------------------------------------------


@asynccontextmanager
async def held(
    dsn: str, table: str = "strategies"
) -> AsyncIterator[asyncpg.Connection]:
    """Keep waiting who reads or writes a table."""
    connection = await asyncpg.connect(dsn)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"LOCK TABLE {table}")
        yield connection
    finally:
        connection.terminate()


async def calls_wait(connection: asyncpg.Connection, count: int = 1) -> None:
    """Return once so many calls wait for what is held."""
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database ="
    query += " (SELECT oid FROM pg_database WHERE datname = current_database())"
    async with asyncio.timeout(PATIENCE_S):
        while await connection.fetchval(query) < count:
            await asyncio.sleep(0.02)


class Calls:
    """Calls that wait for strategies, each on a connection of its own."""

    def __init__(self, target: str, count: int = 1) -> None:
        alone = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(target, alone) for _ in range(count)
        ]
        stubs: Any = [pb.StrategyServiceStub(channel) for channel in self._channels]
        request, shown = (
            pb.ListStrategiesRequest(),
            [("authorization", f"Bearer {KEY}")],
        )
        self.made = [
            stub.ListStrategies(request, timeout=LONG_S, metadata=shown)
            for stub in stubs
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for call in self.made:
            call.cancel()
        for channel in self._channels:
            await channel.close()


async def rest(call: Any) -> list[Any]:
    """Return what a call still tells until its end."""
    responses = []
    async with asyncio.timeout(PATIENCE_S):
        while response := await call.read():
            responses.append(response)
    return responses


async def test_health_goes_first_then_streams_and_a_call_finishes(settings: Settings):
    environment = settings.environment() | {"QUANTPLANE_GRACE_S": str(LONG_S)}
    assert settings.postgres_dsn
    async with (
        running("serve", **environment) as run,
        Client(await run.ready()) as client,
        grpc.aio.insecure_channel(run.address) as channel,
        held(settings.postgres_dsn) as connection,
        Calls(run.address) as calls,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = ServerReflectionStub(channel).ServerReflectionInfo()
        await reflection.write(ServerReflectionRequest(list_services=""))
        await reflection.read()
        request = pb.SubscribeQuotesRequest(symbols=["A"])
        stream: Any = client.market_data.SubscribeQuotes(request)
        await stream.read()
        await calls_wait(connection)
        run.tell()
        await run.said("draining: 3 streams, 1 call")
        told = [each.status for each in await rest(watch)]
        assert told == [health_pb2.HealthCheckResponse.NOT_SERVING]
        events = [response.event for response in await rest(stream)]
        assert events[-1].goodbye.reason == pb.GOODBYE_REASON_DRAINING
        assert await reflection.code() is grpc.StatusCode.UNAVAILABLE
        assert run.process.returncode is None
        connection.terminate()
        await calls.made[0]
        assert await run.ended() == 0
        assert run.count("drained in ") == 1


async def test_who_acknowledges_quotes_while_the_server_drains_is_told_goodbye(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "LEAVE_S", LONG_S)
    settings = settings.model_copy(update={"grace_s": LONG_S})
    server = serving(settings)
    async with Client(await server.__aenter__()) as client:
        stream: Any = client.market_data.StreamQuotes()
        await stream.write(pb.StreamQuotesRequest(symbols=["A"]))
        last = await stream.read()
        stopping = asyncio.create_task(server.__aexit__(None, None, None))
        await asyncio.sleep(HANG_S)  # a call that ends at once has ended
        await stream.write(pb.StreamQuotesRequest(acknowledge=last.sequence))
        while last.event.WhichOneof("event") != "goodbye":
            last = await stream.read()
        stream.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await stopping


async def test_a_call_that_outlasts_the_grace_is_ended(settings: Settings):
    environment = settings.environment() | {"QUANTPLANE_GRACE_S": "0.5"}
    assert settings.postgres_dsn
    async with (
        running("serve", **environment) as run,
        held(settings.postgres_dsn) as connection,
        Calls(await run.ready()) as calls,
    ):
        await calls_wait(connection)
        run.tell()
        assert await run.ended() == 0
        await run.said("not drained in 0.5 s, so ended: 0 streams, 1 call")
        with pytest.raises(grpc.aio.AioRpcError):
            await calls.made[0]


async def test_a_server_stops_though_postgresql_hangs(two: Backends):
    postgres, valkey = two
    await postgres.start()
    await valkey.start()
    async with database(postgres.address) as dsn:
        environment = {
            "QUANTPLANE_POSTGRES_DSN": dsn,
            "QUANTPLANE_REDIS_URL": valkey.address,
            "QUANTPLANE_GRACE_S": "0.5",
        }
        async with running("serve", **environment) as run:
            await run.ready()
            hung = await processes_of(dsn)
            try:
                for process in hung:
                    process.suspend()
                async with Calls(run.address) as calls:
                    await asyncio.sleep(HANG_S)
                    assert not calls.made[0].done()
                    run.tell()
                    assert await run.ended() == 0
            finally:
                for process in hung:
                    with suppress(psutil.NoSuchProcess):
                        process.resume()


async def test_what_was_accepted_is_recorded_before_the_end(settings: Settings):
    assert settings.postgres_dsn
    async with (
        running("serve", **settings.environment()) as run,
        Client(await run.ready()) as client,
        client.publish_quotes() as publisher,
    ):
        await publisher.send([quote("A", 0)])
        await publisher.durable()
        async with held(settings.postgres_dsn, "market_data") as connection:
            for number in range(1, 10):
                await publisher.send([quote("A", number)])
            await publisher.flush()
            await calls_wait(connection)
            run.tell()
            await run.said("drained in ")
        assert await run.ended() == 0
    connection = await asyncpg.connect(settings.postgres_dsn)
    assert await connection.fetchval("SELECT count(*) FROM market_data") == 10
    await connection.close()


async def processes_of(dsn: str) -> list[psutil.Process]:
    """Return PostgreSQL's processes."""
    connection = await asyncpg.connect(dsn)
    backend = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
    postmaster = backend.parent()
    assert postmaster
    await connection.close()
    return [postmaster, *postmaster.children()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["serve", "serve --workers 2", "up"])
async def test_a_second_signal_ends_it_at_once_and_its_children(
    settings: Settings, tmp_path: Path, command: str, number: signal.Signals
):
    environment = settings.environment() | {"QUANTPLANE_GRACE_S": str(LONG_S)}
    environment["QUANTPLANE_LISTEN"] = f"127.0.0.1:{free_port()}"
    dsn = settings.postgres_dsn
    if command == "up":
        environment |= {"QUANTPLANE_POSTGRES_DSN": "", "QUANTPLANE_REDIS_URL": ""}
        environment |= {
            "QUANTPLANE_DATA_DIR": str(tmp_path),
            "QUANTPLANE_AUTH": "false",
        }
    async with running(*command.split(), **environment) as run:
        await run.ready()
        if found := embedded.running(tmp_path):
            dsn = found[0]
        assert dsn
        async with held(dsn) as connection, Calls(run.address):
            await calls_wait(connection)
            children = run.children()
            run.tell(number)
            await run.said("draining: ")
            run.tell(number)
            assert await run.ended() == 128 + number
        assert not psutil.wait_procs(children, timeout=20)[1]


async def test_workers_drain_side_by_side(settings: Settings):
    environment = settings.environment() | {"QUANTPLANE_GRACE_S": str(LONG_S)}
    environment["QUANTPLANE_LISTEN"] = f"127.0.0.1:{free_port()}"
    assert settings.postgres_dsn
    async with (
        running("serve", "--workers", "2", **environment) as run,
        held(settings.postgres_dsn) as connection,
        Calls(await run.ready(), 8) as calls,  # on both, as good as surely
    ):
        await calls_wait(connection, 8)
        run.tell()
        await run.until(lambda: len(run.pids("draining: ")) == 2, "both drain")
        connection.terminate()
        await asyncio.gather(*calls.made)
        assert await run.ended() == 0


async def test_a_signal_to_all_processes_stops_them_in_order(settings: Settings):
    environment = settings.environment() | {"QUANTPLANE_GRACE_S": str(LONG_S)}
    assert settings.postgres_dsn
    async with (
        running("serve", **environment) as run,
        held(settings.postgres_dsn) as connection,
        Calls(await run.ready()) as calls,
    ):
        await calls_wait(connection)
        recorder = run.children()
        for process in (*recorder, psutil.Process(run.process.pid)):
            process.terminate()
        await run.said("draining: ", times=2)  # seconds later
        assert all(each.is_running() for each in recorder)
        assert not run.count("restarting")
        connection.terminate()
        await calls.made[0]
        assert await run.ended() == 0


# --- Outages --------------------------------------------------------------------------


async def test_each_part_says_once_that_valkey_is_away_and_once_that_it_is_back(
    two: Backends,
):
    postgres, valkey = two
    await postgres.start()
    await valkey.start()
    async with database(postgres.address) as dsn:
        environment = {
            "QUANTPLANE_POSTGRES_DSN": dsn,
            "QUANTPLANE_REDIS_URL": valkey.address,
        }
        async with (
            running("serve", **environment) as run,
            Client(await run.ready()) as client,
            client.publish_quotes() as publisher,
        ):
            request = pb.SubscribeQuotesRequest(symbols=["A"])
            stream: Any = client.market_data.SubscribeQuotes(request)
            await stream.read()
            await publisher.send([quote("A", 1)])
            await publisher.durable()
            await valkey.kill()
            work = ["following quotes", "hearing of changes", "recording"]
            for each in work:
                await run.said(f"{each} fails, trying again")
            await asyncio.sleep(TRIES_S)
            await valkey.start()
            await publisher.send([quote("A", 2)])
            for each in work:
                await run.said(f"{each} works again, after")
            for each in work:
                assert run.count(f"{each} fails") == 1
                assert run.count(f"{each} works again") == 1
            del stream


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, bool]] = []  # with whether there is a traceback

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.getMessage(), bool(record.exc_info)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log = logging.getLogger("tests.outage")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def attempt(outage: Outage, error: BaseException | None = None) -> None:
    with outage:
        if error:
            raise error


def test_an_outage_is_said_once_and_its_end_once(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
):
    now = iter([100.0, 112.34])
    monkeypatch.setattr(tasks, "monotonic", lambda: next(now))
    outage = Outage(logging.getLogger("tests.outage"), "work", (OSError,))
    attempt(outage)
    for error in (ConnectionResetError("a"), TimeoutError("b"), OSError("c")):
        attempt(outage, error)
    attempt(outage)
    outage.over()
    assert lines.lines == [
        ("work fails, trying again: ConnectionResetError('a')", False),
        ("work works again, after 12.3 s", False),
    ]


def test_another_error_in_an_outage_is_said_with_its_traceback(lines: Lines):
    outage = Outage(logging.getLogger("tests.outage"), "work", (OSError,))
    for error in (OSError("a"), KeyError("b"), OSError("c"), KeyError("d")):
        attempt(outage, error)
    assert lines.lines == [
        ("work fails, trying again: OSError('a')", False),
        ("work fails, trying again: KeyError('b')", True),
    ]
    outage.over()
    attempt(outage, KeyError("e"))
    assert lines.lines[3:] == [("work fails, trying again: KeyError('e')", True)]


def test_what_ends_the_work_is_no_outage(lines: Lines):
    outage = Outage(logging.getLogger("tests.outage"), "work", (OSError,))
    with pytest.raises(asyncio.CancelledError):
        attempt(outage, asyncio.CancelledError())
    assert not lines.lines


async def test_what_can_not_be_finished_at_the_end_is_left(
    caplog: pytest.LogCaptureFixture,
):
    async def hang() -> None:
        await asyncio.Event().wait()

    async def fail() -> None:
        raise ConnectionResetError

    await closed(hang, "one", at_most_s=0.01)
    await closed(fail, "other")
    assert caplog.messages == [
        "left unfinished after 0.01 s: one",
        "left unfinished: other: ConnectionResetError()",
    ]


# --- Clients --------------------------------------------------------------------------


async def test_a_follower_says_once_why_the_server_can_not_be_reached(
    caplog: pytest.LogCaptureFixture,
):
    request = pb.SubscribeQuotesRequest(symbols=["A"])
    request.heartbeat_interval.FromMilliseconds(200)
    async with Client(f"127.0.0.1:{free_port()}") as client:
        follower = client.follow(client.market_data.SubscribeQuotes, request)
        reading = asyncio.create_task(anext(follower))
        async with asyncio.timeout(PATIENCE_S):
            while caplog.text.count("no sign of life") < 2:
                await asyncio.sleep(0.02)
        reading.cancel()
    said = Counter("can't be reached" in text for text in caplog.messages)
    assert said[True] == 1
    assert "Connection refused" in caplog.text
