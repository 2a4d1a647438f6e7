"""PublishSignals: what may be published, once, and how it is kept."""

import asyncio
from collections.abc import Callable
from math import inf, nan, nextafter
from typing import Any

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.checks import AMOUNT, ID, SYMBOL, TIME
from quantplane_server.config import Settings
from quantplane_server.constraints import ONCE, RULES
from quantplane_server.db import Database
from quantplane_server.main import serving
from quantplane_server.signals.checks import (
    EMPTY,
    EXPIRATION,
    MAX_METADATA_BYTES,
    METADATA,
)
from quantplane_server.structs import MAX_DEPTH
from tests.admin import connected, vanish
from tests.conftest import both_editions
from tests.signals import (
    at,
    cancel,
    events,
    full,
    get,
    happened,
    ids,
    listed,
    publish,
    refused,
    signal,
    snapshot,
    stored,
    value,
    violations,
    waiting,
    watch,
)

REUSED = (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = [("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01")]


# --- Storing ------------------------------------------------------------------------


@both_editions
async def test_signals_come_back_as_they_were_and_active(client: Client):
    sent = [
        full(0),
        signal(3, signal_type=pb.SIGNAL_TYPE_SHORT, strength=0.0, confidence=1.0),
        signal(-9_000, signal_type=pb.SIGNAL_TYPE_EXIT_LONG, target_price=0.0),
        signal(1, signal_type=pb.SIGNAL_TYPE_EXIT_SHORT, metadata={}),
    ]
    published = await publish(client, *sent)
    assert published == [stored(one) for one in sent]
    assert [await get(client, one.signal_id) for one in sent] == published


async def test_each_signal_is_an_event_of_its_own(client: Client):
    responses = watch(client)
    await snapshot(responses)
    published = await publish(client, signal(0), full(1))
    received = await events(responses, 2)
    assert [event.signal for event in received] == published
    assert [event.revision for event in received] == [1, 2]
    assert {event.type for event in received} == {pb.SIGNAL_EVENT_TYPE_PUBLISHED}
    assert all(event.HasField("time") for event in received)


async def test_times_are_kept_in_microseconds_from_the_first_answer_on(client: Client):
    sent = signal()
    sent.time.FromNanoseconds(1_700_000_000_123_456_789)
    sent.expiration.FromNanoseconds(250_000_000_000_123_456_789)
    (published,) = await publish(client, sent)
    assert published.time.ToNanoseconds() == 1_700_000_000_123_456_000
    assert published.expiration.ToNanoseconds() == 250_000_000_000_123_456_000
    assert await publish(client, sent) == [published]


async def test_the_trace_of_the_call_is_on_the_signal_and_its_event(client: Client):
    responses = watch(client)
    await snapshot(responses)
    sent = signal()
    (published,) = await publish(client, sent, metadata=TRACED)
    assert published == stored(sent, trace_id=TRACE)
    assert await get(client, sent.signal_id) == published
    (event,) = await events(responses, 1)
    assert (event.trace_id, event.signal) == (TRACE, published)


async def test_a_thousand_signals_are_published_at_once(client: Client):
    sent = [signal(hour) for hour in range(1_000)]
    assert await publish(client, *sent) == [stored(one) for one in sent]
    assert len(await listed(client)) == 1_000


# --- Publishing again ---------------------------------------------------------------


@both_editions
async def test_the_same_again_returns_the_signals_as_they_are_now(
    client: Client, dsn: str
):
    sent = [full(0), full(1)]
    first = await publish(client, *sent, metadata=TRACED)
    cancelled = await cancel(client, sent[0].signal_id)
    before = await happened(dsn)
    assert await publish(client, *sent[::-1]) == [first[1], cancelled]
    assert await happened(dsn) == before


async def test_new_signals_are_published_beside_those_that_were(
    client: Client, dsn: str
):
    first, second = signal(0), signal(1)
    await publish(client, first)
    assert ids(await publish(client, second, first)) == ids([second, first])
    expected = [("PUBLISHED", first.signal_id), ("PUBLISHED", second.signal_id)]
    assert await happened(dsn) == expected


OTHERS: dict[str, Any] = {
    "time": at(0.001), "strategy_id": "t", "symbol": "B",
    "signal_type": pb.SIGNAL_TYPE_SHORT, "strength": 0.6, "confidence": 0.3,
    "target_price": 102, "stop_loss": 0.25, "expiration": at(1),
    "metadata": {"model": "m", "n": 4},
}  # fmt: skip


async def test_an_id_of_another_body_is_refused_and_nothing_changes(
    client: Client, dsn: str
):
    sent = full()
    (kept,) = await publish(client, sent)
    for field, other in OTHERS.items():
        reused = full(signal_id=sent.signal_id, **{field: other})
        call = publish(client, signal(), reused, signal())
        assert await refused(call) == (*REUSED, {"key": sent.signal_id}), field
    assert await listed(client) == [kept]
    assert await happened(dsn) == [("PUBLISHED", sent.signal_id)]
    assert await value(dsn, "SELECT count(*) FROM signal_keys") == 1


@both_editions
async def test_two_servers_that_publish_the_same_at_once_publish_it_once(
    settings: Settings, dsn: str
):
    sent = sorted([signal(), signal(), signal()], key=lambda one: one.signal_id)
    key = "INSERT INTO signal_keys (signal_id, time) VALUES ($1, now())"
    async with (
        serving(settings) as first,
        serving(settings) as second,
        Client(first) as one,
        Client(second) as other,
        connected(dsn) as holder,
        connected(dsn) as watcher,
    ):
        # Both meet at the second id: in different orders they would hold each other up.
        held = holder.transaction()
        await held.start()
        await holder.execute(key, sent[1].signal_id)
        calls = [asyncio.create_task(publish(one, *sent))]
        await waiting(watcher, 1)
        calls.append(asyncio.create_task(publish(other, *sent[::-1])))
        await waiting(watcher, 2)
        await held.rollback()
        answers = await asyncio.gather(*calls)
    expected = [stored(one) for one in sent]
    assert answers == [expected, expected[::-1]]
    assert await happened(dsn) == [("PUBLISHED", one.signal_id) for one in sent]


@both_editions
async def test_of_two_that_publish_an_id_at_once_one_wins(settings: Settings, dsn: str):
    id = signal().signal_id
    async with (
        serving(settings) as first,
        serving(settings) as second,
        Client(first) as one,
        Client(second) as other,
    ):
        calls = [
            publish(client, signal(signal_id=id, symbol=symbol))
            for client, symbol in ((one, "A"), (other, "B"), (one, "C"), (other, "D"))
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        ((winner,),) = [answer for answer in answers if isinstance(answer, list)]
        assert await get(one, id) == winner
    codes = {a.code() for a in answers if isinstance(a, grpc.aio.AioRpcError)}
    assert codes == {REUSED[0]}
    assert await happened(dsn) == [("PUBLISHED", id)]


@both_editions
async def test_a_signal_whose_row_is_gone_is_published_anew(client: Client, dsn: str):
    """Retention drops its chunk, and its key only later."""
    sent = signal()
    (first,) = await publish(client, sent)
    db = await Database.open(dsn)
    await vanish(db, "signals", sent.signal_id)
    await db.close()
    assert await publish(client, sent) == [first]
    assert await get(client, sent.signal_id) == first
    assert await happened(dsn) == [("PUBLISHED", sent.signal_id)] * 2


# --- Rules --------------------------------------------------------------------------


def timed(field: str, text: str) -> Callable[[], pb.Signal]:
    def make() -> pb.Signal:
        made = full()
        getattr(made, field).FromJsonString(text)
        return made

    return make


def without(field: str) -> Callable[[], pb.Signal]:
    def make() -> pb.Signal:
        made = full()
        made.ClearField(field)  # type: ignore[arg-type]
        return made

    return make


def ahead(seconds: int) -> Callable[[], pb.Signal]:
    def make() -> pb.Signal:
        made = full()
        made.time.GetCurrentTime()
        made.time.seconds += seconds
        return made

    return make


def nested(levels: int, list_at: int = 0) -> Any:
    """Return metadata of so many levels, one of them a list."""
    nest: Any = {}
    for level in range(levels - 1, 0, -1):
        nest = [nest] if level == list_at else {"a": nest}
    return nest


def sized(size: int) -> dict[str, str]:
    """Return metadata of so many bytes as JSON."""
    return {"a": "é" * ((size - 8) // 2) + "x" * (size % 2)}


def valueless() -> pb.Signal:
    made = full()
    made.metadata.fields["a"].list_value.values.add()
    return made


TYPE, STRENGTH, CONFIDENCE = (
    RULES[f"valid_{field}"][1] for field in ("signal_type", "strength", "confidence")
)
UP, DOWN = nextafter(1, 2), -5e-324
MICRO = "2024-01-01T00:00:00.000001Z"

BAD: list[tuple[str, Any, str]] = [
    ("signal_id", "x", ID),
    ("signal_id", "0195C6B0-0000-7000-8000-00000000000A", ID),
    ("signal_id", "0195c6b00000700080000000000000aa", ID),
    ("signal_id", "{0195c6b0-0000-7000-8000-00000000000a}", ID),
    ("strategy_id", "", SYMBOL),
    ("strategy_id", "a" * 65, SYMBOL),
    ("strategy_id", "a\0b", SYMBOL),
    ("symbol", "", SYMBOL),
    ("symbol", " A", SYMBOL),
    ("signal_type", 0, TYPE),
    ("signal_type", 5, TYPE),
    ("strength", UP, STRENGTH),
    ("strength", DOWN, STRENGTH),
    ("strength", nan, STRENGTH),
    ("confidence", UP, CONFIDENCE),
    ("confidence", DOWN, CONFIDENCE),
    ("confidence", nan, CONFIDENCE),
    *((field, price, AMOUNT) for field in ("target_price", "stop_loss")
      for price in (nan, inf, -inf, nextafter(1e15, inf), -nextafter(1e15, inf))),
    ("time", without("time"), TIME),
    ("time", timed("time", "1899-12-31T23:59:59Z"), TIME),
    ("time", ahead(86_420), TIME),
    ("expiration", timed("expiration", "2024-01-01T00:00:00Z"), EXPIRATION),
    ("expiration", timed("expiration", "2024-01-01T00:00:00.000000999Z"), EXPIRATION),
    ("expiration", timed("expiration", "2023-12-31T00:00:00Z"), EXPIRATION),
    ("expiration", {"seconds": 1 << 40}, EXPIRATION),
    ("expiration", {"seconds": 1 << 33, "nanos": -1}, EXPIRATION),
    ("metadata", {"a": nan}, METADATA),
    ("metadata", {"a": [1, {"b": inf}]}, METADATA),
    ("metadata", {"a": "\0"}, METADATA),
    ("metadata", {"a": {"\0": 1}}, METADATA),
    ("metadata", valueless, METADATA),
    ("metadata", sized(MAX_METADATA_BYTES + 1), METADATA),
    ("metadata", nested(MAX_DEPTH + 1), METADATA),
    ("metadata", nested(MAX_DEPTH + 1, MAX_DEPTH), METADATA),
    ("metadata", nested(MAX_DEPTH + 1, 4), METADATA),
    ("status", pb.SIGNAL_STATUS_ACTIVE, EMPTY),
    ("trace_id", TRACE, EMPTY),
]  # fmt: skip

GOOD: list[tuple[str, Any]] = [
    ("signal_id", "00000000-0000-0000-0000-000000000000"),
    ("signal_id", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    ("strategy_id", "é" * 64),
    ("strength", 0.0),
    ("strength", 1.0),
    ("confidence", 0.0),
    ("confidence", 1.0),
    ("target_price", 1e15),
    ("stop_loss", -1e15),
    ("time", timed("time", "1900-01-01T00:00:00Z")),
    ("time", ahead(86_380)),
    ("expiration", timed("expiration", MICRO)),
    ("expiration", timed("expiration", "9999-12-31T23:59:59.999999Z")),
    ("metadata", sized(MAX_METADATA_BYTES)),
    ("metadata", nested(MAX_DEPTH)),
    ("metadata", nested(MAX_DEPTH, 5)),
    ("metadata", {"a": "\\u0000", "": None}),
]


def made(field: str, value: Any) -> pb.Signal:
    return value() if callable(value) else full(**{field: value})


async def test_a_field_is_taken_within_its_rule(client: Client):
    sent = [made(*case) for case in GOOD]
    assert await publish(client, *sent) == [stored(one) for one in sent]


async def test_a_field_beyond_its_rule_is_named_and_nothing_changes(
    client: Client, dsn: str
):
    for field, bad, rule in BAD:
        found = await violations(publish(client, signal(), made(field, bad)))
        assert found == [(f"signals[1].{field}", rule)], (field, bad)
    assert await listed(client) == []
    assert await happened(dsn) == []


async def test_every_violation_of_a_request_is_told_at_once(client: Client):
    bad = pb.Signal(
        signal_id="x", strength=2, confidence=-1, target_price=inf, stop_loss=nan,
        metadata={"a": nan}, status=pb.SIGNAL_STATUS_EXPIRED, trace_id="x",
    )  # fmt: skip
    bad.expiration.seconds = -1
    assert await violations(publish(client, signal(), bad)) == [
        ("signals[1].signal_id", ID),
        ("signals[1].time", TIME),
        ("signals[1].strategy_id", SYMBOL),
        ("signals[1].symbol", SYMBOL),
        ("signals[1].signal_type", TYPE),
        ("signals[1].strength", STRENGTH),
        ("signals[1].confidence", CONFIDENCE),
        ("signals[1].target_price", AMOUNT),
        ("signals[1].stop_loss", AMOUNT),
        ("signals[1].expiration", EXPIRATION),
        ("signals[1].metadata", METADATA),
        ("signals[1].status", EMPTY),
        ("signals[1].trace_id", EMPTY),
    ]


async def test_each_id_is_given_once_in_a_request(client: Client):
    twice = signal()
    call = publish(client, twice, signal(), twice)
    assert await violations(call) == [("signals[2].signal_id", ONCE)]


async def test_a_request_has_1_to_1_000_signals(client: Client):
    expected = [("signals", "must be 1 to 1,000 signals")]
    assert await violations(publish(client)) == expected
    many = [signal() for _ in range(1_001)]
    assert await violations(publish(client, *many)) == expected
    assert await listed(client) == []


async def test_the_deepest_metadata_can_be_read_everywhere(client: Client):
    responses = watch(client)
    await snapshot(responses)
    (published,) = await publish(client, full(metadata=nested(MAX_DEPTH)))
    (event,) = await events(responses, 1)
    assert event.signal == published
    assert list((await snapshot(watch(client))).signals) == [published]
    assert await listed(client) == [published]


# --- Metadata -----------------------------------------------------------------------

characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
text = st.text(characters, max_size=8)
# JSONB knows no -0.
numbers = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
leaves = st.one_of(st.none(), st.booleans(), text, numbers)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(metadata=st.dictionaries(text, values, max_size=4))
async def test_metadata_comes_back_as_it_was(client: Client, metadata: Any):
    sent = signal(metadata=metadata)
    await publish(client, sent)
    assert (await get(client, sent.signal_id)).metadata == sent.metadata
