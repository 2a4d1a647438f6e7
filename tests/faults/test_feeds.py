"""A feed's process may die or be replaced at any moment."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quantplane import Client
from tests.faults import (
    PATIENCE_S,
    REPOSITORY,
    Desk,
    Feed,
    Reader,
    Server,
    stream,
    until,
)
from tests.faults.feed import QUOTES, publish


@contextmanager
def feed_process(server: Server) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.faults.feed", server.target, "feed"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def told(process: subprocess.Popen[str]) -> str:
    """Return the next line of a feed's process."""
    assert process.stdout
    async with asyncio.timeout(PATIENCE_S):
        return (await asyncio.to_thread(process.stdout.readline)).strip()


async def accepted_at_the_end(process: subprocess.Popen[str]) -> int:
    """Return the last batch that a process which is at its end knew as accepted."""
    assert process.stdout
    async with asyncio.timeout(PATIENCE_S):
        lines = (await asyncio.to_thread(process.stdout.read)).split()
    return int(lines[-1]) if lines else 0


async def go_on(client: Client, batches: int) -> Feed:
    """Publish so many batches in place of the feed's process."""
    feed = Feed(client.publish_quotes("feed"))
    last = None
    async with asyncio.timeout(PATIENCE_S):
        async for accepted in publish(client, "feed", batches):
            last = accepted
    assert last == batches
    feed.sent = batches * QUOTES
    return feed


async def test_a_killed_feed_loses_and_doubles_nothing_that_was_accepted(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as reader,
    ):
        accepted = 0
        for _ in range(3):
            with feed_process(server) as process:
                assert int(await told(process)) >= accepted
                await desk.pause()
                process.kill()
                accepted = await accepted_at_the_end(process)
            assert reader.count > 0
        await until(lambda: reader.count >= accepted * QUOTES, "what was accepted")
        feed = await go_on(client, accepted + 200)
        await reader.has_all(feed)


async def test_a_feed_that_is_replaced_while_it_publishes_doubles_nothing(desk: Desk):
    async with (
        desk.server() as server,
        Client(server.target) as client,
        Reader(stream(client)) as reader,
    ):
        with feed_process(server) as process:
            accepted = int(await told(process))
            await desk.pause()
            feed = await go_on(client, accepted + 1_000)
            assert process.stdout
            assert "FEED_REPLACED" in await asyncio.to_thread(process.stdout.read)
        await reader.has_all(feed)
