"""The command quantplane-server, as processes."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from tests.conftest import Server
from tests.market_data import quote
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_up_serves_keeps_its_data_and_leaves_nothing_running(
    tmp_path: Path, number: signal.Signals
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


async def test_up_fills_orders_unless_it_is_told_not_to(tmp_path: Path):
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


async def test_the_demo_has_a_strategy_that_ends_with_it(tmp_path: Path):
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
        async with Client(target) as client, asyncio.timeout(60):
            orders = client.follow(client.order.WatchOrders, pb.WatchOrdersRequest())
            submitting = asyncio.create_task(submit(target))
            async for response in orders:
                if fills := [e.execution for e in response.events if e.execution.price]:
                    break
        await submitting
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
    assert "can't be reached" in await failed("record", **away)
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
