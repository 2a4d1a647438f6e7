"""A followed chain is right, and every published one stored, whatever ends servers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from google.protobuf.duration_pb2 import Duration

from quantplane import Client
from quantplane import v1 as pb
from quantplane.batches import publish_batches
from quantplane.follow import Follower
from tests.faults import PATIENCE_S, Desk, until

UNDERLYING = "A"
CONTRACTS = 40
PER_CHAIN = 7  # contracts that each partial chain changes
START = datetime(2024, 3, 1, tzinfo=UTC)
HEARTBEAT = Duration(seconds=1)


def changed(number: int) -> list[int]:
    """Return which contracts a chain has; the first is whole."""
    if number == 0:
        return list(range(CONTRACTS))
    return sorted((number * PER_CHAIN + n) % CONTRACTS for n in range(PER_CHAIN))


class Publisher:
    """Publishes chains 0, 1, 2, ..., whose number is the bid of their contracts."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.sent = self.stored = 0
        self._stopped = False

    def _chains(self) -> Iterator[pb.PublishOptionChainRequest]:
        while not self._stopped:
            number, self.sent = self.sent, self.sent + 1
            chain = pb.OptionChain(underlying=UNDERLYING, partial=number > 0)
            chain.time.FromDatetime(START + timedelta(seconds=number))
            for contract in changed(number):
                chain.contracts.add(
                    expiration="2024-12-20",
                    strike=100.0 + contract,
                    option_type=pb.OPTION_TYPE_CALL,
                    bid=number,
                )
            yield pb.PublishOptionChainRequest(chain=chain)

    async def _run(self) -> None:
        method = self._client.options.PublishOptionChain
        async for _ in publish_batches(method, self._chains()):
            self.stored += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Publish while the block runs; at its end everything sent is stored."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._stopped = True
            async with asyncio.timeout(PATIENCE_S):
                await task
        assert self.stored == self.sent

    def latest(self) -> dict[float, float]:
        """Return the bid of each strike after all that was sent."""
        return {
            100.0 + contract: float(number)
            for number in range(self.sent)
            for contract in changed(number)
        }

    def rows(self) -> list[tuple[datetime, float, float]]:
        """Return what the database must hold."""
        return [
            (START + timedelta(seconds=number), 100.0 + contract, float(number))
            for number in range(self.sent)
            for contract in changed(number)
        ]


class Reader:
    """Follows the chain, and applies what comes to what it has."""

    def __init__(self, follower: Follower[pb.SubscribeOptionChainResponse]) -> None:
        self._follower = follower
        self.bids: dict[float, float] = {}
        self.time = START.replace(tzinfo=None)
        self.responses = 0

    async def run(self) -> None:
        async for response in self._follower:
            for chain in response.chains:
                self.responses += 1
                bids = {row.strike: row.bid for row in chain.contracts}
                self.bids = {**self.bids, **bids} if chain.partial else bids
                # It never goes back, to an older chain or an older row.
                assert chain.time.ToDatetime() >= self.time
                self.time = chain.time.ToDatetime()


async def stored(dsn: str) -> list[tuple[datetime, float, float]]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT time, strike, bid FROM options_chains ORDER BY time, strike"
        )
    finally:
        await connection.close()
    return [tuple(row) for row in rows]


async def test_a_chain_loses_nothing_when_its_server_is_killed_and_when_it_stops(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("quantplane.batches.TRIES", 100)  # on a slow machine
    request = pb.SubscribeOptionChainRequest(
        underlyings=[UNDERLYING], heartbeat_interval=HEARTBEAT
    )
    async with desk.server() as server, Client(server.target) as client:
        follower = client.follow(client.options.SubscribeOptionChain, request)
        reader, publisher = Reader(follower), Publisher(client)
        reading = asyncio.create_task(reader.run())
        async with publisher.running():
            for lives, end in enumerate((server.kill, server.stop), 1):
                before = reader.responses
                await until(lambda b=before: reader.responses > b + 20, "it changes")
                await desk.pause(0, 0.3)
                await end()
                await server.start()
                await until(lambda n=lives: follower.reconnects >= n, "a reconnect")
        await until(lambda: reader.bids == publisher.latest(), "the latest chain")
        assert not reading.done()
        assert follower.gaps == 0
        await follower.aclose()
        await reading
    assert await stored(desk.dsn) == publisher.rows()
