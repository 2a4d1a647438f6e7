"""Log streams: the seam between snapshot and events, and every way to come back.

The stream is of counters: each event is the next number of one of them, and the
snapshot tells how far each has come.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest

from quantplane import Client, metadata_of, reason_of
from quantplane import v1 as pb
from quantplane_server import log as logs
from quantplane_server.db import Connection
from quantplane_server.errors import Compacted, InvalidResumeToken
from quantplane_server.log import Entry, Event, append
from quantplane_server.log_stream import LogStream
from quantplane_server.rpc.errors import errors_to_status
from quantplane_server.rpc.interceptor import Interceptor
from quantplane_server.tasks import end
from quantplane_server.tokens import Tokens
from tests.logs import Process, forget, process, set_back
from tests.market_data import kind, until

TOKENS = Tokens(b"key")
COUNTERS = "ABC"


class CounterStream(LogStream):
    log = "signals"
    response = pb.WatchSignalsResponse

    def __init__(self, process: Process, request: pb.WatchSignalsRequest) -> None:
        super().__init__(process.db, process.logs, TOKENS, request)
        self._wanted = set(request.filter.symbols or COUNTERS)

    async def snapshot(self, conn: Connection) -> Sequence[pb.WatchSignalsResponse]:
        rows = await conn.fetch("SELECT name, number FROM counters ORDER BY name")
        signals = [counter(*row) for row in rows if row["name"] in self._wanted]
        return [pb.WatchSignalsResponse(signals=signals)]

    def data(self, entries: Sequence[Entry]) -> bytes:
        events = [entry.message for entry in entries]
        wanted = [event for event in events if event.signal.symbol in self._wanted]
        if not wanted:
            return b""
        return pb.WatchSignalsResponse(events=wanted).SerializeToString()


def counter(name: str, number: int) -> pb.Signal:
    return pb.Signal(symbol=name, strength=number)


async def count(process: Process, name: str, times: int = 1, told: bool = True) -> None:
    """Move a counter on, and append an event for each number."""
    async with process.db.transaction() as conn:
        last = await conn.fetchval(
            "UPDATE counters SET number = number + $2 WHERE name = $1 RETURNING number",
            name,
            times,
        )
        numbers = range(last - times + 1, last + 1)
        signals = [counter(name, number) for number in numbers]
        payloads = [pb.SignalEvent(signal=s).SerializeToString() for s in signals]
        events = [Event("counted", name, payload) for payload in payloads]
        first = await append(conn, "signals", events)
    if told:
        process.logs.committed("signals", first, events)


def stream(
    process: Process, token: bytes = b"", names: str = "", heartbeat_s: float = 60
) -> CounterStream:
    request = pb.WatchSignalsRequest(resume_token=token)
    if names:
        request.filter.symbols.extend(names)
    request.heartbeat_interval.FromNanoseconds(int(heartbeat_s * 1e9))
    return CounterStream(process, request)


async def responses(stream: CounterStream) -> AsyncIterator[pb.WatchSignalsResponse]:
    async with aclosing(stream.messages()) as messages:
        async for message in messages:
            yield pb.WatchSignalsResponse.FromString(message)


class Counted:
    """What a reader knows of the counters. Fails on a hole or a double."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.revisions: list[int] = []

    def take(self, response: pb.WatchSignalsResponse) -> None:
        self.numbers |= {s.symbol: int(s.strength) for s in response.signals}
        for event in response.events:
            name = event.signal.symbol
            assert event.signal.strength == self.numbers[name] + 1
            self.numbers[name] += 1
            self.revisions.append(event.revision)

    async def read(
        self, responses: AsyncIterator[pb.WatchSignalsResponse], last: int
    ) -> None:
        """Read on through a revision."""
        while not self.revisions or self.revisions[-1] < last:
            self.take(await anext(responses))


@pytest.fixture
async def here(dsn: str, redis_url: str) -> AsyncIterator[Process]:
    async with process(dsn, redis_url) as made:
        async with made.db.transaction() as conn:
            await conn.execute("CREATE TABLE counters (name TEXT, number BIGINT)")
            names = list(COUNTERS)
            await conn.execute(
                "INSERT INTO counters SELECT unnest($1::text[]), 0", names
            )
        yield made


@asynccontextmanager
async def counting(*processes: Process) -> AsyncIterator[None]:
    """Count all the time, in several tasks of each process."""

    async def work(process: Process, name: str) -> None:
        times = 0
        while True:
            times = times % 3 + 1
            await count(process, name, times)

    tasks = [
        asyncio.create_task(work(process, name))
        for process in processes
        for name in COUNTERS
    ]
    try:
        yield
    finally:
        await end(*tasks)


async def last_revision(process: Process) -> int:
    async with process.db.connection() as conn:
        return (await logs.head(conn, "signals")).revision


# --- The seam -----------------------------------------------------------------------


