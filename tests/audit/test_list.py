"""ListAuditLogs."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.audit import service
from quantplane_server.audit.checks import AT_MOST, NAME
from quantplane_server.audit.values import NOT_SHOWN
from quantplane_server.checks import ID
from tests.admin import connected
from tests.audit import ids, insert, listed, page
from tests.signals import refused, violations

START = datetime(2024, 1, 1, tzinfo=UTC)
USERS = [UUID(int=number) for number in range(3)]


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    async with connected(dsn) as connection:
        for user in USERS:
            await connection.execute(
                """
                INSERT INTO users (user_id, username, email, password_hash, role)
                VALUES ($1, $2, $2, '', 'admin')
                """,
                user,
                str(user),
            )
        yield connection


async def several(connection: asyncpg.Connection, hours: Any) -> list[int]:
    """Enter rows of these times; return their ids, the latest first."""
    made = [(at(hour), await insert(connection, timestamp=at(hour))) for hour in hours]
    return [log_id for _, log_id in sorted(made, reverse=True)]


async def test_pages_together_are_all_entries_the_latest_first(
    client: Client, connection: asyncpg.Connection
):
    made = await several(connection, (3, 1, 1, 1, 2, 5, 4, 1))
    for page_size in (0, 1, 2, 3, 7, 8, 1_000):
        assert await ids(client, page_size=page_size) == made


async def test_an_entry_is_told_as_it_is(
    client: Client, connection: asyncpg.Connection
):
    log_id = await insert(
        connection,
        timestamp=at(0.5),
        user_id=USERS[1],
        resource_id="momentum",
        old_value='{"a": [1, null, "x"]}',
        new_value="[true, {}]",
        ip_address="2001:db8::7",
        user_agent="curl",
        trace_id="7" * 32,
    )
    (entry,) = await listed(client)
    expected = pb.AuditLog(
        log_id=log_id,
        user_id=str(USERS[1]),
        username=str(USERS[1]),  # as it is called here
        action="update",
        resource_type="strategy",
        resource_id="momentum",
        ip_address="2001:db8::7",
        user_agent="curl",
        trace_id="7" * 32,
    )
    expected.time.FromDatetime(at(0.5))
    expected.old_value.struct_value.update({"a": [1, None, "x"]})
    expected.new_value.list_value.extend([True, {}])
    assert entry == expected


async def test_what_is_not_known_is_empty(
    client: Client, connection: asyncpg.Connection
):
    log_id = await insert(connection, timestamp=at(0))
    (entry,) = await listed(client)
    expected = pb.AuditLog(log_id=log_id, action="update", resource_type="strategy")
    expected.time.FromDatetime(at(0))
    assert entry == expected


# Of entries that are made of these, an hour apart.
MADE: list[dict[str, Any]] = [
    {"user_id": user, "action": action, "resource_type": type, "resource_id": id}
    for user, action, type, id in product(
        (None, *USERS[:2]), ("create", "TRADE"), ("order", "strategy"), ("a", "b", None)
    )
]


def column(name: str) -> str:
    """Return what a filter looks at. The users are called as their ids are."""
    return "user_id" if name == "usernames" else name.removesuffix("s")


FILTERS: list[dict[str, Any]] = [
    {},
    {"user_ids": USERS[:1]},
    {"user_ids": USERS[::-1]},
    {"user_ids": USERS[2:]},
    {"usernames": USERS[:1]},
    {"usernames": USERS[1:], "actions": ["create"]},
    {"usernames": ["nobody"]},
    {"actions": ["create"]},
    {"actions": ["TRADE", "none", "TRADE"]},
    {"resource_types": ["order"]},
    {"resource_types": ["strategy", "order"]},
    {"resource_ids": ["a"]},
    {"resource_ids": ["b", "a", "b"]},
    {"resource_ids": ["c"]},
    {"resource_types": ["order"], "resource_ids": ["b"]},
    {"user_ids": USERS[:2], "actions": ["TRADE"], "resource_types": ["order"],
     "resource_ids": ["a", "b"]},
]  # fmt: skip


async def test_a_filter_leaves_what_fits_all_of_it(
    client: Client, connection: asyncpg.Connection
):
    made = [
        (await insert(connection, timestamp=at(hour), **fields), fields)
        for hour, fields in enumerate(MADE)
    ]
    for wanted in FILTERS:
        expected = [
            log_id
            for log_id, fields in reversed(made)
            if all(fields[column(name)] in values for name, values in wanted.items())
        ]
        request = {name: list(map(str, values)) for name, values in wanted.items()}
        for page_size in (0, 3):
            assert await ids(client, page_size=page_size, **request) == expected, wanted


async def test_users_are_found_by_ids_and_by_names(
    client: Client, connection: asyncpg.Connection
):
    made = [
        await insert(connection, timestamp=at(-n), user_id=user)
        for n, user in enumerate(USERS)
    ]
    both = {"user_ids": [str(USERS[0])], "usernames": [str(USERS[1]), "nobody"]}
    assert await ids(client, **both) == made[:2]


WAYS: list[dict[str, Any]] = [
    {}, {"user_ids": [str(USERS[0])]}, {"resource_ids": ["a"]}
]  # fmt: skip


@pytest.mark.parametrize("wanted", WAYS, ids=["all", "user", "resource"])
async def test_a_range_includes_its_start_and_excludes_its_end(
    client: Client, connection: asyncpg.Connection, wanted: Any
):
    made = [
        await insert(
            connection, timestamp=at(hour // 2), user_id=USERS[0], resource_id="a"
        )
        for hour in range(12)
    ][::-1]
    for size in (0, 1, 5):
        some = wanted | {"page_size": size}
        found = await ids(client, start_time=at(1), end_time=at(4), **some)
        assert found == made[4:10]
        assert await ids(client, start_time=at(4), **some) == made[:4]
        assert await ids(client, end_time=at(1), **some) == made[10:]
        assert await ids(client, start_time=at(2), end_time=at(2), **some) == []


async def test_pages_do_not_shift_when_entries_come(
    client: Client, connection: asyncpg.Connection
):
    made = await several(connection, (1, 2, 2, 2, 3))
    first = await page(client, page_size=2)
    assert [entry.log_id for entry in first.audit_logs] == made[:2]
    # Entered late, of an earlier time; and of the time at which the page ends.
    (late,) = await several(connection, [1.5])
    await several(connection, (2, 4))
    rest = await ids(client, page_token=first.next_page_token)
    assert rest == [*made[2:4], late, made[4]]


async def test_an_entry_that_commits_after_a_later_one_is_in_its_place(
    client: Client, dsn: str, connection: asyncpg.Connection
):
    async with connected(dsn) as slow:
        transaction = slow.transaction()
        await transaction.start()
        early = await insert(slow, timestamp=at(1))
        others = [await insert(connection, timestamp=at(hour)) for hour in (0, 1, 2)]
        first = await page(client, page_size=1)
        await transaction.commit()
    assert early < min(others)
    rest = await ids(client, page_token=first.next_page_token)
    assert rest == [others[1], early, others[0]]


async def test_no_entry_is_missing_or_double_while_others_are_entered(
    client: Client, dsn: str, connection: asyncpg.Connection
):
    made = await several(connection, range(60))

    async def enter_more() -> None:
        async with connected(dsn) as other:
            for number in range(1_000):
                await insert(other, timestamp=at(number % 60), action="create")

    entering = asyncio.create_task(enter_more())
    while not entering.done():
        found = await listed(client, page_size=7)
        assert [entry.log_id for entry in found if entry.action == "update"] == made
        assert len({entry.log_id for entry in found}) == len(found)
    await entering


# --- Values that are large or strange -------------------------------------------------

LARGE = '"' + "x" * 250_000 + '"'
STRANGE = {
    "too large": '"' + "x" * (256 << 10) + '"',
    "too deep": "[" * 40 + "]" * 40,
    "much too deep": "[" * 3_000 + "]" * 3_000,
    "objects too deep": '{"a":' * 33 + "1" + "}" * 33,
    "a large number": "9" * 400,
    "a number of many digits": "9" * 5_000,
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
async def test_a_value_that_can_not_be_carried_says_so(
    client: Client, connection: asyncpg.Connection, value: str
):
    await several(connection, [0])
    await insert(connection, timestamp=at(1), old_value=value, new_value="1")
    entry, _ = await listed(client)
    assert entry.old_value.string_value == NOT_SHOWN
    assert entry.new_value.number_value == 1


async def test_what_a_configuration_may_hold_is_carried(
    client: Client, connection: asyncpg.Connection
):
    value = '{"value": ' + '{"a":' * 16 + "1" + "}" * 17
    await insert(connection, new_value=value)
    (entry,) = await listed(client)
    assert entry.new_value.WhichOneof("kind") == "struct_value"


async def test_a_page_of_large_entries_fits_a_message(
    client: Client, connection: asyncpg.Connection
):
    # On the wire these take the most for their length.
    dense = "[" + ", ".join("1" * 80_000) + "]"
    for value in (LARGE, dense):
        for hour in range(3):
            await insert(
                connection, timestamp=at(hour), old_value=value, new_value=value
            )
    found = await listed(client, page_size=1_000)
    assert len(found) == 6
    assert NOT_SHOWN not in {entry.new_value.string_value for entry in found}


async def test_a_page_ends_early_where_its_entries_are_large(
    client: Client, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "MAX_PAGE_BYTES", 30_000)
    sizes = (10_000, 10_000, 20_000, 40_000, 10)
    for hour, size in enumerate(sizes):
        await insert(connection, timestamp=at(-hour), new_value=f'"{"x" * size}"')
    lengths, token = [], ""
    for _ in range(4):
        response = await page(client, page_token=token)
        lengths.append(len(response.audit_logs))
        token = response.next_page_token
    assert (lengths, token) == ([2, 1, 1, 1], "")


# --- Refused --------------------------------------------------------------------------


async def test_a_page_token_of_another_query_is_refused(
    client: Client, connection: asyncpg.Connection
):
    await several(connection, range(5))
    token = (await page(client, page_size=2)).next_page_token
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", {})
    others: list[dict[str, Any]] = [
        {"page_token": token, "actions": ["update"]},
        {"page_token": token, "start_time": at(1)},
        {"page_token": token[:-4]},
        {"page_token": "nonsense"},
    ]
    for fields in others:
        assert await refused(page(client, **fields)) == expected


BOUND = "must lie between the years 1900 and 9999"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"user_ids": ["me"]}, "user_ids[0]", ID),
    ({"user_ids": [str(USERS[0])] * 101}, "user_ids", AT_MOST),
    ({"usernames": ["a"] * 101}, "usernames", AT_MOST),
    ({"usernames": [""]}, "usernames[0]", NAME),
    ({"actions": ["a"] * 101}, "actions", AT_MOST),
    ({"actions": ["a", ""]}, "actions[1]", NAME),
    ({"resource_types": ["a\0"]}, "resource_types[0]", NAME),
    ({"resource_types": ["a"] * 101}, "resource_types", AT_MOST),
    ({"resource_ids": ["a" * 201]}, "resource_ids[0]", NAME),
    ({"resource_ids": ["a"] * 101}, "resource_ids", AT_MOST),
    ({"page_size": -1}, "page_size", "must be 0 to 1,000"),
    ({"page_size": 1_001}, "page_size", "must be 0 to 1,000"),
    ({"start_time": {"seconds": 1 << 40}}, "start_time", BOUND),
    ({"end_time": {"nanos": -1}}, "end_time", BOUND),
    ({"start_time": {"nanos": 1}, "end_time": {}}, "end_time",
     "must not lie before start_time"),
]  # fmt: skip


async def test_a_bad_query_is_refused(client: Client):
    for fields, field, rule in BAD:
        assert await violations(page(client, **fields)) == [(field, rule)], fields


async def test_a_hundred_of_each_may_be_named(
    client: Client, connection: asyncpg.Connection
):
    names = [f"n{number}" for number in range(100)]
    made = await insert(connection, resource_type="n7", resource_id="n9", action="n3")
    wanted = {"actions": names, "resource_types": names, "resource_ids": names}
    assert await ids(client, **wanted) == [made]
