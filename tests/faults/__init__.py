"""Helpers: a desk whose parts are real processes, a feed that numbers its quotes.

The number of a quote is its bid, and everything else of it follows from the number.
So whatever was killed, what a reader or the database holds can be compared with what
was published, quote by quote.
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from quantplane import Client
from quantplane import v1 as pb
from quantplane.follow import Follower
from quantplane.publish import QuotePublisher
from quantplane_server.processes import READY
from tests.faults.backends import Service

REPOSITORY = Path(__file__).parents[2]
SYMBOLS = tuple(f"FX{n:02}" for n in range(24))  # over most of the shards
EPOCH_US = 1_700_000_000_000_000  # the time of quote 0
RATE = 5_000  # quotes a second
TICK_S = 0.01
PATIENCE_S = 60.0  # for what takes a second on a machine that has nothing else to do
MIB = 1 << 20

Numbers = dict[str, list[int]]  # by symbol, in the order they came


def quote(number: int, symbols: tuple[str, ...] = SYMBOLS) -> pb.Quote:
    made = pb.Quote(symbol=symbols[number % len(symbols)], bid=number, ask=number + 0.5)
    made.time.FromMicroseconds(EPOCH_US + number)
    return made


def numbers_through(last: int, symbols: tuple[str, ...] = SYMBOLS) -> Numbers:
    """Return what a reader of everything has after quotes 1 to `last`."""
    numbers: Numbers = defaultdict(list)
    for number in range(1, last + 1):
        numbers[symbols[number % len(symbols)]].append(number)
    return dict(numbers)


def difference(found: Numbers, expected: Numbers) -> list[str]:
    """Describe what is missing, doubled or out of order; nothing if all is well."""
    problems = []
    for symbol in sorted(found.keys() | expected.keys()):
        had, wanted = found.get(symbol, []), expected.get(symbol, [])
        if had == wanted:
            continue
        missing = sorted(set(wanted) - set(had))
        strange = sorted(set(had) - set(wanted))
        doubled = len(had) - len(set(had))
        problems.append(
            f"{symbol}: {len(missing)} missing {missing[:5]}, {doubled} doubled, "
            f"{len(strange)} never published {strange[:5]}, "
            f"in order: {had == sorted(had)}"
        )
    return problems


async def until(reached: Any, what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until `reached()` is true, and fail with `what` if it never is."""
    deadline = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < deadline, f"not within {patience_s} s: {what}"
        await asyncio.sleep(TICK_S)


# --- The feed -------------------------------------------------------------------------


