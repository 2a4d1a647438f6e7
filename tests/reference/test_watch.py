"""WatchStrategies."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server import watch as watches
from quantplane_server.checks import SYMBOL
from quantplane_server.db import Connection
from quantplane_server.main import serving
from quantplane_server.reference import queries
from quantplane_server.reference.queries import Resource
from tests.conftest import Server
from tests.market_data import kind, until
from tests.reference import (
    create,
    delete,
    fetch,
    get,
    one_or_two_databases,
    update,
    watch,
)
from tests.signals import refused, violations

IDS = [f"S{number}" for number in range(1_000)]


@pytest.fixture(autouse=True)
def announced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read again by itself: what is told was announced."""
    monkeypatch.setattr(watches, "REFRESH_S", 3600)


async def snapshot(responses: AsyncIterator[Any]) -> pb.WatchStrategiesResponse:
    """Return all that comes before SnapshotComplete, and its token."""
    merged = pb.WatchStrategiesResponse()
    async for response in responses:
        merged.MergeFrom(response)
        if kind(response) == "snapshot_complete":
            return merged
    raise AssertionError("the stream ended before SnapshotComplete")


def states(response: pb.WatchStrategiesResponse) -> dict[str, bool]:
    keys = response.event.subscribed.keys
    return {key.key: key.state == pb.KEY_STATE_ACTIVE for key in keys}


@one_or_two_databases
async def test_a_snapshot_tells_what_there_is_and_what_is_not(client: Client):
    created = [await create(client, strategy_id=id) for id in "ca"]
    await create(client, strategy_id="d")
    whole = await snapshot(watch(client, *"cbab"))
    assert list(whole.strategies) == created[::-1]
    assert list(whole.deleted_ids) == ["b"]
    responses = watch(client, *"cbab")
    subscribed = await until(responses, "subscribed")
    assert states(subscribed) == {"a": True, "b": False, "c": True}


@one_or_two_databases
async def test_every_kind_of_change_is_told(client: Client):
    responses = watch(client, "s", "t")
    await snapshot(responses)
    created = await create(client)
    response = await until(responses, "data")
    assert (list(response.strategies), response.deleted_ids) == ([created], [])
    updated = await update(client, ["status"], status="x")
    response = await until(responses, "data")
    assert (list(response.strategies), response.deleted_ids) == ([updated], [])
    await delete(client)
    response = await until(responses, "data")
    assert (list(response.strategies), response.deleted_ids) == ([], ["s"])
    again = await create(client)
    response = await until(responses, "data")
    assert (list(response.strategies), response.deleted_ids) == ([again], [])


async def test_only_what_changes_is_sent(client: Client):
    for id in "abc":
        await create(client, strategy_id=id)
    responses = watch(client, "a", "b")
    await snapshot(responses)
    await update(client, ["name"], "c", name="New")
    await update(client, ["name"], "a", name="Momentum")  # as it was
    updated = await update(client, ["name"], "b", name="New")
    response = await until(responses, "data")
    assert (list(response.strategies), response.deleted_ids) == ([updated], [])


@one_or_two_databases
async def test_a_change_at_another_server_is_told(client: Client, server: Server):
    async with serving(server.settings) as target, Client(target) as other:
        responses = watch(other, "s")
        await snapshot(responses)
        created = await create(client)
        assert list((await until(responses, "data")).strategies) == [created]


async def test_a_token_goes_on_where_it_was_delivered(client: Client):
    await create(client)
    token = (await snapshot(watch(client, "s", "t"))).resume_token
    same = await snapshot(watch(client, "s", "t", resume_token=token))
    assert (same.strategies, same.deleted_ids) == ([], [])
    await delete(client)
    changed = await snapshot(watch(client, "s", "t", resume_token=token))
    assert (changed.strategies, changed.deleted_ids) == ([], ["s", "t"])
    other = anext(watch(client, "s", resume_token=token))
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_RESUME_TOKEN", {})
    assert await refused(other) == expected


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many strategies each read of the database was for."""
    counts: list[int] = []
    find = queries.find

    async def counted(
        conn: Connection, resource: Resource, keys: Sequence[str], lock: bool = False
    ) -> dict[str, Any]:
        counts.append(len(keys))
        return await find(conn, resource, keys, lock)

    monkeypatch.setattr(queries, "find", counted)
    return counts


async def test_a_thousand_strategies_cost_few_reads_and_a_change_one(
    client: Client, reference_dsn: str, reads: list[int]
):
    await fetch(
        reference_dsn,
        "INSERT INTO strategies (strategy_id, name, type, created_by)"
        " SELECT id, 'n', 't', 'sql' FROM unnest($1::text[]) AS id",
        IDS,
    )
    created = await get(client, IDS[-1])
    reads.clear()
    responses = watch(client, *IDS)
    assert len((await snapshot(responses)).strategies) == 1_000
    assert (len(reads), sum(reads)) == (10, 1_000)
    updated = await update(client, ["name"], IDS[-1], name="n", etag=created.etag)
    assert updated == created
    updated = await update(client, ["name"], IDS[-1], name="New", etag=created.etag)
    assert list((await until(responses, "data")).strategies) == [updated]
    changed = reads[10:]
    assert set(changed) == {1}


async def test_streams_share_what_they_watch(client: Client, reads: list[int]):
    created = await create(client)
    streams = [watch(client, "s", id) for id in "abc"]
    for responses in streams:
        assert list((await snapshot(responses)).strategies) == [created]
    reads.clear()
    updated = await update(client, ["name"], name="New")
    for responses in streams:
        assert list((await until(responses, "data")).strategies) == [updated]
    assert len(reads) == 2  # by the update, and for all streams


BAD: list[tuple[Sequence[str], dict[str, Any], str, str]] = [
    ((), {}, "strategy_ids", "must be 1 to 1,000 ids"),
    ((*IDS, "s"), {}, "strategy_ids", "must be 1 to 1,000 ids"),
    (("s", ""), {}, "strategy_ids[1]", SYMBOL),
    (
        ("s",),
        {"heartbeat_interval": {"seconds": 61}},
        "heartbeat_interval",
        "must be 1 to 60 s",
    ),
]


async def test_a_bad_request_is_refused(client: Client):
    for ids, fields, field, rule in BAD:
        found = await violations(anext(watch(client, *ids, **fields)))
        assert found == [(field, rule)]


async def test_a_stream_beyond_the_limit_is_refused(server: Server):
    settings = server.settings.model_copy(update={"max_streams": 1})
    async with serving(settings) as target, Client(target) as client:
        responses = watch(client, "s")
        await anext(responses)
        code, reason, _ = await refused(anext(watch(client, "s")))
        assert (code.name, reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS")
