"""Strategies are created, changed, deleted and listed, and all changes audited."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL
from quantplane_server.constraints import ONCE
from quantplane_server.reference import pages
from quantplane_server.reference.checks import AT_MOST, EMPTY, JSON, SYMBOLS
from quantplane_server.reference.queries import MAX_JSON_BYTES
from tests.admin import connected
from tests.reference import (
    actions,
    create,
    delete,
    entries,
    fetch,
    get,
    listed,
    one_or_two_databases,
    page,
    sent,
    strategy,
    update,
)
from tests.signals import refused, violations, waiting

REUSED = (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED", {"key": "s"})
UNKNOWN = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_STRATEGY", {"strategy_id": "x"})
MASK = "must name name, type, status, parameters, risk_limits or symbols"


def mismatch(etag: str) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    return grpc.StatusCode.ABORTED, "ETAG_MISMATCH", {"etag": etag}


# --- Create -------------------------------------------------------------------------


@one_or_two_databases
async def test_a_strategy_is_kept_as_it_was_sent(client: Client, reference_dsn: str):
    created = await create(client)
    assert sent(created) == strategy()
    assert created.created_at == created.updated_at
    assert created.created_by == "test"
    assert created.etag
    assert await get(client) == created
    ((name, symbols),) = await fetch(
        reference_dsn, "SELECT name, symbols FROM strategies"
    )
    assert (name, symbols) == ("Momentum", ["B", "A"])


async def test_what_may_be_omitted_has_its_default(client: Client):
    created = await create(client, pb.Strategy(strategy_id="s", name="n", type="t"))
    assert created.status == "stopped"
    assert not created.parameters.fields
    assert not created.risk_limits.fields
    assert not created.symbols


async def test_creating_it_again_changes_nothing(client: Client, reference_dsn: str):
    created = await create(client)
    assert await create(client) == created
    assert await actions(reference_dsn) == ["create"]


async def test_creating_it_again_after_a_change_that_was_undone(client: Client):
    await create(client)
    await update(client, ["status"], status="stopped")
    undone = await update(client, ["status"], status="running")
    assert await create(client) == undone


@pytest.mark.parametrize(
    "other",
    [
        {"name": "Other"},
        {"type": "other"},
        {"status": ""},
        {"parameters": {"fast": 5}},
        {"risk_limits": {}},
        {"symbols": ["A", "B"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_an_id_that_was_used_for_other_fields_is_refused(
    client: Client, reference_dsn: str, other: Any
):
    created = await create(client)
    assert await refused(create(client, **other)) == REUSED
    assert await get(client) == created
    assert await actions(reference_dsn) == ["create"]


async def test_true_is_another_value_than_one(client: Client):
    await create(client, parameters={"a": True})
    assert await refused(create(client, parameters={"a": 1})) == REUSED


async def test_of_creations_at_the_same_instant_one_is_entered(
    client: Client, reference_dsn: str
):
    created = await asyncio.gather(*(create(client) for _ in range(8)))
    assert created == [created[0]] * 8
    assert await actions(reference_dsn) == ["create"]


async def test_of_creations_that_differ_one_wins(client: Client):
    calls = [create(client, name=str(number)) for number in range(8)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    (won,) = [one for one in outcomes if isinstance(one, pb.Strategy)]
    assert await get(client) == won


async def test_one_who_creates_waits_for_another_who_has_yet_to_commit(
    client: Client, reference_dsn: str
):
    async with connected(reference_dsn) as other, connected(reference_dsn) as watcher:
        transaction = other.transaction()
        await transaction.start()
        await other.execute(
            "INSERT INTO strategies (strategy_id, name, type, created_by)"
            " VALUES ('s', 'n', 't', 'sql')"
        )
        creating = asyncio.create_task(create(client))
        await waiting(watcher, 1)
        await transaction.commit()
    assert await refused(creating) == REUSED


# --- Update -------------------------------------------------------------------------


@one_or_two_databases
async def test_an_update_changes_what_its_mask_names(
    client: Client, reference_dsn: str
):
    created = await create(client)
    updated = await update(client, ["status", "name"], status="paused", name="New")
    assert sent(updated) == strategy(status="paused", name="New")
    assert updated.created_at == created.created_at
    assert updated.updated_at.ToNanoseconds() > created.updated_at.ToNanoseconds()
    assert updated.etag != created.etag
    assert await get(client) == updated
    assert await actions(reference_dsn) == ["create", "update"]


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from("abc"),
    "type": st.sampled_from("abc"),
    "status": st.sampled_from("abc"),
    "parameters": st.dictionaries(st.sampled_from("ab"), st.none() | st.booleans()),
    "risk_limits": st.dictionaries(
        st.sampled_from(["max_position", "max_open_orders"]), st.integers(0, 2)
    ),
    "symbols": st.lists(st.sampled_from("ABC"), unique=True),
}


@hypothesis(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.fixed_dictionaries(VALUES), st.sets(st.sampled_from(list(VALUES)), min_size=1)
)
async def test_what_is_not_in_the_mask_never_changes(
    client: Client, fields: dict[str, Any], mask: set[str]
):
    found = await listed(client)
    before = found[0] if found else await create(client)
    after = await update(client, list(mask), **fields)
    asked = strategy(**fields)
    for field in VALUES:
        source = asked if field in mask else before
        assert getattr(after, field) == getattr(source, field), field
    changed = sent(after) != sent(before)
    assert (after.etag != before.etag) == changed
    assert (after.updated_at != before.updated_at) == changed
    assert await get(client) == after


async def test_what_is_not_in_the_mask_is_not_looked_at(client: Client):
    await create(client)
    updated = await update(client, ["name"], name="New", status=" ", symbols=["A", "A"])
    assert sent(updated) == strategy(name="New")


async def test_an_update_that_is_done_already_is_a_retry_whatever_its_etag(
    client: Client, reference_dsn: str
):
    created = await create(client)
    updated = await update(client, ["name"], name="New", etag=created.etag)
    for etag in (created.etag, updated.etag, "", "nonsense"):
        assert await update(client, ["name"], name="New", etag=etag) == updated
    assert await actions(reference_dsn) == ["create", "update"]


async def test_an_etag_of_what_was_before_is_refused(
    client: Client, reference_dsn: str
):
    created = await create(client)
    updated = await update(client, ["name"], name="New", etag=created.etag)
    stale = update(client, ["name", "status"], name="Newer", etag=created.etag,
                   status="x")  # fmt: skip
    assert await refused(stale) == mismatch(updated.etag)
    assert await get(client) == updated
    assert await actions(reference_dsn) == ["create", "update"]


async def test_a_change_by_sql_changes_the_etag(client: Client, reference_dsn: str):
    created = await create(client)
    await fetch(reference_dsn, "UPDATE strategies SET symbols = '{C}'")
    found = await get(client)
    stale = update(client, ["name"], name="New", etag=created.etag)
    assert await refused(stale) == mismatch(found.etag)


async def test_of_updates_with_one_etag_exactly_one_wins(
    client: Client, reference_dsn: str
):
    created = await create(client)
    calls = [
        update(client, ["name"], name=str(number), etag=created.etag)
        for number in range(8)
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    (won,) = [one for one in outcomes if isinstance(one, pb.Strategy)]
    assert await get(client) == won
    assert await actions(reference_dsn) == ["create", "update"]


async def test_an_etag_is_compared_once_others_have_committed(
    client: Client, reference_dsn: str
):
    created = await create(client)
    async with connected(reference_dsn) as other, connected(reference_dsn) as watcher:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("UPDATE strategies SET status = 'x', symbols = '{C}'")
        stale = asyncio.create_task(
            update(client, ["name"], name="New", etag=created.etag)
        )
        await waiting(watcher, 1)
        await transaction.commit()
    found = await get(client)
    assert sent(found) == strategy(status="x", symbols=["C"])
    assert await refused(stale) == mismatch(found.etag)


async def test_updates_of_different_fields_at_once_all_count(client: Client):
    await create(client)
    await asyncio.gather(
        update(client, ["name"], name="New"),
        update(client, ["status"], status="x"),
        update(client, ["symbols"], symbols=["C"]),
        update(client, ["parameters"]),
    )
    changed = strategy(name="New", status="x", symbols=["C"], parameters={})
    assert sent(await get(client)) == changed


async def test_an_update_is_later_than_the_last_whatever_the_clock(
    client: Client, reference_dsn: str
):
    await create(client)
    await fetch(reference_dsn, "UPDATE strategies SET updated_at = '2999-01-01'")
    updated = await update(client, ["name"], name="New")
    assert updated.updated_at.ToJsonString() == "2999-01-01T00:00:00.000001Z"


async def test_a_mask_names_one_field_at_least_and_only_those_there_are(client: Client):
    await create(client)
    assert await violations(update(client, [])) == [("update_mask", MASK)]
    paths = ["name", "etag", "parameters.fast", ""]
    assert await violations(update(client, paths, strategy_id=" ")) == [
        ("strategy.strategy_id", SYMBOL),
        *((f"update_mask.paths[{i}]", MASK) for i in (1, 2, 3)),
        ("strategy.name", SYMBOL),
    ]


async def test_a_strategy_that_is_not_there_is_not_found(client: Client):
    assert await refused(get(client, "x")) == UNKNOWN
    assert await refused(update(client, ["name"], "x", name="n", etag="e")) == UNKNOWN


# --- Delete -------------------------------------------------------------------------


@one_or_two_databases
async def test_a_strategy_that_was_deleted_is_gone(client: Client, reference_dsn: str):
    created = await create(client)
    await delete(client, etag=created.etag)
    assert await listed(client) == []
    await delete(client)
    await delete(client, etag=created.etag)
    assert await actions(reference_dsn) == ["create", "delete"]
    assert (await create(client)).etag != created.etag


async def test_a_deletion_of_what_has_changed_is_refused(
    client: Client, reference_dsn: str
):
    created = await create(client)
    updated = await update(client, ["name"], name="New")
    assert await refused(delete(client, etag=created.etag)) == mismatch(updated.etag)
    assert await get(client) == updated
    assert await actions(reference_dsn) == ["create", "update"]


# --- The audit log ------------------------------------------------------------------


def audited(row: pb.Strategy) -> dict[str, Any]:
    value: dict[str, Any] = MessageToDict(row, preserving_proto_field_name=True)
    del value["etag"]
    return value


@one_or_two_databases
async def test_the_audit_log_has_what_was_and_what_is(
    client: Client, reference_dsn: str
):
    created = await create(client)
    updated = await update(client, ["risk_limits"], risk_limits={"max_position": 1})
    await delete(client)
    first, second = audited(created), audited(updated)
    assert await entries(reference_dsn) == [
        ("create", "strategy", "s", None, first),
        ("update", "strategy", "s", first, second),
        ("delete", "strategy", "s", second, None),
    ]
    assert second["risk_limits"] == {"max_position": 1}


async def test_what_can_t_be_entered_is_not_done(client: Client, reference_dsn: str):
    created = await create(client)
    await fetch(reference_dsn, "ALTER TABLE audit_logs RENAME TO away")
    for call in (
        create(client, strategy_id="t"),
        update(client, ["name"], name="New"),
        delete(client),
    ):
        code, _, _ = await refused(call)
        assert code == grpc.StatusCode.INTERNAL
    assert await listed(client) == [created]


# --- List ---------------------------------------------------------------------------


@one_or_two_databases
async def test_pages_together_are_all_strategies_in_order_of_their_ids(client: Client):
    ids = ["b", "B", "a", "_", "é", "a b", "10", "9"]
    created = {id: await create(client, strategy_id=id) for id in ids}
    expected = [created[id] for id in sorted(ids)]
    for page_size in (0, 1, 2, 7, 8, 1_000):
        assert await listed(client, page_size=page_size) == expected


async def test_statuses_and_types_are_chosen(client: Client):
    created = {
        status + type: await create(
            client, strategy_id=status + type, status=status, type=type
        )
        for status in "ab"
        for type in "xy"
    }
    wanted: list[tuple[dict[str, Any], Callable[[pb.Strategy], bool]]] = [
        ({"statuses": ["a"]}, lambda s: s.status == "a"),
        ({"types": ["y"]}, lambda s: s.type == "y"),
        ({"types": ["y", "x"], "statuses": ["b"]}, lambda s: s.status == "b"),
        ({"statuses": ["a", "a"], "types": ["x"]}, lambda s: s.strategy_id == "ax"),
        ({"statuses": ["c"]}, lambda s: False),
    ]
    for fields, fits in wanted:
        expected = [one for one in created.values() if fits(one)]
        assert await listed(client, page_size=1, **fields) == expected, fields


async def test_pages_do_not_shift_when_strategies_come_and_go(client: Client):
    for id in "bdf":
        await create(client, strategy_id=id)
    first = await page(client, page_size=2)
    await create(client, strategy_id="a")
    await delete(client, "d")
    inserted = await create(client, strategy_id="e")
    second = await page(client, page_size=2, page_token=first.next_page_token)
    assert list(second.strategies) == [inserted, await get(client, "f")]


async def test_a_page_ends_early_where_its_strategies_are_large(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pages, "PAGE_BYTES", 30_000)
    large = [
        await create(client, strategy_id=id, parameters={"a": "x" * 10_000})
        for id in "abcdefg"
    ]
    assert len((await page(client)).strategies) == 3
    assert await listed(client) == large


def largest(strategy_id: str) -> pb.Strategy:
    """Return a strategy that takes as many bytes as one can."""
    names = [f"{number:06}".ljust(64, "\U0001f600") for number in range(1_000)]
    empty: list[Any] = [[]] * (MAX_JSON_BYTES // 3 - 6)
    return strategy(
        strategy_id,
        symbols=names,
        risk_limits={"allowed_symbols": names},
        parameters={"a": empty},
    )


async def test_a_page_of_the_largest_fits_a_message(client: Client):
    for id in "abcde":
        await create(client, largest(id))
    first = await page(client, page_size=1_000)
    assert 2 << 20 < first.ByteSize() < 4 << 20
    assert first.next_page_token


async def test_a_page_token_of_another_query_is_refused(client: Client):
    for id in "abc":
        await create(client, strategy_id=id)
    token = (await page(client, page_size=1)).next_page_token
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", {})
    others: list[dict[str, Any]] = [
        {"page_token": token, "statuses": ["running"]},
        {"page_token": token, "types": ["momentum"]},
        {"page_token": token[:-4]},
        {"page_token": "nonsense"},
    ]
    for fields in others:
        assert await refused(page(client, **fields)) == expected
    rest = await page(client, page_size=9, page_token=token)
    assert [one.strategy_id for one in rest.strategies] == ["b", "c"]


BAD_LISTS: list[tuple[dict[str, Any], str, str]] = [
    ({"page_size": -1}, "page_size", "must be 0 to 1,000"),
    ({"page_size": 1_001}, "page_size", "must be 0 to 1,000"),
    ({"statuses": ["a", ""]}, "statuses[1]", SYMBOL),
    ({"types": ["a\0"]}, "types[0]", SYMBOL),
    ({"types": ["a"] * 101}, "types", AT_MOST),
]


async def test_a_bad_query_is_refused(client: Client):
    for fields, field, rule in BAD_LISTS:
        assert await violations(page(client, **fields)) == [(field, rule)], fields


# --- What plain SQL has written ------------------------------------------------------

UNFIT = [
    "[1]",
    "1",
    "null",
    '{"a": 1e999}',
    '{"a":' * 17 + "1" + "}" * 17,
    "[" * 5000 + "]" * 5000,
    '{"a": "' + "x" * (1 << 20) + '"}',
]


@pytest.mark.parametrize("json", UNFIT, ids=lambda json: json[:12])
async def test_json_beyond_the_limits_is_left_out_and_can_be_replaced(
    client: Client, reference_dsn: str, json: str
):
    await create(client)
    await fetch(
        reference_dsn,
        "UPDATE strategies SET (parameters, risk_limits)"
        " = ROW ($1::text::jsonb, $1::text::jsonb)",
        json,
    )
    expected = strategy()
    expected.ClearField("parameters")
    expected.ClearField("risk_limits")
    (found,) = await listed(client)
    assert sent(found) == expected
    updated = await update(client, ["name"], name="New")
    ((kept,),) = await fetch(
        reference_dsn, "SELECT parameters = $1::text::jsonb FROM strategies", json
    )
    assert kept
    replaced = await update(client, ["parameters", "risk_limits"], etag=updated.etag)
    assert replaced.parameters == replaced.risk_limits == Struct()
    assert replaced.HasField("parameters")
    await delete(client)
    assert await actions(reference_dsn) == ["create", "update", "update", "delete"]


async def test_symbols_of_any_shape_are_listed(client: Client, reference_dsn: str):
    await create(client)
    for symbols, expected in (
        ("{A,NULL,B}", ["A", "B"]),
        ("{{B,A},{C,NULL}}", ["B", "A", "C"]),
    ):
        await fetch(reference_dsn, f"UPDATE strategies SET symbols = '{symbols}'")
        assert (await get(client)).symbols == expected


# --- Rules --------------------------------------------------------------------------


def sized(count: int) -> dict[str, Any]:
    """Return what is so many bytes as JSON."""
    return {"a": "x" * (count - len('{"a":""}'))}


NAMES = [f"S{number}" for number in range(1_001)]
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"strategy_id": ""}, "strategy_id", SYMBOL),
    ({"strategy_id": "a" * 65}, "strategy_id", SYMBOL),
    ({"strategy_id": "a\0"}, "strategy_id", SYMBOL),
    ({"name": ""}, "name", SYMBOL),
    ({"type": " a"}, "type", SYMBOL),
    ({"status": "a\n"}, "status", SYMBOL),
    ({"parameters": sized(MAX_JSON_BYTES + 1)}, "parameters", JSON),
    ({"parameters": {"a": float("nan")}}, "parameters", JSON),
    ({"parameters": {"a": "\0"}}, "parameters", JSON),
    ({"symbols": ["A", ""]}, "symbols[1]", SYMBOL),
    ({"symbols": ["A", "B", "A"]}, "symbols[2]", ONCE),
    ({"symbols": NAMES}, "symbols", SYMBOLS),
    ({"created_at": {}}, "created_at", EMPTY),
    ({"updated_at": {"seconds": 1}}, "updated_at", EMPTY),
    ({"created_by": "me"}, "created_by", EMPTY),
    ({"etag": "e"}, "etag", EMPTY),
]


async def test_a_field_beyond_its_rule_is_named_and_nothing_changes(
    client: Client, reference_dsn: str
):
    for fields, field, rule in BAD:
        found = await violations(create(client, **fields))
        assert found == [(f"strategy.{field}", rule)], fields
    assert await listed(client) == []
    assert await actions(reference_dsn) == []


async def test_a_field_is_taken_within_its_rule(client: Client):
    for number, fields in enumerate(
        [
            {"name": "é" * 64, "status": "a b"},
            {"parameters": sized(MAX_JSON_BYTES)},
            {"symbols": NAMES[:1_000]},
        ]
    ):
        new = strategy(f"s{number}", **fields)
        assert sent(await create(client, new)) == new


async def test_all_violations_are_told_at_once(client: Client):
    found = await violations(
        create(client, pb.Strategy(symbols=[""], risk_limits={"x": 1}, etag="e"))
    )
    assert [field.removeprefix("strategy.") for field, _ in found] == [
        *("strategy_id", "name", "type", "risk_limits", "symbols[0]", "etag")
    ]