class Feed:
    """Publishes quotes 1, 2, 3, ..."""

    def __init__(
        self, publisher: QuotePublisher, symbols: tuple[str, ...] = SYMBOLS
    ) -> None:
        self.publisher = publisher
        self.symbols = symbols
        self.sent = 0  # quotes
        self.last_of_batch: dict[int, int] = {0: 0}

    @property
    def accepted(self) -> int:
        """The last quote that is known to be on the bus."""
        return self.last_of_batch[self.publisher.accepted_through]

    async def send(self, count: int, batch: int = 1_000) -> None:
        last = self.sent + count
        while self.sent < last:
            following = range(self.sent + 1, min(self.sent + batch, last) + 1)
            quotes = [quote(number, self.symbols) for number in following]
            number = await self.publisher.send(quotes)
            self.last_of_batch[number] = self.sent = following[-1]

    @asynccontextmanager
    async def running(self, rate: int = RATE) -> AsyncIterator[None]:
        """Send `rate` quotes a second while the block runs, then those on their way."""
        stopped = asyncio.Event()
        task = asyncio.create_task(self._run(rate, stopped))
        try:
            yield
        finally:
            stopped.set()
            async with asyncio.timeout(PATIENCE_S):
                await task

    async def _run(self, rate: int, stopped: asyncio.Event) -> None:
        first, began = self.sent, time.monotonic()
        while not stopped.is_set():
            due = first + int((time.monotonic() - began) * rate) - self.sent
            await self.send(due)
            await asyncio.sleep(TICK_S)

    async def all_accepted(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.publisher.flush()

    async def all_durable(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.publisher.durable()


# --- The readers ----------------------------------------------------------------------


class Reader:
    """Reads a followed stream as fast as it comes, and keeps the numbers it reads."""

    def __init__(self, follower: Follower[Any], pause_s: float = 0.0) -> None:
        self.follower = follower
        self.numbers: Numbers = defaultdict(list)
        self.count = 0
        self.conflated = 0
        self.gaps: list[pb.Gap] = []
        self.subscribed = asyncio.Event()
        self._pause_s = pause_s
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Reader":
        """Return once the subscription is in force."""
        self._task = asyncio.create_task(self._run())
        subscribed = asyncio.create_task(self.subscribed.wait())
        await asyncio.wait(
            (self._task, subscribed), timeout=PATIENCE_S, return_when="FIRST_COMPLETED"
        )
        subscribed.cancel()
        if self._task.done():
            self._task.result()
        assert self.subscribed.is_set(), "no Subscribed came"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.follower.aclose()
        assert self._task
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        async for response in self.follower:
            self.take(response)
            if self._pause_s:
                await asyncio.sleep(self._pause_s)

    def take(self, response: Any) -> None:
        for read in response.quotes:
            self.numbers[read.symbol].append(int(read.bid))
        self.count += len(response.quotes)
        self.conflated += response.conflated_count
        match response.event.WhichOneof("event"):
            case "subscribed":
                self.subscribed.set()
            case "gap":
                self.gaps.append(response.event.gap)

    async def has_all(self, feed: Feed) -> None:
        """Wait for as many quotes as were published; fail unless it is exactly them."""
        task = self._task
        assert task
        with suppress(AssertionError):  # the difference below says more
            await until(lambda: self.count >= feed.sent or task.done(), "all quotes")
        if task.done():
            task.result()
        expected = numbers_through(feed.sent, feed.symbols)
        problems = difference(self.numbers, expected)
        assert not problems, problems
        assert not self.gaps, self.gaps


def stream(
    client: Client,
    delivery: "pb.Delivery.ValueType" = pb.DELIVERY_LOSSLESS,
    symbols: Iterable[str] = SYMBOLS,
    **fields: Any,
) -> Follower[pb.StreamQuotesResponse]:
    request = pb.StreamQuotesRequest(symbols=symbols, delivery=delivery, **fields)
    return client.follow(client.market_data.StreamQuotes, request)


def subscribe(
    client: Client,
    delivery: "pb.Delivery.ValueType" = pb.DELIVERY_LOSSLESS,
    symbols: Iterable[str] = SYMBOLS,
    **fields: Any,
) -> Follower[pb.SubscribeQuotesResponse]:
    request = pb.SubscribeQuotesRequest(symbols=symbols, delivery=delivery, **fields)
    return client.follow(client.market_data.SubscribeQuotes, request)


# --- The processes --------------------------------------------------------------------


class Server:
    """`quantplane-server serve` as a process; kept at one port over its lives."""

    def __init__(self, dsn: str, redis_url: str, settings: dict[str, object]) -> None:
        self.target = f"127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "QUANTPLANE_POSTGRES_DSN": dsn,
            "QUANTPLANE_REDIS_URL": redis_url,
            "QUANTPLANE_LISTEN": self.target,
            "QUANTPLANE_GRACE_S": "3",
            **{f"QUANTPLANE_{k.upper()}": str(v) for k, v in settings.items()},
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._recorders: set[psutil.Process] = set()

    @property
    def process(self) -> psutil.Process:
        assert self._process
        return psutil.Process(self._process.pid)

    @property
    def recorder(self) -> psutil.Process | None:
        """The child process that records, unless it is just being replaced."""
        children = [child for child in self.process.children() if _runs(child)]
        self._recorders.update(children)
        return children[0] if children else None

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)

    async def start(self) -> None:
        """Return when it serves; its log goes to where the test's output goes."""
        command = [sys.executable, "-m", "quantplane_server", "serve"]
        self._process = process = subprocess.Popen(
            command, env=self._environment, cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        assert process.stdout
        async with asyncio.timeout(PATIENCE_S):
            line = await asyncio.to_thread(process.stdout.readline)
        assert line.decode() == f"{READY}{self.target}\n"
        assert self.recorder

    async def kill(self) -> None:
        """Send SIGKILL. Its recorder goes a moment later, as it would anywhere."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        return await self._end(signal.SIGTERM)

    @asynccontextmanager
    async def growth_below(self, limit: int) -> AsyncIterator[None]:
        """Fail if the memory ever grows by more than `limit` while the block runs."""
        before = most = self.memory

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, self.memory)
                await asyncio.sleep(TICK_S)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
        print(f"memory: {before / MIB:.1f} MiB, at most {most / MIB:.1f} MiB")
        assert most - before < limit, f"grew by {(most - before) / MIB:.1f} MiB"

    def kill_recorder(self) -> None:
        if recorder := self.recorder:
            with suppress(psutil.NoSuchProcess):
                recorder.kill()

    @contextmanager
    def without_recorder(self) -> Iterator[None]:
        """Record nothing in the block, nor after it what was read in the block."""
        recorder = self.recorder
        assert recorder
        recorder.suspend()
        try:
            yield
        finally:
            recorder.kill()

    async def close(self) -> None:
        """Kill it, and wait for what it leaves behind."""
        await self._end(signal.SIGKILL)
        try:
            await until(
                lambda: not any(map(_runs, self._recorders)),
                "the recorder ends with its server",
            )
        finally:
            for recorder in filter(_runs, self._recorders):
                recorder.kill()

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:
            with suppress(psutil.NoSuchProcess):
                self._recorders.update(psutil.Process(process.pid).children())
            process.send_signal(number)
            return await asyncio.to_thread(process.wait, PATIENCE_S)


@dataclass
class Desk:
    """PostgreSQL and Valkey, an empty database and an empty bus."""

    postgres: Service
    valkey: Service
    dsn: str
    rng: random.Random = field(repr=False)

    @asynccontextmanager
    async def server(self, **settings: object) -> AsyncIterator[Server]:
        server = Server(self.dsn, self.valkey.address, settings)
        try:
            await server.start()
            yield server
        finally:
            await server.close()

    async def pause(self, shortest_s: float = 0.2, longest_s: float = 1.0) -> None:
        """Wait for a random moment."""
        await asyncio.sleep(self.rng.uniform(shortest_s, longest_s))

    async def restart(self, service: Service) -> None:
        """Kill a service, and start it again a moment later."""
        await service.kill()
        await self.pause(0, 0.5)
        await service.start()

    async def recorded(self) -> list[tuple[Any, ...]]:
        """Return every row of market_data."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows = await connection.fetch(
                "SELECT symbol, time, open, high, low, close, bid, ask"
                "  FROM market_data ORDER BY bid"
            )
        finally:
            await connection.close()
        return [tuple(row) for row in rows]

    async def has_recorded(self, feed: Feed) -> None:
        """Fail unless the database has exactly what was published."""
        found = await self.recorded()
        expected = [_row(n, feed.symbols) for n in range(1, feed.sent + 1)]
        if found != expected:
            had, wanted = {row[6] for row in found}, {row[6] for row in expected}
            missing, strange = sorted(wanted - had), sorted(had - wanted)
            raise AssertionError(
                f"{len(found)} rows for {len(expected)} quotes: {len(missing)} missing "
                f"{missing[:5]}, {len(strange)} never published {strange[:5]}"
            )


def _row(number: int, symbols: tuple[str, ...]) -> tuple[Any, ...]:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=EPOCH_US + number)
    price = number + 0.25  # the middle: the feed has no trades
    symbol = symbols[number % len(symbols)]
    return symbol, at, price, price, price, price, float(number), number + 0.5


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """Return a port that no one gets by chance while its server is down."""
    while True:
        port = random.randrange(12_000, 32_000)  # below those that systems give away
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
