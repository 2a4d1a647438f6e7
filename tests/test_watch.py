"""Streams of state: what holds for each of them, whatever the state is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import grpc
import pytest
import redis.asyncio as redis
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane_server import watch
from quantplane_server.bus import Bus
from quantplane_server.config import Settings
from quantplane_server.errors import InvalidResumeToken
from quantplane_server.main import serving
from quantplane_server.models import queries
from quantplane_server.tasks import end
from quantplane_server.tokens import Tokens
from quantplane_server.watch import Part, State, Watches, WatchStream
from tests.market_data import kind, until
from tests.models import HESTON, heston

TOKENS = Tokens(b"key")


class Shelf:
    """A state: numbers by key. It stands for what a slice has in the database."""

    def __init__(self, name: str, **numbers: int) -> None:
        self.name = name
        self.numbers = numbers
        self.reads = self.given_up = 0
        self.error: Exception | None = None
        self.answers = asyncio.Event()  # unless it is set, reads hang
        self.answers.set()

    async def read(self) -> State:
        self.reads += 1
        numbers = dict(self.numbers)
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error:
            raise self.error
        return {key: pb.OuParameters(pair_id=key, mu=n) for key, n in numbers.items()}


class ShelfStream(WatchStream):
    """A stream of shelves, each a part of it."""

    def statuses(self, states: Sequence[State]) -> list[pb.KeyStatus]:
        return [pb.KeyStatus(key=str(key)) for state in states for key in state]

    def data(self, state: State, changed: State, whole: bool) -> Any:
        rows: Any = changed.values()
        return pb.WatchModelsResponse(ou=rows)

    def event(self, event: pb.StreamEvent) -> Any:
        return pb.WatchModelsResponse(event=event)


class Process:
    """What a server has for its streams of state."""

    def __init__(self, redis_url: str) -> None:
        self.bus = Bus(redis_url, cap_bytes=1)
        self.watches = Watches(self.bus)

    def stream(
        self,
        *shelves: Shelf,
        heartbeat_s: int = 60,
        token: bytes = b"",
        refresh_s: float | None = None,
        rest_s: float = 0,
    ) -> ShelfStream:
        names = [shelf.name for shelf in shelves]
        request = pb.WatchModelsRequest(ou_pair_ids=names, resume_token=token)
        request.heartbeat_interval.FromSeconds(heartbeat_s)
        parts = [
            Part(shelf.name, [shelf.name], shelf.read, refresh_s, rest_s)
            for shelf in shelves
        ]
        return ShelfStream(self.watches, TOKENS, request, parts)

    async def change(self, shelf: Shelf, **numbers: int) -> None:
        """Change some numbers, and announce it."""
        shelf.numbers |= numbers
        await self.watches.announce([shelf.name])

    async def caught_up(self) -> None:
        """Wait until everything that was announced has been heard."""
        probe = Shelf("probe")
        messages, _ = await joined(self.stream(probe))
        await self.change(probe, heard=1)
        await anext(messages)
        await messages.aclose()


@asynccontextmanager
async def running(redis_url: str) -> AsyncIterator[Process]:
    process = Process(redis_url)
    task = asyncio.create_task(process.watches.run())
    try:
        yield process
    finally:
        await end(task)
        await process.bus.close()


@pytest.fixture
async def process(redis_url: str) -> AsyncIterator[Process]:
    async with running(redis_url) as process:
        await process.caught_up()
        yield process


@pytest.fixture
def no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave it to announcements that states are read."""
    monkeypatch.setattr(watch, "REFRESH_S", 3600.0)


Numbers = dict[str, int]


def numbers(response: Any) -> Numbers:
    return {row.pair_id: int(row.mu) for row in response.ou}


async def joined(stream: WatchStream) -> tuple[Any, Numbers | None]:
    """Return a stream's messages after the snapshot, and the snapshot if one came."""
    messages = stream.messages()
    assert kind(await anext(messages)) == "subscribed"
    snapshot = None
    while kind(response := await anext(messages)) == "data":
        snapshot = (snapshot or {}) | numbers(response)
    assert kind(response) == "snapshot_complete"
    return messages, snapshot


def drained(stream: WatchStream) -> Any:
    """Return the messages of a stream that is told to end at once."""
    stream.drain()
    return stream.messages()


