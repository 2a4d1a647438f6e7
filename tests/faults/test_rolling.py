"""Servers are restarted one after another while everybody goes on with their work."""

from collections import Counter

import pytest

from quantplane import Client, follow
from tests.faults import (
    PATIENCE_S,
    Desk,
    Feed,
    Reader,
    Server,
    stream,
    subscribe,
    until,
)
from tests.faults.trading import Trading

ORDERS = 100  # a second
FOLLOWED = ("StreamQuotes", "SubscribeQuotes", "WatchOrders", "WatchBrokerCommands")
GOODBYE = "the server says goodbye; reconnecting"


async def test_a_rolling_restart_loses_and_doubles_nothing(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # Nobody takes a start for silence, however long it takes on a busy machine.
    monkeypatch.setattr(follow, "HEARTBEAT_S", PATIENCE_S)
    async with (
        desk.server() as one,
        desk.server() as other,
        Client(one.target) as client,
        Client(other.target) as second,
        Reader(stream(client)) as streamed,
        Reader(stream(second)) as streamed_too,
        Reader(subscribe(client)) as subscribed,
        Reader(subscribe(second)) as subscribed_too,
        client.publish_quotes("feed") as publisher,
    ):
        feed = Feed(publisher)
        readers = [streamed, streamed_too, subscribed, subscribed_too]
        trading = Trading(client, second, rate=ORDERS)
        async with feed.running(), trading.running():
            for server in (one, other):
                await desk.pause()
                await restarted(server, caplog)
                await all_go_on(readers, trading)
        await feed.all_durable()
        for reader in readers:
            await reader.has_all(feed)
            assert reader.follower.reconnects == 1
        for watcher in trading.watchers:
            assert watcher.follower.reconnects == 1
        await trading.agrees()
        await desk.has_recorded(feed)


async def restarted(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Stop a server and start it again; each of its followers is told goodbye."""
    caplog.clear()
    assert await server.stop() == 0
    told = [text for text in caplog.messages if GOODBYE in text]
    assert Counter(text.partition(":")[0] for text in told) == dict.fromkeys(
        FOLLOWED, 1
    )
    await server.start()


async def all_go_on(readers: list[Reader], trading: Trading) -> None:
    """Wait until everything has come to everybody that there was."""
    counts = [reader.count for reader in readers]
    most, acknowledged, settled = max(counts), trading.acknowledged, trading.settled
    await until(lambda: min(r.count for r in readers) > most, "all have more quotes")
    await until(lambda: trading.acknowledged > acknowledged, "orders are taken")
    await until(lambda: trading.settled > settled, "orders are settled")
