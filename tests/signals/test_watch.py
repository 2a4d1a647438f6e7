"""WatchSignals: what is active, then what happens, without loss."""

import asyncio
import random
from typing import Any

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.main import serving
from quantplane_server.signals import service
from tests.conftest import Server, both_editions
from tests.market_data import kind
from tests.signals import (
    cancel,
    events,
    happened,
    ids,
    listed,
    publish,
    refused,
    signal,
    snapshot,
    stored,
    type_of,
    violations,
    watch,
)
from tests.signals.test_list import BAD_FILTERS, FIELDS, FILTERS

TOO_LARGE = (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
OTHER = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_RESUME_TOKEN", {})


@both_editions
async def test_a_watcher_gets_the_active_signals_then_every_event(client: Client):
    first, gone = await publish(client, signal(1), signal(0))
    (earlier,) = await publish(client, signal(-5_000))
    await cancel(client, gone.signal_id)
    responses = watch(client)
    subscribed = await anext(responses)
    assert kind(subscribed) == "subscribed"
    assert not subscribed.event.subscribed.keys
    assert list((await snapshot(responses)).signals) == [earlier, first]
    (published,) = await publish(client, signal(2))
    cancelled = await cancel(client, first.signal_id)
    received = await events(responses, 2)
    assert [(type_of(event), event.signal) for event in received] == [
        ("PUBLISHED", published),
        ("CANCELLED", cancelled),
    ]
    assert [event.revision for event in received] == [5, 6]


@both_editions
async def test_a_filter_is_of_the_snapshot_and_of_the_events(client: Client):
    before = await publish(client, *(signal(**fields) for fields in FIELDS))
    watching = []
    for wanted, fits in FILTERS:
        responses = watch(client, filter=wanted)
        found = list((await snapshot(responses)).signals)
        assert found == [one for one in before if fits(one)], wanted
        watching.append((responses, fits))
    after = await publish(client, *(signal(**fields) for fields in FIELDS))
    for responses, fits in watching:
        if expected := [one for one in after if fits(one)]:
            found = [e.signal for e in await events(responses, len(expected))]
            assert found == expected


class Trader:
    """Publishes and cancels, all the time, through two servers."""

    def __init__(self, *clients: Client) -> None:
        self._clients = clients
        self._random = random.Random(7)

    async def trade(self, rounds: int) -> None:
        await asyncio.gather(
            *(self._run(client, rounds) for client in self._clients for _ in range(2))
        )

    async def _run(self, client: Client, rounds: int) -> None:
        for _ in range(rounds):
            count = self._random.randint(1, 4)
            published = await publish(client, *(signal() for _ in range(count)))
            for one in published[: count // 2]:
                await cancel(client, one.signal_id)


async def followed(client: Client, last: pb.Signal) -> tuple[list[int], set[str]]:
    """Watch until `last` is published; return the revisions, and what is active."""
    responses = watch(client)
    active = set(ids((await snapshot(responses)).signals))
    revisions = []
    while last.signal_id not in active:
        for event in await events(responses, 1):
            revisions.append(event.revision)
            if event.type == pb.SIGNAL_EVENT_TYPE_PUBLISHED:
                assert event.signal.signal_id not in active
                active.add(event.signal.signal_id)
            else:
                active.remove(event.signal.signal_id)
    return revisions, active


@both_editions
async def test_there_is_no_seam_between_the_snapshot_and_the_events(
    client: Client, server: Server, dsn: str
):
    """Whenever a watcher comes, its snapshot and its events make the same state."""
    last = signal()
    async with serving(server.settings) as other, Client(other) as second:
        trading = asyncio.create_task(Trader(client, second).trade(rounds=12))
        watching = []
        for number in range(8):
            watcher = (client, second)[number % 2]
            watching.append(asyncio.create_task(followed(watcher, last)))
            await publish(watcher, signal())
        await trading
        await publish(second, last)
        results = await asyncio.gather(*watching)
        expected = await listed(client, statuses=[pb.SIGNAL_STATUS_ACTIVE])
    end = len(await happened(dsn))
    for revisions, active in results:
        assert active == set(ids(expected))
        assert revisions == list(range(end - len(revisions) + 1, end + 1))


async def test_a_stream_resumes_behind_each_of_its_tokens(
    client: Client, server: Server
):
    responses = watch(client, filter={"symbols": ["A"]})
    tokens = [((await snapshot(responses)).resume_token, 0)]
    received: list[pb.SignalEvent] = []
    async with serving(server.settings) as other, Client(other) as second:
        for number in range(8):
            trader = (client, second)[number % 2]
            made = await publish(trader, signal(), signal(symbol="B"), signal())
            await cancel(trader, made[0].signal_id)
            while len(received) < 3 * (number + 1):
                response = await anext(responses)
                received += response.events
                tokens.append((response.resume_token, len(received)))
        assert len({event.revision for event in received}) == len(received) == 24
        for token, count in tokens:
            for reader in (client, second):
                resumed = watch(reader, filter={"symbols": ["A"]}, resume_token=token)
                assert not (await snapshot(resumed)).signals
                if count < len(received):
                    rest = await events(resumed, len(received) - count)
                    assert rest == received[count:]


async def test_a_token_of_another_filter_is_refused(client: Client):
    token = (await snapshot(watch(client, filter={"symbols": ["A"]}))).resume_token
    for wanted in ({}, {"symbols": ["B"]}, {"strategy_ids": ["A"]}):
        call = anext(watch(client, filter=wanted, resume_token=token))
        assert await refused(call) == OTHER
    call = anext(watch(client, resume_token=b"nonsense"))
    assert await refused(call) == OTHER


async def test_a_followed_stream_goes_on_over_a_restarted_server(
    client: Client, server: Server
):
    settings = server.settings.model_copy()
    request = pb.WatchSignalsRequest()
    request.heartbeat_interval.FromSeconds(1)
    sent = [signal(), signal()]
    async with serving(settings) as target:
        settings.listen = target
        follower = Client(target)
        responses = follower.follow(follower.signal.WatchSignals, request)
        await snapshot(responses)
        await publish(client, sent[0])
        (event,) = await events(responses, 1)
        assert event.signal == stored(sent[0])
        following = asyncio.create_task(events(responses, 1))
    await publish(client, sent[1])
    async with serving(settings), follower:
        (event,) = await following
        assert event.signal == stored(sent[1])


async def test_more_active_signals_than_the_limit_are_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "PAGE", 2)
    monkeypatch.setattr(service, "MAX_ACTIVE", 5)
    published = await publish(client, *(signal(hour) for hour in range(5)))
    responses = watch(client)
    assert list((await snapshot(responses)).signals) == published
    await publish(client, signal(9, symbol="B"))
    assert await refused(snapshot(watch(client))) == (*TOO_LARGE, {"limit": "5"})
    narrow = watch(client, filter={"symbols": ["A"]})
    assert list((await snapshot(narrow)).signals) == published
    assert len(await events(responses, 1)) == 1


async def test_active_signals_of_more_bytes_than_the_limit_are_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "MAX_ACTIVE_BYTES", 20_000)
    large: dict[str, Any] = {"a": "x" * 9_000}
    await publish(client, signal(metadata=large), signal(metadata=large))
    assert len((await snapshot(watch(client))).signals) == 2
    await publish(client, signal(metadata=large))
    assert await refused(snapshot(watch(client))) == (*TOO_LARGE, {"limit": "20000"})


async def test_a_stream_beyond_the_limit_is_refused(server: Server):
    settings = server.settings.model_copy(update={"max_streams": 1})
    async with serving(settings) as target, Client(target) as client:
        responses = watch(client)
        await anext(responses)
        code, reason, _ = await refused(anext(watch(client)))
        assert (code, reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_STREAMS",
        )


async def test_a_bad_request_is_refused(client: Client):
    for wanted, field, rule in BAD_FILTERS:
        call = anext(watch(client, filter=wanted))
        assert await violations(call) == [(f"filter.{field}", rule)], wanted
    call = anext(watch(client, heartbeat_interval={"seconds": 61}))
    assert await violations(call) == [("heartbeat_interval", "must be 1 to 60 s")]