async def change_to(messages: Any, wanted: Numbers) -> list[Numbers]:
    """Return the changes up to and with one to `wanted`."""
    changes: list[Numbers] = []
    while not changes or changes[-1] != wanted:
        changes.append(numbers(await until(messages, "data")))
    return changes


# --- Snapshot and changes -----------------------------------------------------------


async def test_a_reader_gets_a_snapshot_then_only_what_changes(process: Process):
    shelf = Shelf("s", a=1, b=1)
    messages, snapshot = await joined(process.stream(shelf))
    assert snapshot == {"a": 1, "b": 1}
    await process.change(shelf, b=2, c=1)
    assert numbers(await anext(messages)) == {"b": 2, "c": 1}


async def test_a_state_of_nothing_has_no_snapshot(process: Process):
    shelf = Shelf("s")
    messages, snapshot = await joined(process.stream(shelf))
    assert snapshot is None
    await process.change(shelf, a=1)
    assert numbers(await anext(messages)) == {"a": 1}


async def test_a_state_from_which_rows_are_gone_is_sent_whole(process: Process):
    shelf = Shelf("s", a=1, b=1, c=1)
    messages, _ = await joined(process.stream(shelf))
    del shelf.numbers["b"]
    await process.change(shelf)
    assert numbers(await anext(messages)) == {"a": 1, "c": 1}


async def test_parts_change_by_themselves(process: Process):
    one, two = Shelf("1", a=1), Shelf("2", b=1)
    messages, snapshot = await joined(process.stream(one, two))
    assert snapshot == {"a": 1, "b": 1}
    await process.change(two, b=2)
    assert numbers(await anext(messages)) == {"b": 2}
    await process.change(one, a=3)
    assert numbers(await anext(messages)) == {"a": 3}


async def test_a_change_announced_by_another_process_arrives(
    process: Process, redis_url: str
):
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf))
    async with running(redis_url) as other:
        await other.change(shelf, a=1)
        assert numbers(await anext(messages)) == {"a": 1}


@pytest.mark.usefixtures("no_refresh")
async def test_what_was_announced_during_a_read_is_read_again(process: Process):
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf))
    shelf.answers.clear()
    await process.change(shelf, a=1)
    await process.caught_up()
    await process.change(shelf, a=2)  # what the read has already seen past
    await process.caught_up()
    shelf.answers.set()
    assert await change_to(messages, {"a": 2})


async def test_a_change_that_nobody_announced_is_found(
    process: Process, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "REFRESH_S", 0.05)
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf))
    shelf.numbers["a"] = 1
    assert numbers(await anext(messages)) == {"a": 1}


@pytest.mark.usefixtures("no_refresh")
async def test_a_state_may_choose_how_often_it_is_read_anyway(process: Process):
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf, refresh_s=0.05))
    shelf.numbers["a"] = 1
    assert numbers(await anext(messages)) == {"a": 1}


async def test_a_state_rests_between_reads(process: Process):
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf, refresh_s=3600, rest_s=3600))
    for number in range(3):
        await process.change(shelf, a=number)
        await process.caught_up()
    assert shelf.reads == 1
    await messages.aclose()


async def test_what_was_announced_while_a_state_rested_is_read_after_it(
    process: Process,
):
    shelf = Shelf("s")
    messages, _ = await joined(process.stream(shelf, refresh_s=3600, rest_s=0.1))
    await process.change(shelf, a=1)
    assert numbers(await anext(messages)) == {"a": 1}


@pytest.mark.usefixtures("no_refresh")
async def test_a_snapshot_is_not_older_than_its_request(process: Process):
    shelf = Shelf("s", a=1)
    await joined(process.stream(shelf))
    first, _ = await joined(process.stream(shelf))  # so that the state is shared
    shelf.numbers["a"] = 2
    second, snapshot = await joined(process.stream(shelf))
    assert snapshot == {"a": 2}
    assert numbers(await anext(first)) == {"a": 2}
    await second.aclose()


# --- Many readers -------------------------------------------------------------------


@pytest.mark.usefixtures("no_refresh")
async def test_a_change_is_read_once_for_all_its_readers(process: Process):
    shelf = Shelf("s", a=1)
    readers = [(await joined(process.stream(shelf)))[0] for _ in range(50)]
    before = shelf.reads
    await process.change(shelf, a=2)
    for messages in readers:
        assert numbers(await anext(messages)) == {"a": 2}
    assert shelf.reads == before + 1


