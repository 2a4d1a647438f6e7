"""ListSignals."""

from typing import Any

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL
from quantplane_server.constraints import FRACTION, RULES
from quantplane_server.signals import service
from quantplane_server.signals.checks import AT_MOST
from tests.conftest import both_editions
from tests.signals import (
    at,
    cancel,
    listed,
    page,
    publish,
    refused,
    signal,
    violations,
)

LONG, SHORT, EXIT = (
    pb.SIGNAL_TYPE_LONG,
    pb.SIGNAL_TYPE_SHORT,
    pb.SIGNAL_TYPE_EXIT_LONG,
)
ACTIVE, CANCELLED = pb.SIGNAL_STATUS_ACTIVE, pb.SIGNAL_STATUS_CANCELLED
SIZES = (0, 1, 2, 5, 7, 10_000)


def latest_first(signals: list[pb.Signal]) -> list[pb.Signal]:
    return sorted(signals, key=lambda s: (-s.time.ToNanoseconds(), s.signal_id))


@both_editions
async def test_pages_together_are_all_signals_the_latest_first(client: Client):
    # Months apart, and several of the same time.
    sent = [signal(hour) for hour in (0, 0, 0, 500, 2_000, 2_000, 9_000, -3_000)]
    published = latest_first(await publish(client, *sent))
    for page_size in SIZES:
        assert await listed(client, page_size=page_size) == published


# Of signals that are made of these.
FIELDS: list[dict[str, Any]] = [
    {
        "strategy_id": strategy, "symbol": symbol, "signal_type": type,
        "strength": strength, "time": at(hour),
    }
    for hour, (strategy, symbol, type, strength) in enumerate(
        (strategy, symbol, type, strength)
        for strategy in "stu" for symbol in "AB" for type in (LONG, SHORT)
        for strength in (0, 0.5)
    )
]  # fmt: skip
FILTERS: list[tuple[dict[str, Any], Any]] = [
    ({}, lambda s: True),
    ({"strategy_ids": ["s"]}, lambda s: s.strategy_id == "s"),
    ({"strategy_ids": ["s", "x", "u", "s"]}, lambda s: s.strategy_id in "su"),
    ({"symbols": ["B"]}, lambda s: s.symbol == "B"),
    ({"symbols": ["B", "A", "B"]}, lambda s: True),
    ({"signal_types": [SHORT, EXIT]}, lambda s: s.signal_type == SHORT),
    ({"signal_types": [EXIT]}, lambda s: False),
    ({"min_strength": 0.5}, lambda s: s.strength == 0.5),
    ({"min_strength": 0.51}, lambda s: False),
    ({"strategy_ids": ["x"]}, lambda s: False),
    (
        {"strategy_ids": ["t"], "symbols": ["A"], "signal_types": [LONG],
         "min_strength": 0.1},
        lambda s: (s.strategy_id, s.symbol, s.signal_type, s.strength)
        == ("t", "A", LONG, 0.5),
    ),
]  # fmt: skip


@both_editions
async def test_a_filter_leaves_what_fits_all_of_it(client: Client):
    published = await publish(client, *(signal(**fields) for fields in FIELDS))
    for wanted, fits in FILTERS:
        expected = [one for one in reversed(published) if fits(one)]
        for page_size in (0, 3):
            found = await listed(client, filter=wanted, page_size=page_size)
            assert found == expected, wanted


@both_editions
async def test_statuses_are_chosen_too(client: Client):
    published = await publish(client, *(signal(hour) for hour in range(4)))
    for one in published[:2]:
        one.CopyFrom(await cancel(client, one.signal_id))
    expected = published[::-1]
    assert await listed(client) == expected
    assert await listed(client, statuses=[ACTIVE]) == expected[:2]
    assert await listed(client, statuses=[CANCELLED]) == expected[2:]
    assert await listed(client, statuses=[CANCELLED, ACTIVE]) == expected
    assert await listed(client, statuses=[pb.SIGNAL_STATUS_EXPIRED]) == []
    wanted: Any = {"statuses": [CANCELLED], "filter": {"symbols": ["A"]}}
    assert await listed(client, page_size=1, **wanted) == expected[2:]


async def test_a_range_includes_its_start_and_excludes_its_end(client: Client):
    published = await publish(client, *(signal(hour) for hour in range(10)))
    expected = published[::-1]
    for filter in ({}, {"strategy_ids": ["s"]}, {"symbols": ["A"]}):
        for page_size in (0, 2):
            wanted: Any = {"filter": filter, "page_size": page_size}
            found = await listed(client, start_time=at(2), end_time=at(5), **wanted)
            assert found == expected[5:8]
        assert await listed(client, start_time=at(8), filter=filter) == expected[:2]
        assert await listed(client, end_time=at(2), filter=filter) == expected[8:]
        found = await listed(client, start_time=at(5), end_time=at(5), filter=filter)
        assert found == []


