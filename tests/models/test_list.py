"""ListHeston, ListSabr and ListOu."""

from math import nextafter
from typing import Any

import grpc

from quantplane import Client
from tests.conftest import both_editions
from tests.models import (
    HESTON,
    MODELS,
    OU,
    SABR,
    at,
    refused,
    sabr,
    violations,
)


@both_editions
async def test_pages_together_are_all_rows_in_order_of_time(client: Client):
    for model in MODELS:
        rows = [model.row("A", hour) for hour in range(0, 3_000, 100)]
        await model.publish(client, [*reversed(rows), model.row("B", 50)])
        for page_size in (0, 1, 7, 30, 10_000):
            assert await model.listed(client, page_size=page_size) == rows


@both_editions
async def test_a_page_may_end_within_a_surface(client: Client):
    maturities = (0.25, 0.5, nextafter(0.5, 1), 1, 2)
    rows = [sabr("A", hour, maturity) for hour in range(3) for maturity in maturities]
    await SABR.publish(client, rows[::-1])
    for page_size in (1, 2, 4, 5, 7):
        assert await SABR.listed(client, page_size=page_size) == rows


async def test_a_range_includes_its_start_and_excludes_its_end(client: Client):
    for model in MODELS:
        rows = [model.row("A", hour) for hour in range(10)]
        await model.publish(client, rows)
        for page_size in (0, 2):
            fields = {"start_time": at(2), "end_time": at(5), "page_size": page_size}
            assert await model.listed(client, **fields) == rows[2:5]
        assert await model.listed(client, start_time=at(8)) == rows[8:]
        assert await model.listed(client, end_time=at(2)) == rows[:2]
        assert await model.listed(client, start_time=at(5), end_time=at(5)) == []


async def test_a_range_includes_every_maturity_at_its_start(client: Client):
    rows = [sabr("A", 1, maturity) for maturity in (5e-324, 1.7e308)]
    before = sabr("A", 1, 1.7e308)
    before.time.FromMicroseconds(before.time.ToMicroseconds() - 1)
    await SABR.publish(client, [before, *rows])
    assert await SABR.listed(client, start_time=at(1), page_size=1) == rows


async def test_pages_do_not_shift_when_rows_are_inserted(client: Client):
    for model in MODELS:
        await model.publish(client, [model.row("A", hour) for hour in range(0, 20, 2)])
        first = await model.page(client, page_size=4)
        await model.publish(client, [model.row("A", hour) for hour in (1, 7, 9)])
        second = await model.page(client, page_size=4, page_token=first.next_page_token)
        assert list(second.parameters) == [
            model.row("A", hour) for hour in (7, 8, 9, 10)
        ]


async def test_nothing_stored_is_an_empty_page(client: Client):
    page = await HESTON.page(client)
    assert not page.parameters
    assert not page.next_page_token


async def test_a_page_may_be_asked_for_in_another_size(client: Client):
    rows = [OU.row("A", hour) for hour in range(9)]
    await OU.publish(client, rows)
    token = (await OU.page(client, page_size=4)).next_page_token
    rest = await OU.page(client, page_size=100, page_token=token)
    assert list(rest.parameters) == rows[4:]


async def test_a_page_token_of_another_query_is_refused(client: Client):
    for model in HESTON, SABR:
        await model.publish(client, [model.row(n, h) for n in "AB" for h in range(9)])
    token = (await HESTON.page(client, page_size=4)).next_page_token
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")
    for call in (
        HESTON.page(client, "B", page_token=token),
        HESTON.page(client, start_time=at(1), page_token=token),
        HESTON.page(client, end_time=at(100), page_token=token),
        HESTON.page(client, page_token=token[:-4]),
        HESTON.page(client, page_token="nonsense"),
        SABR.page(client, page_token=token),
    ):
        assert await refused(call) == expected


async def test_a_bad_query_is_refused(client: Client):
    bad: list[tuple[str, dict[str, Any]]] = [
        ("name", {"name": ""}),
        ("name", {"name": "A" * 65}),
        ("page_size", {"page_size": -1}),
        ("page_size", {"page_size": 10_001}),
        ("start_time", {"start_time": {"seconds": 1 << 40}}),
        ("end_time", {"end_time": {"nanos": -1}}),
        ("end_time", {"start_time": {"nanos": 1}, "end_time": {}}),
    ]
    for model in MODELS:
        for field, fields in bad:
            found = await violations(model.page(client, **fields))
            assert [name for name, _ in found] == [field.replace("name", model.key)]