@pytest.mark.usefixtures("no_refresh")
async def test_readers_that_come_together_share_a_read(process: Process):
    shelf = Shelf("s", a=1)
    streams = [process.stream(shelf) for _ in range(50)]
    snapshots = await asyncio.gather(*(joined(stream) for stream in streams))
    assert [snapshot for _, snapshot in snapshots] == [{"a": 1}] * 50
    assert shelf.reads == 1


@pytest.mark.usefixtures("no_refresh")
async def test_a_slow_reader_holds_up_nobody_and_skips_states_but_not_the_latest(
    process: Process,
):
    shelf = Shelf("s", a=0, b=0)
    slow, _ = await joined(process.stream(shelf))
    quick, _ = await joined(process.stream(shelf))
    await process.change(shelf, b=7)
    assert numbers(await anext(quick)) == {"b": 7}
    for number in range(1, 10):
        await process.change(shelf, a=number)
        assert numbers(await anext(quick)) == {"a": number}
    assert numbers(await anext(slow)) == {"a": 9, "b": 7}


@pytest.mark.usefixtures("no_refresh")
async def test_a_state_that_came_back_is_not_sent(process: Process):
    shelf = Shelf("s", a=1)
    slow, _ = await joined(process.stream(shelf))
    for change in ({"a": 2}, {"a": 1}):
        await process.change(shelf, **change)
        await process.caught_up()
    following = asyncio.create_task(anext(slow))
    await process.caught_up()
    await process.change(shelf, b=1)
    assert numbers(await following) == {"b": 1}


@pytest.mark.usefixtures("no_refresh")
async def test_a_state_without_readers_is_no_longer_read(process: Process):
    shelf, other = Shelf("s"), Shelf("other")
    messages, _ = await joined(process.stream(shelf))
    following, _ = await joined(process.stream(other))
    shelf.answers.clear()
    await process.change(shelf, a=1)
    await process.caught_up()
    await messages.aclose()
    before = shelf.reads
    await process.change(shelf, a=2)
    await process.change(other, a=1)
    await anext(following)
    assert shelf.reads == before
    assert shelf.given_up == 1  # what it was reading


steps = st.lists(
    st.tuples(
        st.sampled_from(["set", "drop", "read"]),
        st.sampled_from("abc"),
        st.integers(0, 3),
    ),
    max_size=25,
)


@pytest.mark.usefixtures("no_refresh")
@examples(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=steps)
async def test_a_reader_always_ends_up_with_the_state(process: Process, steps: Any):
    shelf = Shelf("s", a=0)
    messages, snapshot = await joined(process.stream(shelf))
    held = dict(snapshot or {})

    async def read() -> None:
        change = numbers(await anext(messages))
        if not held.keys() <= set(shelf.numbers):  # rows are gone: it is all there is
            held.clear()
        held.update(change)

    for step, key, number in steps:
        match step:
            case "set":
                shelf.numbers[key] = number
            case "drop":
                shelf.numbers.pop(key, None)
        await process.watches.announce([shelf.name])
        await process.caught_up()
        if step == "read" and held != shelf.numbers:
            await read()
    if held != shelf.numbers:
        await read()
    assert held == shelf.numbers
    await messages.aclose()


# --- Resuming -----------------------------------------------------------------------


async def test_a_reader_that_has_the_state_gets_no_snapshot(process: Process):
    one, two = Shelf("1", a=1), Shelf("2", b=1)
    stream = process.stream(one, two)
    responses = [response async for response in drained(stream)]
    token = responses[-1].resume_token
    messages, snapshot = await joined(process.stream(one, two, token=token))
    assert snapshot is None
    await process.change(one, a=2)
    assert numbers(await anext(messages)) == {"a": 2}


async def test_a_reader_that_missed_a_change_gets_a_snapshot(process: Process):
    one, two = Shelf("1", a=1), Shelf("2", b=1)
    messages, _ = await joined(process.stream(one, two))
    await process.change(one, a=2)
    token = (await anext(messages)).resume_token
    await process.change(two, b=2)
    _, snapshot = await joined(process.stream(one, two, token=token))
    assert snapshot == {"a": 2, "b": 2}


