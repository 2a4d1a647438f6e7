"""The command quantplane-server, as processes."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from stat import S_IMODE
from typing import Any

import grpc
import psutil
import pytest
from pydantic import ValidationError

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from tests.conftest import Server
from tests.market_data import quote
from tests.orders import watching
from tests.postgres import database

COMMAND = Path(sys.executable).with_name("quantplane-server")


class Process:
    """A running command; its lines so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ready(self) -> str:
        """Return the address once it serves."""
        assert self.process.stdout
        async for line in self.process.stdout:
            if line.startswith(b"quantplane ready on "):
                return line.split()[-1].decode()
        raise AssertionError("ended before it was ready")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    async def ended(self) -> int:
        await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def started(*args: str, **environment: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(COMMAND, *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()


async def failed(*args: str, **environment: str) -> str:
    """Run a command that must fail; return the line that says why."""
    async with started(*args, **environment) as run:
        _, err = await run.process.communicate()
    assert run.process.returncode == 1
    assert b"Traceback" not in err
    return err.decode().splitlines()[-1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def publish_one(target: str, number: int) -> None:
    async with Client(target) as client, client.publish_quotes() as publisher:
        await publisher.send([quote("A", number)])
        await publisher.durable()


async def bars(target: str) -> int:
    async with Client(target) as client:
        response = await client.market_data.ListBars(pb.ListBarsRequest(symbol="A"))
        return len(response.bars)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Clients have the key that `up` leaves, in this folder, and no other."""
    monkeypatch.delenv("QUANTPLANE_API_KEY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "quantplane"


def modes(*paths: Path) -> list[int]:
    return [S_IMODE(path.stat().st_mode) for path in paths]


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_up_serves_keeps_its_data_and_leaves_nothing_running(
    tmp_path: Path, no_key: Path, number: signal.Signals
):
    up = ("up", "--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    for count in (1, 2):
        async with started(*up) as run:
            target = await run.ready()
            await publish_one(target, count)
            assert await bars(target) == count
            children = run.children()
            run.process.send_signal(number)
            assert await run.ended() == 0
        assert not psutil.wait_procs(children, timeout=20)[1]
        assert not files(no_key)  # no key either


async def test_up_fills_orders_unless_it_is_told_not_to(tmp_path: Path, no_key: Path):
    up = ("up", "--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    async with started(*up, "--no-paper") as run:
        target = await run.ready()
        await publish_one(target, 1)
        assert not [p for p in run.children() if "paper" in p.cmdline()]
        await submit(target)
    async with started(*up) as run:
        target = await run.ready()
        async with Client(target) as client, asyncio.timeout(60):
            request = pb.WatchPortfolioRequest()
            portfolio = client.follow(client.portfolio.WatchPortfolio, request)
            async for response in portfolio:
                if response.positions and response.positions[0].quantity == 10:
                    break


async def test_the_demo_has_a_strategy_that_ends_with_it(tmp_path: Path, no_key: Path):
    up = ("up", "--demo", "--data-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    async with started(*up) as run:
        await run.ready()
        children = run.children()
        assert [p for p in children if "strategy" in p.cmdline()]
        run.process.kill()
        await run.ended()
    assert not psutil.wait_procs(children, timeout=20)[1]


async def test_a_paper_broker_fills_orders_at_any_server(server: Server):
    target = server.target
    await publish_one(target, 1)
    terms = ("--commission-bps", "5", "--latency-ms", "1", "--symbol", "A")
    async with started("paper", "--target", target, *terms) as run:
        assert await run.ready() == target
        async with (
            asyncio.timeout(60),
            Client(target) as client,
            watching(client) as stream,
        ):
            await submit(target)
            async for response in stream:
                if fills := [e.execution for e in response.events if e.execution.price]:
                    break
        run.process.terminate()
        assert await run.ended() == 0
    assert fills[0].commission == pytest.approx(10 * fills[0].price * 5e-4)


async def submit(target: str) -> None:
    """Submit a market order to buy 10 of what `publish_one` quotes."""
    order = pb.NewOrder(
        client_order_id="1",
        strategy_id="test",
        symbol="A",
        side=pb.SIDE_BUY,
        order_type=pb.ORDER_TYPE_MARKET,
        quantity=10,
        time_in_force=pb.TIME_IN_FORCE_GTC,
    )
    async with Client(target) as client:
        await client.order.SubmitOrder(pb.SubmitOrderRequest(order=order))


async def test_workers_share_a_port_and_one_that_dies_is_replaced(
    dsn: str, redis_url: str
):
    port = free_port()
    environment = {
        "QUANTPLANE_POSTGRES_DSN": dsn,
        "QUANTPLANE_REDIS_URL": redis_url,
        "QUANTPLANE_LISTEN": f"127.0.0.1:{port}",
    }
    async with started("serve", "--workers", "2", **environment) as run:
        target = await run.ready()
        workers = [p for p in run.children() if "--share-port" in p.cmdline()]
        assert len(workers) == 2
        for number, worker in enumerate(workers):
            worker.kill()
            psutil.wait_procs([worker], timeout=10)
            await publish_one(target, number)
        while len([p for p in run.children() if listens(p, port)]) < 2:
            await asyncio.sleep(0.05)
        assert await bars(target) == 2
        children = run.children()
    assert not psutil.wait_procs(children, timeout=20)[1]


def listens(process: psutil.Process, port: int) -> bool:
    try:
        found: list[Any] = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.laddr.port == port and c.status == "LISTEN" for c in found)


async def test_what_is_not_set_or_not_there_is_one_sentence(
    settings: Settings, postgres_dsn: str, redis_url: str
):
    nothing = {"QUANTPLANE_POSTGRES_DSN": "", "QUANTPLANE_REDIS_URL": ""}
    assert "must be set" in await failed("serve", **nothing)
    away = {
        "QUANTPLANE_POSTGRES_DSN": "postgresql://127.0.0.1:1/x",
        "QUANTPLANE_REDIS_URL": redis_url,
    }
    assert "can't be reached" in await failed("user", "list", **away)
    async with database(postgres_dsn, migrated=False) as empty:
        old = {"QUANTPLANE_POSTGRES_DSN": empty, "QUANTPLANE_REDIS_URL": redis_url}
        assert "run `quantplane-server migrate`" in await failed("record", **old)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        real = settings.environment() | {"QUANTPLANE_LISTEN": listen}
        assert "can't listen on" in await failed("serve", **real)
        shared = settings.environment() | {"QUANTPLANE_LISTEN": "127.0.0.1:0"}
        assert "share a port" in await failed("serve", "--workers", "2", **shared)
    both = ("--commission-bps", "1", "--commission-per-unit", "1")
    assert "use one of" in await failed("paper", *both)
    assert "QUANTPLANE_CAP_MB" in await failed("serve", QUANTPLANE_CAP_MB="x")
    refused = postgres_dsn.replace("//quantplane@", "//nobody@")
    for command in ("migrate", "record"):
        told = await failed(command, **real | {"QUANTPLANE_POSTGRES_DSN": refused})
        assert told.endswith('refuses: role "nobody" does not exist')


async def test_a_password_that_makes_no_url_is_not_repeated():
    told = await failed(
        "serve", QUANTPLANE_REDIS_URL="redis://app:hunter#2@127.0.0.1:1"
    )
    assert "QUANTPLANE_REDIS_URL: must be redis or rediss or unix://" in told
    assert "hunter" not in told


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://app:hunter/2@127.0.0.1:1/x",
        "postgresql://app:hunter?2@127.0.0.1:1/x",
        "postgresql://app:12/hunter@127.0.0.1:1/x",
        "postgresql://[hunter@127.0.0.1:1/x",
        "app:hunter@127.0.0.1/x",
        "host=127.0.0.1 password=hunter",
    ],
)
def test_what_is_no_url_is_refused_and_not_repeated(dsn: str):
    with pytest.raises(ValidationError, match="must be postgresql or") as caught:
        Settings(postgres_dsn=dsn)
    assert "hunter" not in str(caught.value)


def test_what_is_a_url_is_taken():
    for dsn in (
        *("", "postgresql:///x?host=/tmp/s", "postgres://app@[::1]:5432/x"),
        *("postgresql://app:hunter%2F2@a:1,b:2/x", "postgresql://app:p@ss@a/x?b=c"),
    ):
        assert Settings(postgres_dsn=dsn).postgres_dsn == dsn
    for url in ("unix:///tmp/s", "unix://app:x@/tmp/s?db=1", "rediss://:x@a:1/0"):
        assert Settings(redis_url=url).redis_url == url


# --- the keys of `up` ---------------------------------------------------------


async def test_the_keys_of_up_are_of_its_user_and_in_no_argument(
    settings: Settings, no_key: Path
):
    environment = settings.environment()
    async with started("up", "--demo", **environment) as run:
        target = await run.ready()
        (file,) = files(no_key)
        assert file.name == f"up-{target.rpartition(':')[2]}.key"
        assert modes(no_key, file) == [0o700, 0o600]
        key = file.read_text().strip()
        async with Client(target, token=key) as client:
            known = await client.auth.WhoAmI(pb.WhoAmIRequest())
            keys = (await client.user.ListApiKeys(pb.ListApiKeysRequest())).keys
        assert (known.username, known.role) == ("local", "admin")
        own = [each for each in keys if each.username == "local"]
        assert sorted(each.role for each in own) == ["admin", "broker", "strategy"]
        shown = [environment_of(child) for child in run.children()]
        assert not [p for p in run.children() if "qp_" in " ".join(p.cmdline())]
        given = {
            each["QUANTPLANE_API_KEY"] for each in shown if "QUANTPLANE_API_KEY" in each
        }
        assert len(given) == 2  # the broker's and the strategy's
        assert key not in given


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        found: dict[str, str] = process.environ()
    except psutil.Error:  # another account's
        found = {}
    return found


async def test_what_a_killed_up_left_opens_nothing_once_the_next_has_started(
    settings: Settings, no_key: Path
):
    environment = settings.environment()
    environment["QUANTPLANE_LISTEN"] = f"127.0.0.1:{free_port()}"
    async with started("up", "--no-paper", **environment) as run:
        target = await run.ready()
        (file,) = files(no_key)
        old = file.read_text().strip()
        children = run.children()
        run.process.kill()
        await run.ended()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert files(no_key) == [file]
    async with started("up", "--no-paper", **environment) as run:
        await run.ready()
        async with Client(target) as client:
            await client.auth.WhoAmI(pb.WhoAmIRequest())
        async with Client(target, token=old) as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.auth.WhoAmI(pb.WhoAmIRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_beyond_loopback_up_leaves_no_key(settings: Settings, no_key: Path):
    environment = settings.environment() | {"QUANTPLANE_LISTEN": "0.0.0.0:0"}
    async with started("up", "--insecure", **environment) as run:
        await run.ready()  # the broker too, which reaches it by loopback
        assert not files(no_key)
        run.process.terminate()
        _, err = await run.process.communicate()
    assert b"`quantplane-server key create local NAME` makes one" in err


@pytest.fixture
def open_file(no_key: Path) -> Path:
    """A file for the key of some port, which others may read."""
    no_key.mkdir()
    file = no_key / f"up-{free_port()}.key"
    file.write_text("qp_known")
    file.chmod(0o644)
    return file


async def test_a_file_that_others_could_read_is_replaced_by_up(
    settings: Settings, open_file: Path
):
    port = open_file.stem.removeprefix("up-")
    environment = settings.environment() | {"QUANTPLANE_LISTEN": f"127.0.0.1:{port}"}
    async with started("up", "--no-paper", **environment) as run:
        async with Client(await run.ready()) as client:
            await client.auth.WhoAmI(pb.WhoAmIRequest())
        assert modes(open_file) == [0o600]


async def test_up_goes_on_where_there_is_no_home(settings: Settings, tmp_path: Path):
    home = tmp_path / "home"
    home.touch()  # nobody makes a folder in it, not even root
    environment = settings.environment() | {"XDG_STATE_HOME": str(home)}
    async with started("up", "--no-paper", **environment) as run:
        await run.ready()
        run.process.terminate()
        _, err = await run.process.communicate()
    assert run.process.returncode == 0
    assert b"can't be written" in err
    assert b"`quantplane-server key create local NAME` makes one" in err
