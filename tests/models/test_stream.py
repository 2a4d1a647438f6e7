"""WatchModels, over the wire."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL
from quantplane_server.main import serving
from tests.conftest import Server, both_editions
from tests.market_data import kind, until
from tests.models import HESTON, OU, SABR, heston, ou, refused, sabr, violations


def watch(client: Client, **fields: Any) -> AsyncIterator[pb.WatchModelsResponse]:
    return aiter(client.model.WatchModels(pb.WatchModelsRequest(**fields)))


async def snapshot(responses: AsyncIterator[Any]) -> pb.WatchModelsResponse:
    """Return all that comes before SnapshotComplete, and its token."""
    merged = pb.WatchModelsResponse()
    async for response in responses:
        merged.MergeFrom(response)
        if kind(response) == "snapshot_complete":
            return merged
    raise AssertionError("the stream ended before SnapshotComplete")


@both_editions
async def test_a_watcher_gets_the_latest_then_what_changes(client: Client):
    await HESTON.publish(client, [heston("A", 0), heston("A", 1), heston("B", 0)])
    await SABR.publish(client, [sabr("A", 0, 1), sabr("A", 1, 2), sabr("A", 1, 1)])
    responses = watch(
        client, heston_symbols=["A", "C"], sabr_symbols=["A"], ou_pair_ids=["A"]
    )
    subscribed = (await anext(responses)).event.subscribed
    assert [(key.key, key.state) for key in subscribed.keys] == [
        ("heston:A", pb.KEY_STATE_ACTIVE),
        ("heston:C", pb.KEY_STATE_NO_DATA),
        ("sabr:A", pb.KEY_STATE_ACTIVE),
        ("ou:A", pb.KEY_STATE_NO_DATA),
    ]
    first = await snapshot(responses)
    assert list(first.heston) == [heston("A", 1)]
    assert list(first.sabr) == [sabr("A", 1, 1), sabr("A", 1, 2)]
    assert not first.ou
    for model, field, rows in (
        (OU, "ou", [ou("A", 5)]),
        (HESTON, "heston", [heston("C", 3)]),
        (HESTON, "heston", [heston("A", 1, v0=0.7)]),
    ):
        await model.publish(client, rows)
        response = await until(responses, "data")
        assert response.ListFields()[0][0].name == field
        assert list(getattr(response, field)) == rows
        assert not response.HasField("event")


async def test_a_surface_is_delivered_as_a_whole_and_without_others(client: Client):
    await SABR.publish(client, [sabr(s, 0, m) for s in "AB" for m in (1, 2, 3)])
    responses = watch(client, sabr_symbols=["A", "B"], heston_symbols=["A"])
    await snapshot(responses)
    for published, expected in (
        ([sabr("A", 0, 2, nu=0.9)], [(1, 0.4), (2, 0.9), (3, 0.4)]),
        ([sabr("A", 0, 4)], [(1, 0.4), (2, 0.9), (3, 0.4), (4, 0.4)]),
        ([sabr("A", 1, 5), sabr("A", 1, 2)], [(2, 0.4), (5, 0.4)]),
    ):
        await SABR.publish(client, published)
        response = await until(responses, "data")
        assert [(row.maturity, row.nu) for row in response.sabr] == expected
        assert {row.symbol for row in response.sabr} == {"A"}


async def test_what_is_not_the_latest_or_not_wanted_is_not_delivered(client: Client):
    await HESTON.publish(client, [heston("A", 5)])
    responses = watch(client, heston_symbols=["A"])
    await snapshot(responses)
    await HESTON.publish(client, [heston("A", 4)])
    await HESTON.publish(client, [heston("B", 9)])
    await SABR.publish(client, [sabr("A", 9)])
    await HESTON.publish(client, [heston("A", 5)])
    await HESTON.publish(client, [heston("A", 6)])
    assert list((await until(responses, "data")).heston) == [heston("A", 6)]


async def test_keys_are_given_once_whatever_the_request_says(client: Client):
    responses = watch(client, ou_pair_ids=["B", "A", "B"])
    subscribed = (await anext(responses)).event.subscribed
    assert [key.key for key in subscribed.keys] == ["ou:A", "ou:B"]


async def test_a_token_is_good_on_another_server(client: Client, server: Server):
    await OU.publish(client, [ou("A", 1), ou("B", 1)])
    fields: Any = {"ou_pair_ids": ["A", "B"]}
    token = (await snapshot(watch(client, **fields))).resume_token
    async with serving(server.settings) as other, Client(other) as successor:
        resumed = watch(successor, resume_token=token, **fields)
        assert not (await snapshot(resumed)).ou
        await OU.publish(client, [ou("A", 2)])
        response = await until(resumed, "data")
        assert list(response.ou) == [ou("A", 2)]
        resumed = watch(client, resume_token=token, **fields)
        assert list((await snapshot(resumed)).ou) == [ou("A", 2), ou("B", 1)]
        resumed = watch(client, resume_token=response.resume_token, **fields)
        assert not (await snapshot(resumed)).ou


@pytest.mark.parametrize(
    "other",
    [
        {"heston_symbols": ["A", "B"]},
        {"sabr_symbols": ["A"]},
        {"heston_symbols": ["A"], "sabr_symbols": ["A"]},
    ],
    ids=str,
)
async def test_a_token_of_other_keys_is_refused(client: Client, other: Any):
    token = (await snapshot(watch(client, heston_symbols=["A"]))).resume_token
    call = anext(watch(client, resume_token=token, **other))
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_RESUME_TOKEN")
    assert await refused(call) == expected


async def test_a_followed_stream_goes_on_over_a_restarted_server(
    client: Client, server: Server
):
    settings = server.settings.model_copy()
    request = pb.WatchModelsRequest(heston_symbols=["A"])
    request.heartbeat_interval.FromSeconds(1)
    async with serving(settings) as target:
        settings.listen = target
        follower = Client(target)
        responses = follower.follow(follower.model.WatchModels, request)
        await snapshot(responses)
        await HESTON.publish(client, [heston("A", 1)])
        assert list((await until(responses, "data")).heston) == [heston("A", 1)]
        following = asyncio.create_task(until(responses, "data"))
    await HESTON.publish(client, [heston("A", 2)])
    async with serving(settings), follower:
        assert list((await following).heston) == [heston("A", 2)]


async def test_more_than_20_000_rows_end_the_stream(client: Client):
    surface = [sabr("A", 0, 1 + number / 10_000) for number in range(20_001)]
    for start in range(0, 20_000, 2_000):
        await SABR.publish(client, surface[start : start + 2_000])
    responses = watch(client, sabr_symbols=["A"])
    assert list((await snapshot(responses)).sabr) == surface[:20_000]
    await SABR.publish(client, surface[20_000:])
    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
    assert await refused(until(responses, "data")) == expected


async def test_a_stream_beyond_the_limit_is_refused(server: Server):
    settings = server.settings.model_copy(update={"max_streams": 1})
    async with serving(settings) as target, Client(target) as client:
        responses = watch(client, ou_pair_ids=["A"])
        await anext(responses)
        call = anext(watch(client, ou_pair_ids=["A"]))
        expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert await refused(call) == expected


IN_ALL = "must be 1 to 1,000 keys, with sabr_symbols and ou_pair_ids"
NAMES = [f"S{number}" for number in range(1_000)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [("heston_symbols", IN_ALL)]),
        ({"heston_symbols": NAMES, "ou_pair_ids": ["A"]}, [("heston_symbols", IN_ALL)]),
        ({"sabr_symbols": ["A", ""]}, [("sabr_symbols[1]", SYMBOL)]),
        ({"ou_pair_ids": [" A"]}, [("ou_pair_ids[0]", SYMBOL)]),
        (
            {"heston_symbols": ["A"], "heartbeat_interval": {"seconds": 61}},
            [("heartbeat_interval", "must be 1 to 60 s")],
        ),
    ],
    ids=["no key", "1,001 keys", "a nameless key", "a key with a space", "heartbeats"],
)
async def test_a_bad_request_is_refused(client: Client, fields: Any, expected: Any):
    assert await violations(anext(watch(client, **fields))) == expected


async def test_a_thousand_keys_can_be_watched(client: Client):
    await HESTON.publish(client, [heston(name) for name in NAMES[:500]])
    responses = watch(client, heston_symbols=NAMES[:500], sabr_symbols=NAMES[500:])
    assert len((await snapshot(responses)).heston) == 500