async def test_every_message_after_the_snapshot_has_a_token_to_go_on_from(
    process: Process,
):
    shelf = Shelf("s", a=1)
    stream = process.stream(shelf, heartbeat_s=1)
    messages = stream.messages()
    seen: dict[str, bytes] = {}
    while "heartbeat" not in seen:
        response = await anext(messages)
        seen[kind(response)] = response.resume_token
    stream.drain()
    seen["goodbye"] = (await until(messages, "goodbye")).resume_token
    assert not seen["subscribed"]
    assert not seen["data"]  # for there could be more of the snapshot
    for name in ("snapshot_complete", "heartbeat", "goodbye"):
        _, snapshot = await joined(process.stream(shelf, token=seen[name]))
        assert snapshot is None


async def test_a_token_is_good_for_another_heartbeat_interval(process: Process):
    shelf = Shelf("s", a=1)
    token = [response async for response in drained(process.stream(shelf))][-1]
    stream = process.stream(shelf, heartbeat_s=7, token=token.resume_token)
    assert (await joined(stream))[1] is None


async def test_a_token_of_another_request_or_a_damaged_one_is_refused(
    process: Process,
):
    one, two = Shelf("1", a=1), Shelf("2", a=1)
    token = [response async for response in drained(process.stream(one))][-1]
    for shelf, opened in (
        (two, token.resume_token),
        (one, token.resume_token[:-1]),
        (one, b"nonsense"),
    ):
        with pytest.raises(InvalidResumeToken):
            await joined(process.stream(shelf, token=opened))


# --- Stopping -----------------------------------------------------------------------


async def test_a_stream_ends_with_a_goodbye_after_what_was_on_its_way(
    process: Process,
):
    shelf = Shelf("s", a=1)
    stream = process.stream(shelf)
    messages, _ = await joined(stream)
    waiting = asyncio.create_task(anext(messages))
    await process.caught_up()
    stream.drain()
    goodbye = await waiting
    assert goodbye.event.goodbye.reason == pb.GOODBYE_REASON_DRAINING
    assert [response async for response in messages] == []


async def test_a_stream_that_is_drained_at_once_still_has_its_snapshot(
    process: Process,
):
    responses = [
        response async for response in drained(process.stream(Shelf("s", a=1)))
    ]
    assert [kind(response) for response in responses] == [
        "subscribed",
        "data",
        "snapshot_complete",
        "goodbye",
    ]


# --- Without the database -----------------------------------------------------------


@pytest.mark.usefixtures("no_refresh")
async def test_a_read_that_hangs_holds_up_neither_heartbeats_nor_the_goodbye(
    process: Process,
):
    shelf = Shelf("s", a=1)
    stream = process.stream(shelf, heartbeat_s=1)
    messages, _ = await joined(stream)
    shelf.answers.clear()
    await process.change(shelf, a=2)
    assert kind(await anext(messages)) == "heartbeat"
    stream.drain()
    assert kind(await anext(messages)) == "goodbye"


@pytest.mark.usefixtures("no_refresh")
async def test_a_read_that_hangs_for_long_is_given_up_and_tried_again(
    process: Process, monkeypatch: pytest.MonkeyPatch
):
    shelf = Shelf("s", a=1)
    messages, _ = await joined(process.stream(shelf))
    monkeypatch.setattr(watch, "READ_S", 0.05)
    shelf.answers.clear()
    reads = shelf.reads
    await process.change(shelf, a=2)
    while shelf.reads < reads + 2:
        await asyncio.sleep(0.01)
    shelf.answers.set()
    assert numbers(await anext(messages)) == {"a": 2}


@pytest.mark.usefixtures("no_refresh")
@pytest.mark.parametrize("away", [ConnectionRefusedError, redis.ConnectionError])
async def test_readers_outlast_errors_of_the_backends(
    process: Process, away: type[Exception]
):
    shelf = Shelf("s", a=1)
    readers = [(await joined(process.stream(shelf)))[0] for _ in range(3)]
    shelf.error = away()
    await process.change(shelf, a=2)
    await process.caught_up()
    with pytest.raises(away):
        await joined(process.stream(shelf))
    shelf.error = None
    for messages in readers:
        assert numbers(await anext(messages)) == {"a": 2}


