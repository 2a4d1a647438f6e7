"""GetOptionChain and ListExpirations, and the plans of their queries."""

import asyncio
import json
from datetime import timedelta
from itertools import count
from typing import Any

import asyncpg
import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server.errors import InvalidRequest
from quantplane_server.options import checks, queries
from tests.conftest import Server, both_editions
from tests.options import (
    CALL,
    DAY,
    PUT,
    START,
    chain,
    get,
    merged,
    part,
    publish,
    quote,
    time,
)

NAN, INF = float("nan"), float("inf")


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


# --- As of a time -------------------------------------------------------------------


@both_editions
async def test_a_chain_is_read_as_of_any_time(client: Client):
    first = chain(0, quote(1.0), quote(2.0, bid=1.0))
    second = chain(10, quote(2.0, bid=2.0), quote(3.0))
    await publish(client, first, second)
    for minute, found in ((0, first), (9.999, first), (10, second), (11, second)):
        assert await get(client, as_of=minute) == merged([found])
    assert await get(client) == merged([second])


@both_editions
async def test_nothing_at_or_before_a_time_is_told(client: Client):
    await publish(client, chain(0, quote()))
    for call in (get(client, as_of=-0.001), get(client, "B"), get(client, "a")):
        error = await refused(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert reason_of(error) == "UNKNOWN_SYMBOL"
    request = pb.ListExpirationsRequest(underlying="A", as_of=time(-1))
    error = await refused(client.options.ListExpirations(request))
    assert reason_of(error) == "UNKNOWN_SYMBOL"


@both_editions
async def test_parts_change_the_contracts_that_they_hold(client: Client):
    sent = [
        chain(0, quote(1.0), quote(2.0, bid=1.0), quote(3.0)),
        part(1, quote(2.0, bid=2.0), quote(4.0)),
        part(2, quote(2.0), quote(3.0, ask=5.0)),
    ]
    await publish(client, *sent)
    for minute in (0, 1, 2):
        assert await get(client, as_of=minute) == merged(sent, as_of=minute)
    last = await get(client)
    assert last.time == time(2)
    assert [(row.strike, row.time) for row in last.contracts if row.time.seconds] == [
        (1.0, time(0)),
        (4.0, time(1)),
    ]


@both_editions
async def test_a_whole_chain_drops_what_it_does_not_list(client: Client):
    sent = [chain(0, quote(1.0), quote(2.0)), part(1, quote(3.0)), chain(2, quote(2.0))]
    await publish(client, *sent, part(3, quote(4.0)))
    assert [row.strike for row in (await get(client)).contracts] == [2.0, 4.0]


@both_editions
async def test_parts_without_a_whole_chain_add_up(client: Client):
    sent = [part(0, quote(1.0), quote(2.0)), part(1, quote(2.0, bid=1.0))]
    await publish(client, *sent)
    assert await get(client) == merged(sent)


@both_editions
async def test_an_expired_contract_is_left_out_from_the_next_day_on(client: Client):
    sent = [
        chain(0, quote(expiration="2024-03-01"), quote(expiration="2024-03-02")),
        part(1, quote(expiration="2024-03-04")),
        part(DAY, quote(expiration="2024-03-04")),
        part(2 * DAY, quote(expiration="2024-03-04")),
    ]
    await publish(client, *sent)
    for minute, left in ((1, 3), (DAY - 1, 3), (DAY, 2), (2 * DAY, 1), (9 * DAY, 1)):
        found = await get(client, as_of=minute)
        assert len(found.contracts) == left
        assert found == merged(sent, as_of=minute)


ROW = """
    INSERT INTO options_chains (underlying, time, expiration, strike, option_type)
    VALUES ('A', $1, '2024-04-19', $2, 'call')
"""


@both_editions
async def test_rows_that_were_not_published_are_a_chain_per_time(
    client: Client, server: Server
):
    conn = await asyncpg.connect(server.settings.postgres_dsn)
    for minute, strike in ((0, 1.0), (5, 2.0), (5, 3.0)):
        await conn.execute(ROW, START + timedelta(minutes=minute), strike)
    await conn.close()
    found = await get(client)
    assert found == merged([chain(5, quote(2.0), quote(3.0))])
    assert await get(client, as_of=4) == merged([chain(0, quote(1.0))])
    await publish(client, part(6, quote(3.0, bid=1.0)))
    expected = merged([chain(5, quote(2.0), quote(3.0)), part(6, quote(3.0, bid=1.0))])
    assert await get(client) == expected


# --- Filters ------------------------------------------------------------------------

STRIKES = [1e-300, 0.1, 0.3, 90.0, 99.99, 100.0, 110.0, 110.00000000000001, 1e300]
DATES = ["2024-03-01", "2024-03-02", "2024-04-19", "2025-01-17"]
DELTAS = [None, -1.0, -0.5, 0.0, 0.25, 0.5]
RATIOS = [-1.0, 0.0, 0.9, 0.9999, 1.0, 1.1, 2.9999999999999996, 3.0, 1e300]
MINUTES = [0, 1, DAY, DAY + 1, 2 * DAY]


def bounds(values: list[Any], low: str, high: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw none, one or both bounds."""
    bound = st.none() | st.sampled_from(values)

    def ordered(drawn: tuple[Any, Any]) -> dict[str, Any]:
        if None not in drawn:
            drawn = min(drawn), max(drawn)
        named = zip((low, high), drawn, strict=True)
        return {name: value for name, value in named if value is not None}

    return st.tuples(bound, bound).map(ordered)


moneyness = st.builds(
    lambda price, found: pb.Moneyness(underlying_price=price, **found),
    st.sampled_from([100.0, 0.1, 3.0, 1e-300, 1e300]),
    bounds(RATIOS, "min", "max"),
)
filters = st.builds(
    lambda money, kind, strikes, dates, deltas: pb.OptionFilter(
        moneyness=money, option_type=kind, **strikes, **dates, **deltas
    ),
    st.none() | moneyness,
    st.sampled_from([None, CALL, PUT]),
    bounds(STRIKES, "min_strike", "max_strike"),
    bounds(DATES, "min_expiration", "max_expiration"),
    bounds(DELTAS[1:], "min_delta", "max_delta"),
)  # fmt: skip
rows = st.builds(
    quote,
    st.sampled_from(STRIKES),
    st.sampled_from([CALL, PUT]),
    st.sampled_from(DATES),
    delta=st.sampled_from(DELTAS),
    bid=st.sampled_from([None, 0.0, 1.0]),
)


@st.composite
def published(draw: Any) -> list[pb.OptionChain]:
    sent = []
    for minute in draw(st.lists(st.sampled_from(MINUTES), min_size=1, max_size=6)):
        one = chain(minute, partial=draw(st.booleans()))
        today = one.time.ToDatetime().date().isoformat()
        drawn = draw(st.lists(rows, min_size=1, max_size=12, unique_by=key))
        one.contracts.extend(row for row in drawn if row.expiration >= today)
        if one.contracts:
            sent.append(one)
    return sent


def key(row: pb.OptionQuote) -> Any:
    return row.expiration, row.strike, row.option_type


names = (f"U{number}" for number in count())


@given(published(), st.lists(st.tuples(filters, st.sampled_from(MINUTES)), max_size=8))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_a_filtered_chain_equals_an_independent_one(
    client: Client,
    sent: list[pb.OptionChain],
    asked: list[tuple[pb.OptionFilter, float]],
):
    underlying = next(names)
    for one in sent:
        one.underlying = underlying
    await publish(client, *sent)
    earliest = min((one.time.ToNanoseconds() for one in sent), default=None)
    for wanted, minute in [*asked, (pb.OptionFilter(), MINUTES[-1])]:
        request = pb.GetOptionChainRequest(
            underlying=underlying, as_of=time(minute), filter=wanted
        )
        call = client.options.GetOptionChain(request)
        if earliest is None or time(minute).ToNanoseconds() < earliest:
            assert reason_of(await refused(call)) == "UNKNOWN_SYMBOL"
        else:
            assert (await call).chain == merged(sent, wanted, minute)


positive = st.floats(0, exclude_min=True, allow_infinity=False)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(positive, positive, finite)
@example(110.0, 100.0, 1.1)
@example(110.00000000000001, 100.0, 1.1)
@example(1e300, 1e-300, 1.7e308)
def test_bounds_on_moneyness_are_bounds_on_strike(
    strike: float, price: float, bound: float
):
    """Also for a strike whose quotient is the bound itself."""
    for limit in (bound, strike / price):
        if limit < INF:
            money = pb.Moneyness(underlying_price=price, min=limit, max=limit)
            low, high = queries.strikes(pb.OptionFilter(moneyness=money))
            assert (strike >= low) == (strike / price >= limit)
            assert (strike <= high) == (strike / price <= limit)


async def test_a_bound_on_delta_is_on_the_latest_row_and_leaves_out_unknown(
    client: Client,
):
    await publish(
        client,
        chain(0, quote(1.0, delta=0.5), quote(2.0, delta=0.0), quote(3.0, delta=0.5)),
        part(1, quote(1.0, delta=0.9), quote(3.0)),
    )
    assert [r.strike for r in (await get(client, max_delta=0.5)).contracts] == [2.0]
    assert [r.strike for r in (await get(client, min_delta=0.0)).contracts] == [1, 2]
    assert len((await get(client)).contracts) == 3


async def test_the_time_of_a_filtered_chain_is_that_of_the_whole(client: Client):
    await publish(client, chain(0, quote(1.0)), part(1, quote(2.0)))
    found = await get(client, max_strike=1.0)
    assert found.time == time(1)
    assert [row.time for row in found.contracts] == [time(0)]
    nothing = await get(client, max_strike=0.5)
    assert nothing == chain(1)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"underlying": ""}, "underlying"),
        ({"as_of": {"seconds": 1 << 40}}, "as_of"),
        ({"as_of": {"seconds": 1, "nanos": -1}}, "as_of"),
        *[
            ({"filter": {name: text}}, f"filter.{name}")
            for name in ("min_expiration", "max_expiration")
            for text in ("tomorrow", "20240419", "2024-02-30")
        ],
        *[
            ({"filter": {name: NAN}}, f"filter.{name}")
            for name in ("min_strike", "max_strike", "min_delta", "max_delta")
        ],
        *[
            ({"filter": {f"min_{of}": low, f"max_{of}": high}}, f"filter.max_{of}")
            for of, low, high in (
                ("expiration", "2024-03-02", "2024-03-01"),
                ("strike", 2.0, 1.0),
                ("delta", 0.0, -0.1),
            )
        ],
        ({"filter": {"option_type": 3}}, "filter.option_type"),
        *[
            (
                {"filter": {"moneyness": {"underlying_price": price}}},
                "filter.moneyness.underlying_price",
            )
            for price in (0.0, -1.0, NAN, INF)
        ],
        *[
            (
                {"filter": {"moneyness": {"underlying_price": 1.0} | bounds}},
                f"filter.moneyness.{name}",
            )
            for name, bounds in (
                ("min", {"min": NAN}),
                ("max", {"max": INF}),
                ("max", {"min": 2.0, "max": 1.0}),
            )
        ],
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_query_is_refused(fields: Any, field: str):
    with pytest.raises(InvalidRequest) as raised:
        checks.check_get(pb.GetOptionChainRequest(**({"underlying": "A"} | fields)))
    assert [name for name, _ in raised.value.violations] == [field]


# --- Expirations --------------------------------------------------------------------


@both_editions
async def test_expirations_are_those_of_the_chain(client: Client):
    sent = [
        chain(-1, quote(expiration="2024-12-20")),
        chain(
            0,
            quote(5.0, CALL, "2024-04-19"),
            quote(1.0, PUT, "2024-03-01"),
            quote(2.0, CALL, "2024-03-15"),
            quote(3.0, CALL, "2024-03-15"),
            quote(2.5, PUT, "2024-03-15"),
        ),
        part(1, quote(2.0, CALL, "2024-03-15", bid=1.0), quote(1.5, PUT, "2024-03-15")),
        part(DAY, quote(7.0, PUT, "2025-01-17")),
    ]
    await publish(client, *sent)
    request = pb.ListExpirationsRequest(underlying="A")
    response = await client.options.ListExpirations(request)
    assert response.time == time(DAY)
    assert [
        (e.date, e.calls, e.puts, e.min_strike, e.max_strike)
        for e in response.expirations
    ] == [
        ("2024-03-15", 2, 2, 1.5, 3.0),
        ("2024-04-19", 1, 0, 5.0, 5.0),
        ("2025-01-17", 0, 1, 7.0, 7.0),
    ]
    request.as_of.CopyFrom(time(0))
    response = await client.options.ListExpirations(request)
    assert response.time == time(0)
    assert [e.date for e in response.expirations] == [
        "2024-03-01",
        "2024-03-15",
        "2024-04-19",
    ]


async def test_every_violation_of_a_query_is_told_at_once(client: Client):
    wrong = {"underlying": "", "as_of": {"nanos": -1}}
    wanted = {"max_strike": INF, "moneyness": {}}
    fields = ["underlying", "as_of"]
    for call, told in (
        (
            client.options.GetOptionChain(
                pb.GetOptionChainRequest(**wrong, filter=wanted)
            ),
            [*fields, "filter.max_strike", "filter.moneyness.underlying_price"],
        ),
        (client.options.ListExpirations(pb.ListExpirationsRequest(**wrong)), fields),
    ):
        error = await refused(call)
        assert reason_of(error) == "INVALID_FIELD"
        assert [name for name, _ in violations_of(error)] == told


# --- Bounds, consistency, plans -----------------------------------------------------


async def test_more_contracts_than_an_answer_may_have_are_refused(client: Client):
    dates = ["2024-03-15", "2024-04-19"]
    many = [quote(1.0 + i, expiration=day) for day in dates for i in range(10_000)]
    await publish(client, chain(0, *many))
    assert len((await get(client)).contracts) == 20_000
    await publish(client, part(1, quote(0.5)))
    error = await refused(get(client))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(error) == "RESULT_TOO_LARGE"
    assert len((await get(client, min_expiration=dates[1])).contracts) == 10_001
    request = pb.SubscribeOptionChainRequest(underlyings=["A"])
    stream = aiter(client.options.SubscribeOptionChain(request))
    assert reason_of(await refused(anext(stream))) == "RESULT_TOO_LARGE"


@both_editions
async def test_a_reader_never_sees_half_a_chain(client: Client):
    """Each chain has its number on all of its contracts, and as many of them."""
    done = asyncio.Event()

    def numbered(number: int) -> pb.OptionChain:
        contracts = [quote(1.0 + i, bid=number) for i in range(100 + number)]
        return chain(number // 3, *contracts)  # thrice under one time

    async def feed() -> None:
        await publish(client, *map(numbered, range(1, 40)))
        done.set()

    await publish(client, numbered(0))
    feeding = asyncio.create_task(feed())
    while not done.is_set():
        found = await get(client)
        (number,) = {int(row.bid) for row in found.contracts}
        assert len(found.contracts) == 100 + number
        assert not any(row.HasField("time") for row in found.contracts)
    await feeding


@both_editions
async def test_queries_use_an_index_and_only_the_chunks_of_the_chain(dsn: str):
    conn = await asyncpg.connect(dsn)
    week = 7 * DAY
    rows = [quote(1.0 + i, expiration="2025-01-17") for i in range(300)]
    for number in range(12):
        for underlying in ("A", "B", "C", "D", "E"):
            at = START + timedelta(minutes=number * week)
            whole = number % 2 == 0
            await queries.note_chain(conn, underlying, at, whole=whole)
            await queries.store_contracts(conn, underlying, at, rows)
    await conn.execute(OTHER_TIMES)
    await conn.execute("ANALYZE options_chains; ANALYZE option_chain_times")
    as_of = START + timedelta(minutes=7.5 * week)  # a part, on the whole chain before
    seen: list[Any] = []
    with conn.query_logger(seen.append):
        span = await queries.span(conn, "A", as_of)
        assert span is not None
        assert (span.newest - span.base).days == 7
        found = await queries.contracts(conn, span, pb.OptionFilter(), 1_000)
        await queries.expirations(conn, span)
    assert len(found) == 300
    hypertable = await conn.fetchval("SELECT to_regclass('_timescaledb_catalog.chunk')")
    looked_up, *read = [await scans(conn, one.query, *one.args) for one in seen]
    assert sum(scan["Actual Rows"] for scan in looked_up) <= 3
    for scanned in read:
        assert len({scan["Relation Name"] for scan in scanned}) == 1 + bool(hypertable)
        assert sum(scan["Actual Rows"] for scan in scanned) == 600
        assert not any(scan.get("Rows Removed by Filter") for scan in scanned)
    await conn.close()


OTHER_TIMES = """
    INSERT INTO option_chain_times (underlying, time, whole)
    SELECT 'U' || i % 20, '2024-01-01'::timestamptz + i * INTERVAL '1 minute', i % 7 = 0
      FROM generate_series(1, 10000) AS i
"""


async def scans(conn: asyncpg.Connection, query: str, *args: Any) -> list[Any]:
    """Run a query; return what read a table in its plan, which must use an index."""
    plan = await conn.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *args)
    found = []
    nodes = [json.loads(plan)[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        assert node["Node Type"] != "Seq Scan"
        index = node.get("Index Name", "pkey")
        assert index.endswith(("pkey", "idx_options_underlying"))
        if "Relation Name" in node and node["Actual Loops"]:
            found.append(node)
    return found