async def test_events_go_on_exactly_where_the_snapshot_ends(
    here: Process, dsn: str, redis_url: str
):
    async with process(dsn, redis_url) as there, counting(here, there):
        for n in range(10):
            counted = Counted()
            async with aclosing(responses(stream((here, there)[n % 2]))) as reading:
                counted.take(await until(reading, "data"))
                assert counted.numbers.keys() == set(COUNTERS)
                through = await last_revision(here)
                await counted.read(reading, through + 50)
            first, *_, last = counted.revisions
            assert counted.revisions == list(range(first, last + 1))


async def test_a_new_stream_says_what_is_then_that_this_is_all(here: Process):
    await count(here, "A", 7)
    async with aclosing(responses(stream(here, names="AB"))) as reading:
        assert kind(await anext(reading)) == "subscribed"
        assert list((await anext(reading)).signals) == [
            counter("A", 7),
            counter("B", 0),
        ]
        complete = await anext(reading)
        assert kind(complete) == "snapshot_complete"
        assert complete.resume_token
        await count(here, "C")
        await count(here, "B")
        (event,) = (await anext(reading)).events
        assert (event.revision, event.signal) == (9, counter("B", 1))


# --- Coming back ----------------------------------------------------------------------


async def test_every_token_goes_on_with_exactly_the_rest(
    here: Process, monkeypatch: pytest.MonkeyPatch
):
    """Be it of the end of the snapshot, of data, a heartbeat or the goodbye."""
    monkeypatch.setattr(logs, "KEPT", 20)  # some come back to the table
    monkeypatch.setattr(logs, "PAGE", 7)
    tokens: list[tuple[str, bytes, int]] = []
    read: list[int] = []
    watch = stream(here, names="AB", heartbeat_s=0.01)
    async with aclosing(responses(watch)) as reading:
        async for response in reading:
            read += [event.revision for event in response.events]
            if response.resume_token:
                tokens.append((kind(response), response.resume_token, len(read)))
            if (
                kind(response) in ("snapshot_complete", "heartbeat")
                and len(tokens) < 60
            ):
                for name in COUNTERS:
                    await count(here, name, 3)
            elif kind(response) == "heartbeat":
                watch.drain()
    kinds = {kind for kind, _, _ in tokens}
    assert kinds == {"snapshot_complete", "data", "heartbeat", "goodbye"}
    await count(here, "A")
    end = await last_revision(here)
    for _, token, known in tokens:
        rest: list[int] = []
        async with aclosing(responses(stream(here, token, "AB"))) as reading:
            assert kind(await anext(reading)) == "subscribed"
            assert kind(await anext(reading)) == "snapshot_complete"
            while not rest or rest[-1] < end:
                rest += [event.revision for event in (await anext(reading)).events]
        assert read[:known] + rest == [*read, end]


async def test_a_token_can_be_used_at_another_process(
    here: Process, dsn: str, redis_url: str
):
    async with aclosing(responses(stream(here))) as reading:
        token = (await until(reading, "snapshot_complete")).resume_token
    await count(here, "A", 5)
    async with process(dsn, redis_url) as there:
        async with aclosing(responses(stream(there, token))) as reading:
            events = (await until(reading, "data")).events
    assert [event.revision for event in events] == [1, 2, 3, 4, 5]


async def token_of(process: Process, names: str = "") -> bytes:
    async with aclosing(responses(stream(process, names=names))) as reading:
        return (await until(reading, "snapshot_complete")).resume_token


async def test_a_token_of_another_filter_or_a_damaged_one_is_refused(here: Process):
    token = await token_of(here, "AB")
    altered = [token[:-1] + bytes((token[-1] ^ 1,)), token[1:], b"x", token + b"x"]
    for bad, names in [(token, "A"), (token, ""), *((bad, "AB") for bad in altered)]:
        with pytest.raises(InvalidResumeToken):
            await anext(stream(here, bad, names).messages())


async def test_a_token_from_before_what_is_kept_is_refused(here: Process):
    await count(here, "A", 10)
    token = await token_of(here)
    await count(here, "A", 20)
    await forget(here.db, before=15)
    with pytest.raises(Compacted) as compacted:
        await anext(stream(here, token).messages())
    assert compacted.value.metadata == {"cause": "COMPACTED", "oldest": "15"}


async def test_a_token_of_a_history_that_was_undone_is_refused(here: Process):
    """Whether or not its number was given again."""
    for others in 0, 5, 10, 15:
        await set_back(here.db, 0)
        await count(here, "A", 20)
        token = await token_of(here)
        await set_back(here.db, 10)
        if others:
            await count(here, "B", others, told=False)
        with pytest.raises(Compacted) as compacted:
            await anext(stream(here, token).messages())
        assert compacted.value.metadata["cause"] == "LOG_RESTORED"