async def test_any_other_error_ends_every_stream_of_the_state(process: Process):
    shelf, other = Shelf("s", a=1), Shelf("other")
    readers = [(await joined(process.stream(shelf)))[0] for _ in range(3)]
    unharmed, _ = await joined(process.stream(other))
    shelf.error = ZeroDivisionError()
    await process.change(shelf)
    for messages in readers:
        with pytest.raises(ZeroDivisionError):
            await anext(messages)
    shelf.error = None
    assert (await joined(process.stream(shelf)))[1] == {"a": 1}
    await process.change(other, a=1)
    assert numbers(await anext(unharmed)) == {"a": 1}


# --- Servers whose backends are cut off ---------------------------------------------


class Relay:
    """A socket in front of a backend's, which can be cut off from it."""

    def __init__(self, path: Path, target: str) -> None:
        self._path = path
        self._target = target
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> "Relay":
        await self.join()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.cut()

    async def join(self) -> None:
        self._server = await asyncio.start_unix_server(self._carry, self._path)

    async def cut(self) -> None:
        self._server.close()
        self._path.unlink(missing_ok=True)
        await end(*self._tasks)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there = await asyncio.open_unix_connection(self._target)
        ways = (reader, there[1]), (there[0], writer)
        tasks = [asyncio.create_task(_pump(*way)) for way in ways]
        self._tasks |= set(tasks)
        await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        writer.close()
        there[1].close()
        await end(*tasks)
        self._tasks -= set(tasks)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


@pytest.fixture
async def database(settings: Settings, tmp_path: Path) -> AsyncIterator[Relay]:
    """What the test's server reaches its database by."""
    parts = urlsplit(settings.postgres_dsn)
    (folder,) = parse_qs(parts.query)["host"]
    settings.postgres_dsn = parts._replace(query=f"host={tmp_path}").geturl()
    socket = ".s.PGSQL.5432"
    async with Relay(tmp_path / socket, f"{folder}/{socket}") as relay:
        yield relay


@pytest.fixture
async def bus(settings: Settings, tmp_path: Path) -> AsyncIterator[Relay]:
    """What the test's server reaches its bus by."""
    path = tmp_path / "bus"
    target = unquote(urlsplit(settings.redis_url).path)
    settings.redis_url = f"unix://{path}"
    async with Relay(path, target) as relay:
        yield relay


def followed(client: Client, **fields: Any) -> Any:
    request = pb.WatchModelsRequest(heston_symbols=["A"], **fields)
    return aiter(client.model.WatchModels(request))


@pytest.mark.usefixtures("no_refresh")
async def test_a_stream_outlasts_the_database_and_finds_what_changed_meanwhile(
    database: Relay, settings: Settings, dsn: str
):
    async with serving(settings) as target, Client(target) as client:
        responses = followed(client, heartbeat_interval={"seconds": 1})
        await until(responses, "snapshot_complete")
        await database.cut()
        connection = await asyncpg.connect(dsn)
        await queries.store(connection, queries.HESTON, [heston("A", 1)])
        await connection.close()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(followed(client))
        assert reason_of(raised.value) == "BACKEND_UNAVAILABLE"
        for _ in range(2):
            assert kind(await anext(responses)) == "heartbeat"
        await database.join()
        assert list((await until(responses, "data")).heston) == [heston("A", 1)]


@pytest.mark.usefixtures("no_refresh")
async def test_without_the_bus_a_server_tells_its_own_readers(
    bus: Relay, settings: Settings
):
    async with serving(settings) as target, Client(target) as client:
        responses = followed(client)
        await until(responses, "snapshot_complete")
        await bus.cut()
        await HESTON.publish(client, [heston("A", 1)])
        assert list((await until(responses, "data")).heston) == [heston("A", 1)]
        await bus.join()


@pytest.mark.usefixtures("no_refresh")
async def test_once_the_bus_is_back_readers_get_what_others_announced_meanwhile(
    settings: Settings, bus: Relay, redis_url: str
):
    other_settings = settings.model_copy(update={"redis_url": redis_url})
    async with (
        serving(settings) as target,
        serving(other_settings) as other_target,
        Client(target) as client,
        Client(other_target) as other,
    ):
        responses = followed(client)
        await until(responses, "snapshot_complete")
        await bus.cut()
        await HESTON.publish(other, [heston("A", 1)])
        await bus.join()
        assert list((await until(responses, "data")).heston) == [heston("A", 1)]
