"""Configurations: any JSON under a key, and the servers' own settings."""

import asyncio
from datetime import UTC, datetime
from math import inf, nan
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.main import serving
from quantplane_server.reference import pages
from quantplane_server.reference.changes import REDACTED
from quantplane_server.reference.checks import (
    DESCRIPTION,
    EMPTY,
    KEY,
    KEY_PREFIX,
    VALUE,
)
from quantplane_server.reference.queries import MAX_JSON_BYTES
from quantplane_server.reference.settings import (
    INITIAL_CASH,
    SESSION_END,
    SETTINGS,
    SNAPSHOT_INTERVAL,
)
from tests.conftest import Server
from tests.orders import events, open_order, watching
from tests.reference import (
    actions,
    change,
    configuration,
    entries,
    fetch,
    json_value,
    one_or_two_databases,
    put,
    read,
    unset,
)
from tests.signals import refused, violations

UNKNOWN = (grpc.StatusCode.NOT_FOUND, "UNKNOWN_CONFIGURATION", {"key": "k"})
REUSED = (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED", {"key": "k"})
MASK = "must name value or description"


async def page(client: Client, **fields: Any) -> pb.ListConfigurationsResponse:
    request = pb.ListConfigurationsRequest(**fields)
    return await client.configuration.ListConfigurations(request)


async def listed(client: Client, **fields: Any) -> list[pb.Configuration]:
    """Return the configurations of all pages."""
    response = await page(client, **fields)
    configurations = list(response.configurations)
    while response.next_page_token:
        fields["page_token"] = response.next_page_token
        response = await page(client, **fields)
        assert response.configurations
        configurations += response.configurations
    return configurations


async def keys(client: Client, **fields: Any) -> list[str]:
    return [one.key for one in await listed(client, **fields)]


# --- Changes ------------------------------------------------------------------------


@one_or_two_databases
async def test_a_configuration_is_kept_as_it_was_sent(
    client: Client, reference_dsn: str
):
    created = await put(client, "desk.limits-v2", {"a": [1, None]}, description="why")
    assert created.value == json_value({"a": [1, None]})
    assert created.description == "why"
    assert created.updated_by == "test"
    assert created.HasField("updated_at")
    assert created.etag
    assert not created.known
    assert await read(client, "desk.limits-v2") == created
    rows = await fetch(reference_dsn, "SELECT key FROM configurations")
    assert rows == [("desk.limits-v2",)]


async def test_creating_it_again_changes_nothing_and_otherwise_is_refused(
    client: Client, reference_dsn: str
):
    created = await put(client, value={"a": 1}, description="why")
    assert await put(client, value={"a": 1}, description="why") == created
    assert await refused(put(client, value={"a": 1})) == REUSED
    assert await refused(put(client, value={}, description="why")) == REUSED
    assert await read(client) == created
    assert await actions(reference_dsn) == ["create"]


async def test_of_creations_at_the_same_instant_one_is_entered(
    client: Client, reference_dsn: str
):
    created = await asyncio.gather(*(put(client) for _ in range(8)))
    assert created == [created[0]] * 8
    assert await actions(reference_dsn) == ["create"]


@one_or_two_databases
async def test_an_update_changes_what_its_mask_names(
    client: Client, reference_dsn: str
):
    created = await put(client, value=1, description="why")
    await fetch(reference_dsn, "UPDATE configurations SET updated_by = 'sql'")
    updated = await change(client, value=2, description="else")
    assert (updated.value.number_value, updated.description) == (2, "why")
    assert updated.updated_by == "test"
    assert updated.updated_at.ToNanoseconds() > created.updated_at.ToNanoseconds()
    described = await change(client, value=3, mask=["description"])
    assert (described.value.number_value, described.description) == (2, "")
    assert await read(client) == described


async def test_a_retry_of_an_update_succeeds_and_an_old_etag_does_not(
    client: Client, reference_dsn: str
):
    created = await put(client, value=1)
    updated = await change(client, value=2, etag=created.etag)
    assert await change(client, value=2, etag=created.etag) == updated
    stale = change(client, value=3, etag=created.etag)
    expected = (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", {"etag": updated.etag})
    assert await refused(stale) == expected
    assert await refused(unset(client, etag=created.etag)) == expected
    await unset(client, etag=updated.etag)
    await unset(client, etag=updated.etag)
    assert await actions(reference_dsn) == ["create", "update", "delete"]


async def test_of_updates_with_one_etag_exactly_one_wins(client: Client):
    created = await put(client, value=0)
    calls = [change(client, value=n, etag=created.etag) for n in range(1, 9)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    (won,) = [one for one in outcomes if isinstance(one, pb.Configuration)]
    assert await read(client) == won


async def test_a_key_that_is_not_set_is_not_found(client: Client):
    assert await refused(read(client)) == UNKNOWN
    assert await refused(change(client)) == UNKNOWN
    await unset(client)


characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
text = st.text(characters, max_size=8)
# JSONB knows no -0.
numbers = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), text, numbers),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)
    ),
    max_leaves=12,
)