async def test_a_token_from_before_what_was_undone_goes_on(here: Process):
    await count(here, "A", 10)
    token = await token_of(here)
    await count(here, "A", 10)
    await set_back(here.db, 10)
    await count(here, "B", 2, told=False)
    async with aclosing(responses(stream(here, token))) as reading:
        events = (await until(reading, "data")).events
    assert [event.signal.symbol for event in events] == ["B", "B"]


# --- While it lasts -------------------------------------------------------------------


async def test_heartbeats_come_while_nothing_happens(here: Process):
    async with aclosing(responses(stream(here, heartbeat_s=0.01))) as reading:
        complete = await until(reading, "snapshot_complete")
        for _ in range(3):
            beat = await anext(reading)
            assert kind(beat) == "heartbeat"
            assert beat.event.heartbeat.HasField("server_time")
            assert beat.resume_token == complete.resume_token


async def test_a_long_way_without_anything_wanted_beats_and_is_not_gone_twice(
    here: Process, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "PAGE", 5)
    token = await token_of(here, "A")
    await count(here, "B", 500, told=False)
    await count(here, "A", told=False)
    tokens = []
    watch = stream(here, token, "A", heartbeat_s=1e-6)
    async with aclosing(responses(watch)) as reading:
        async for response in reading:
            if response.events:
                break
            if kind(response) == "heartbeat":
                tokens.append(response.resume_token)
    assert len(set(tokens)) == len(tokens) == 100
    await forget(here.db, before=495)  # the last token needs no more than this
    async with aclosing(responses(stream(here, tokens[-1], "A"))) as reading:
        (event,) = (await until(reading, "data")).events
        assert event.revision == 501


async def test_a_reader_that_stalls_is_told_when_what_is_next_is_gone(
    here: Process, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "KEPT", 5)
    async with aclosing(responses(stream(here))) as reading:
        await until(reading, "snapshot_complete")
        await count(here, "A", 20)
        await forget(here.db, before=15)
        with pytest.raises(Compacted) as compacted:
            await anext(reading)
    assert compacted.value.metadata == {"cause": "COMPACTED", "oldest": "15"}


async def test_a_stream_that_is_drained_early_ends_with_a_token(here: Process):
    watch = stream(here)
    watch.drain()
    async with aclosing(responses(watch)) as reading:
        found = [response async for response in reading]
    assert [kind(response) for response in found] == [
        *("subscribed", "data", "snapshot_complete", "goodbye")
    ]
    assert found[-1].resume_token == found[-2].resume_token


# --- Over the wire --------------------------------------------------------------------


class Counters(pb.SignalServiceServicer):
    def __init__(self, process: Process) -> None:
        self._process = process
        self.streams: list[CounterStream] = []

    async def WatchSignals(
        self, request: pb.WatchSignalsRequest, context: object
    ) -> AsyncIterator[bytes]:
        watch = CounterStream(self._process, request)
        self.streams.append(watch)
        async with aclosing(watch.messages()) as messages:
            async for message in messages:
                yield message


@asynccontextmanager
async def serving(process: Process) -> AsyncIterator[tuple[Counters, Client]]:
    server = grpc.aio.server(interceptors=[Interceptor(errors_to_status(unknown))])
    service: Any = Counters(process)
    pb.add_SignalServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(f"127.0.0.1:{port}") as client:
            yield service, client
    finally:
        await server.stop(0)


def unknown(error: Exception) -> None:
    return None


async def test_a_follower_goes_on_after_a_goodbye(here: Process):
    async with serving(here) as (service, client):
        counted = Counted()
        request = pb.WatchSignalsRequest()
        async with client.follow(client.signal.WatchSignals, request) as follower:
            counted.take(await until(follower, "data"))
            for n in range(3):
                await count(here, "A", 5)
                await counted.read(follower, 10 * n + 5)
                service.streams[-1].drain()
                await count(here, "A", 5)
                await counted.read(follower, 10 * n + 10)
            assert follower.reconnects >= 2
            assert follower.gaps == 0
        assert counted.revisions == list(range(1, 31))


async def test_a_follower_of_what_is_gone_gets_a_gap_and_all_anew(here: Process):
    async with serving(here) as (_, client):
        token = await token_of(here)
        await count(here, "A", 20)
        await forget(here.db, before=15)
        request = pb.WatchSignalsRequest(resume_token=token)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(client.signal.WatchSignals(request)))
        assert reason_of(refused.value) == "COMPACTED"
        assert metadata_of(refused.value) == {"cause": "COMPACTED", "oldest": "15"}
        async with client.follow(client.signal.WatchSignals, request) as follower:
            gap = await anext(follower)
            assert gap.event.gap.cause == pb.GAP_CAUSE_COMPACTED
            assert kind(await anext(follower)) == "subscribed"
            counted = Counted()
            counted.take(await anext(follower))
            assert counted.numbers == {"A": 20, "B": 0, "C": 0}
            await until(follower, "snapshot_complete")
            await count(here, "A")
            await counted.read(follower, 21)
