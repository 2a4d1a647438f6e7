"""Whatever is killed, every quote that was accepted is read and recorded once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from quantplane import Client
from tests.faults import RATE, Desk, Feed, Reader, Server, stream, subscribe, until

BUSY = 5 * RATE  # the recorder is in the middle of something all the time


@asynccontextmanager
async def ordeal(desk: Desk, rate: int = RATE) -> AsyncIterator[Server]:
    """Publish, read and record while the block kills; then compare everything."""
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as by_stream,
        Reader(subscribe(client)) as by_subscription,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        async with feed.running(rate):
            await desk.pause()
            yield server
            await desk.pause()
        await feed.all_durable()
        await by_stream.has_all(feed)
        await by_subscription.has_all(feed)
        await desk.has_recorded(feed)


async def test_a_killed_server_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk) as server:
        for _ in range(3):
            await server.kill()
            await server.start()
            await desk.pause()


async def test_a_killed_valkey_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk):
        for _ in range(3):
            await desk.restart(desk.valkey)
            await desk.pause()


async def test_a_killed_postgresql_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk, BUSY):
        for _ in range(3):
            await desk.restart(desk.postgres)
            await desk.pause()


async def test_a_killed_recorder_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk, BUSY) as server:
        for _ in range(4):
            server.kill_recorder()
            await until(lambda: server.recorder, "another recorder")
            await desk.pause()


async def test_any_of_them_killed_together_lose_and_double_nothing(desk: Desk):
    async with ordeal(desk) as server:
        for _ in range(4):
            killed = desk.rng.sample(
                ["server", "recorder", "valkey", "postgres"], desk.rng.randint(2, 3)
            )
            print("killed together:", killed)
            if "recorder" in killed:
                server.kill_recorder()
            if "server" in killed:
                await server.kill()
            services = [desk.valkey] * ("valkey" in killed)
            services += [desk.postgres] * ("postgres" in killed)
            await asyncio.gather(*(desk.restart(service) for service in services))
            if "server" in killed:
                await server.start()
            await desk.pause()