async def test_an_end_excludes_every_signal_of_its_time(client: Client):
    for id in ("0" * 8, "f" * 8):
        id = f"{id}-{id[:4]}-{id[:4]}-{id[:4]}-{id}{id[:4]}"
        await publish(client, signal(0, signal_id=id))
    assert await listed(client, end_time=at(0)) == []
    assert len(await listed(client, start_time=at(0))) == 2


@pytest.mark.parametrize("wanted", [{}, {"strategy_ids": ["s"]}], ids=["all", "some"])
async def test_pages_do_not_shift_when_signals_are_published(
    client: Client, wanted: Any
):
    published = await publish(client, *(signal(hour) for hour in range(0, 20, 2)))
    first = await page(client, filter=wanted, page_size=4)
    assert list(first.signals) == published[:5:-1]
    (inserted,) = await publish(client, signal(11))
    await publish(client, signal(13), signal(99))
    token = first.next_page_token
    second = await page(client, filter=wanted, page_size=4, page_token=token)
    assert list(second.signals) == [inserted, *published[5:2:-1]]


async def test_a_page_may_be_asked_for_in_another_size(client: Client):
    published = await publish(client, *(signal(hour) for hour in range(9)))
    token = (await page(client, page_size=4)).next_page_token
    rest = await page(client, page_size=100, page_token=token)
    assert list(rest.signals) == published[4::-1]


async def test_a_page_ends_early_where_its_signals_are_large(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "PAGE_BYTES", 30_000)
    large = [signal(hour, metadata={"a": "x" * 10_000}) for hour in range(7)]
    published = await publish(client, *large)
    assert len((await page(client)).signals) == 3
    assert await listed(client) == published[::-1]


async def test_a_page_token_of_another_query_is_refused(client: Client):
    await publish(client, *(signal(hour) for hour in range(9)))
    token = (await page(client, page_size=4)).next_page_token
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN", {})
    others: list[dict[str, Any]] = [
        {"page_token": token, "filter": {"symbols": ["A"]}},
        {"page_token": token, "statuses": [ACTIVE]},
        {"page_token": token, "start_time": at(1)},
        {"page_token": token, "end_time": at(100)},
        {"page_token": token[:-4]},
        {"page_token": "nonsense"},
    ]
    for fields in others:
        assert await refused(page(client, **fields)) == expected


TYPE, STATUS = (RULES[f"valid_signal_{field}"][1] for field in ("type", "status"))
NAMES = [f"S{number}" for number in range(1_001)]
BAD_FILTERS: list[tuple[dict[str, Any], str, str]] = [
    ({"strategy_ids": ["a", ""]}, "strategy_ids[1]", SYMBOL),
    ({"strategy_ids": NAMES}, "strategy_ids", AT_MOST),
    ({"symbols": [" A"]}, "symbols[0]", SYMBOL),
    ({"symbols": ["A\0"]}, "symbols[0]", SYMBOL),
    ({"symbols": NAMES}, "symbols", AT_MOST),
    ({"signal_types": [0]}, "signal_types[0]", TYPE),
    ({"signal_types": [LONG, 9]}, "signal_types[1]", TYPE),
    ({"signal_types": [LONG] * 1_001}, "signal_types", AT_MOST),
    ({"min_strength": 1.01}, "min_strength", FRACTION),
    ({"min_strength": -0.01}, "min_strength", FRACTION),
    ({"min_strength": float("nan")}, "min_strength", FRACTION),
]
BOUND = "must lie between the years 1900 and 9999"
BAD: list[tuple[dict[str, Any], str, str]] = [
    *(({"filter": bad}, f"filter.{at}", rule) for bad, at, rule in BAD_FILTERS),
    ({"statuses": [0]}, "statuses[0]", STATUS),
    ({"statuses": [ACTIVE, 7]}, "statuses[1]", STATUS),
    ({"statuses": [ACTIVE] * 1_001}, "statuses", AT_MOST),
    ({"page_size": -1}, "page_size", "must be 0 to 10,000"),
    ({"page_size": 10_001}, "page_size", "must be 0 to 10,000"),
    ({"start_time": {"seconds": 1 << 40}}, "start_time", BOUND),
    ({"end_time": {"nanos": -1}}, "end_time", BOUND),
    ({"start_time": {"nanos": 1}, "end_time": {}}, "end_time",
     "must not lie before start_time"),
]  # fmt: skip


async def test_a_bad_query_is_refused(client: Client):
    for fields, field, rule in BAD:
        assert await violations(page(client, **fields)) == [(field, rule)], fields


async def test_a_filter_may_name_a_thousand_of_each(client: Client):
    (published,) = await publish(client, signal(0, strategy_id="S7", symbol="S9"))
    many = {"strategy_ids": NAMES[:1_000], "symbols": NAMES[:1_000],
            "signal_types": [LONG] * 1_000}  # fmt: skip
    assert await listed(client, filter=many) == [published]