@hypothesis(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(value=values)
async def test_a_value_comes_back_as_it_was(client: Client, value: Any):
    await unset(client)
    created = await put(client, value=value)
    assert created.value == json_value(value)
    assert await put(client, value=value) == created


# --- The audit log ------------------------------------------------------------------


@one_or_two_databases
async def test_the_audit_log_has_what_was_and_what_is(
    client: Client, reference_dsn: str
):
    await put(client, value={"a": 1}, description="why")
    await change(client, value=None)
    await unset(client)
    first, second, third = await entries(reference_dsn)
    was, then = first[4], second[4]
    assert first == ("create", "configuration", "k", None, was)
    assert second == ("update", "configuration", "k", was, then)
    assert third == ("delete", "configuration", "k", then, None)
    assert (was["value"], was["description"]) == ({"a": 1}, "why")
    assert then["value"] is None


SECRET = ["broker.password", "secret", "a.b.token", "api.key", "x.dsn", "x.TOKEN"]
OPEN = ["password.hint", "x.keys", "monkey"]


async def test_secrets_are_left_out_of_the_audit_log(
    client: Client, reference_dsn: str
):
    for key in (*SECRET, *OPEN):
        await put(client, key, "hush", description="why")
        await change(client, key, "hush-hush")
        await unset(client, key)
    for _, _, key, old, new in await entries(reference_dsn):
        for value in (old, new):
            hidden = value is None or value["value"] == REDACTED
            assert value is None or hidden == (key in SECRET)
            assert "hush" not in str(value) or key in OPEN


# --- List ---------------------------------------------------------------------------


@one_or_two_databases
async def test_pages_together_are_all_in_order_the_servers_own_among_them(
    client: Client,
):
    created = [await put(client, key) for key in ("z", "B", "a.b", "_", "orders.x")]
    own = [await read(client, key) for key in SETTINGS]
    expected = sorted(created + own, key=lambda one: one.key)
    for page_size in (0, 1, 2, 7, 8, 1_000):
        assert await listed(client, page_size=page_size) == expected


async def test_a_prefix_chooses_keys(client: Client):
    for key in ("orders", "orders.x", "order_s", "Orders.y"):
        await put(client, key)
    assert await keys(client, prefix="orders") == [
        *("orders", SESSION_END.key, "orders.x")
    ]
    assert await keys(client, prefix="orders.", page_size=1) == [
        *(SESSION_END.key, "orders.x")
    ]
    assert await keys(client, prefix="order_") == ["order_s"]
    assert await keys(client, prefix="none") == []


async def test_a_page_ends_early_where_its_values_are_large(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pages, "PAGE_BYTES", 30_000)
    for key in "ABCDE":
        await put(client, key, "x" * 10_000)
    assert len((await page(client)).configurations) == 3
    assert await keys(client) == [*"ABCDE", *sorted(SETTINGS)]


async def test_a_page_token_of_another_prefix_is_refused(client: Client):
    token = (await page(client, page_size=1)).next_page_token
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", {})
    assert await refused(page(client, page_token=token, prefix="p")) == expected


# --- The servers' own ---------------------------------------------------------------


async def test_a_setting_that_is_not_set_is_there_with_its_default(client: Client):
    found = await listed(client)
    assert [one.key for one in found] == sorted(SETTINGS)
    for one in found:
        setting = SETTINGS[one.key]
        assert one == pb.Configuration(
            key=setting.key,
            value=json_value(setting.default),
            description=setting.description,
            known=True,
        )
        assert await read(client, one.key) == one


async def test_a_setting_that_is_set_keeps_its_description(client: Client):
    key = INITIAL_CASH.key
    created = await put(client, key, 5)
    assert created.known
    assert created.description == INITIAL_CASH.description
    changed = await change(client, key, description="mine", mask=["description"])
    assert (changed.value.number_value, changed.description) == (5, "mine")
    await unset(client, key, etag=changed.etag)
    assert (await read(client, key)).value == json_value(INITIAL_CASH.default)
    code, reason, _ = await refused(change(client, key, 6))
    assert (code.name, reason) == ("NOT_FOUND", "UNKNOWN_CONFIGURATION")


UNUSABLE: list[tuple[Any, Any]] = [
    (INITIAL_CASH, "5"),
    (INITIAL_CASH, None),
    (INITIAL_CASH, True),
    (SNAPSHOT_INTERVAL, 0.5),
    (SNAPSHOT_INTERVAL, 86_401),
    (SESSION_END, 17),
    (SESSION_END, "25:00"),
    (SESSION_END, "17:00 Nowhere/Land"),
    (SESSION_END, {"time": "17:00"}),
]


async def test_a_value_that_a_setting_can_t_use_is_refused(client: Client):
    await put(client, SNAPSHOT_INTERVAL.key, 5)
    for setting, value in UNUSABLE:
        expected = [("configuration.value", f"must be {setting.type}")]
        for call in (put, change):
            assert await violations(call(client, setting.key, value)) == expected
    assert (await read(client, SNAPSHOT_INTERVAL.key)).value.number_value == 5


async def test_null_says_that_a_session_has_no_end(client: Client):
    created = await put(client, SESSION_END.key, None)
    assert created.HasField("updated_at")
    assert created.value == json_value(None)


@one_or_two_databases
async def test_the_initial_cash_is_in_force_at_once_at_every_server(
    client: Client, server: Server
):
    async def cash(of: Client) -> float:
        portfolio = await of.portfolio.GetPortfolio(pb.GetPortfolioRequest())
        return portfolio.summary.cash

    async with serving(server.settings) as target, Client(target) as other:
        await put(client, INITIAL_CASH.key, 5)
        assert (await cash(client), await cash(other)) == (5, 5)
        await change(other, INITIAL_CASH.key, 7)
        assert (await cash(client), await cash(other)) == (7, 7)
        await unset(client, INITIAL_CASH.key)
        assert (await cash(client), await cash(other)) == (1e6, 1e6)


@one_or_two_databases
async def test_a_session_ends_when_it_is_told_to(client: Client):
    order = await open_order(client)
    async with watching(client) as stream:
        await put(client, SESSION_END.key, f"{datetime.now(UTC):%H:%M:%S.%f}")
        (expired,) = await events(stream, 1)
    assert expired.type == pb.ORDER_EVENT_TYPE_EXPIRED
    assert expired.order.order_id == order.order_id


# --- What plain SQL has written ------------------------------------------------------

UNFIT = [
    '{"a": 1e999}',
    "[" * 17 + "]" * 17,
    "[" * 5000 + "]" * 5000,
    '"' + "x" * (1 << 17) + '"',
]


@pytest.mark.parametrize("value", UNFIT, ids=lambda value: value[:12])
async def test_json_beyond_the_limits_is_left_out_and_can_be_replaced(
    client: Client, reference_dsn: str, value: str
):
    await fetch(
        reference_dsn,
        "INSERT INTO configurations (key, value) VALUES ('a', $1::text::jsonb)",
        value,
    )
    first, *_ = await listed(client)
    assert first.key == "a"
    assert first.HasField("updated_at")
    assert not first.HasField("value")
    assert first.updated_by == ""
    assert (await change(client, "a", 1)).value == json_value(1)
    assert await actions(reference_dsn) == ["update"]


async def test_a_key_of_any_kind_is_listed(client: Client, reference_dsn: str):
    await fetch(
        reference_dsn, "INSERT INTO configurations (key, value) VALUES ('A key!', '1')"
    )
    assert "A key!" in await keys(client, page_size=1)


# --- Rules --------------------------------------------------------------------------


async def test_a_field_beyond_its_rule_is_named_and_nothing_changes(client: Client):
    bad: list[tuple[pb.Configuration, str, str]] = [
        *(
            (configuration(key), "key", KEY)
            for key in ("", ".", "a.", "a..b", "a b", "é", "a\n", "a" * 129)
        ),
        (pb.Configuration(key="k"), "value", VALUE),
        (pb.Configuration(key="k", value={}), "value", VALUE),  # type: ignore[arg-type]
        *(
            (pb.Configuration(key="k", value={"number_value": number}), "value", VALUE)  # type: ignore[arg-type]
            for number in (nan, inf)
        ),
        (configuration(value="\0"), "value", VALUE),
        (configuration(value="x" * (MAX_JSON_BYTES - 1)), "value", VALUE),
        (configuration(description="x" * 1_001), "description", DESCRIPTION),
        (configuration(description="\0"), "description", DESCRIPTION),
        (configuration(updated_at={}), "updated_at", EMPTY),
        (configuration(updated_by="me"), "updated_by", EMPTY),
        (configuration(etag="e"), "etag", EMPTY),
        (configuration(known=True), "known", EMPTY),
    ]
    for new, field, rule in bad:
        request = pb.CreateConfigurationRequest(configuration=new)
        call = client.configuration.CreateConfiguration(request)
        assert await violations(call) == [(f"configuration.{field}", rule)], new
    assert await keys(client) == sorted(SETTINGS)


async def test_a_field_is_taken_within_its_rule(client: Client):
    await put(client, "a" * 128, "x" * (MAX_JSON_BYTES - 2), description="é" * 1_000)


async def test_a_mask_names_one_field_at_least_and_only_those_there_are(client: Client):
    assert await violations(change(client, mask=[])) == [("update_mask", MASK)]
    found = await violations(change(client, " ", mask=["value", "key", "known"]))
    assert found == [
        ("configuration.key", KEY),
        *((f"update_mask.paths[{i}]", MASK) for i in (1, 2)),
    ]


async def test_a_bad_query_is_refused(client: Client):
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({"prefix": "a b"}, "prefix", KEY_PREFIX),
        ({"prefix": "a" * 129}, "prefix", KEY_PREFIX),
        ({"page_size": 1_001}, "page_size", "must be 0 to 1,000"),
        ({"page_size": -1}, "page_size", "must be 0 to 1,000"),
    ]
    for fields, field, rule in bad:
        assert await violations(page(client, **fields)) == [(field, rule)], fields
    for call in (read(client, ""), unset(client, "a..b")):
        assert await violations(call) == [("key", KEY)]
