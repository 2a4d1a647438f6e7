"""PublishOptionChain: what it stores, and what it refuses."""

import asyncio
from typing import Any

import asyncpg
import grpc
import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server import constraints
from quantplane_server.errors import InvalidRequest
from quantplane_server.options import checks, queries
from tests.conftest import Server, both_editions
from tests.market_data import Sender
from tests.options import (
    CALL,
    PUT,
    START,
    VALUES,
    chain,
    get,
    merged,
    part,
    publish,
    quote,
)

NAN, INF = float("nan"), float("inf")


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


@both_editions
async def test_a_chain_comes_back_as_it_was_published(client: Client):
    rows = [quote(strike, kind) for strike in (90.0, 100.5) for kind in (CALL, PUT)]
    for i, field in enumerate(VALUES):  # absent is not 0
        rows += [quote(200.0 + i, **{field: 0}), quote(300.0 + i, **{field: 3})]
    rows += [quote(1.0, expiration="2024-03-01"), quote(1.0, expiration="9999-12-31")]
    whole = chain(0, *rows)
    await publish(client, whole)
    assert await get(client) == merged([whole])


@both_editions
async def test_a_chain_published_again_replaces_the_one_of_its_time(client: Client):
    first = chain(0, quote(1.0, bid=1.0, delta=0.5), quote(2.0), quote(3.0))
    other = chain(0, quote(1.0), underlying="B")
    await publish(client, first, other)
    again = chain(0, quote(1.0, bid=2.0), quote(4.0))
    await publish(client, again)
    assert await get(client) == merged([again])
    assert await get(client, "B") == merged([other])


@both_editions
async def test_a_part_of_a_chain_leaves_the_other_contracts_of_its_time(
    client: Client,
):
    sent = [chain(-1, quote(9.0)), chain(0, quote(1.0), quote(2.0, bid=1.0))]
    sent += [part(0, quote(2.0, bid=2.0), quote(3.0))]
    await publish(client, *sent)
    assert await get(client) == merged(sent)
    assert [row.strike for row in (await get(client)).contracts] == [1.0, 2.0, 3.0]


async def test_the_database_keeps_microseconds(client: Client):
    whole = chain(0, quote())
    whole.time.nanos = 123_456_789
    await publish(client, whole)
    assert (await get(client)).time.nanos == 123_456_000


async def test_batches_out_of_order_are_refused(client: Client):
    for numbers in ((2,), (0,), (1, 1), (1, 3)):
        sender = Sender(client.options.PublishOptionChain())
        for number in numbers:
            request = pb.PublishOptionChainRequest(
                batch=number, chain=chain(0, quote())
            )
            await sender.send(request)
        for _ in numbers[1:]:
            await sender.next()
        assert reason_of(await refused(sender.next())) == "OUT_OF_ORDER"


@both_editions
async def test_a_bad_batch_changes_nothing_and_those_before_it_are_stored(
    client: Client,
):
    sender = Sender(client.options.PublishOptionChain())
    first = chain(0, quote(1.0), quote(2.0))
    bad = chain(0, quote(1.0, bid=2.0), quote(-3.0))
    for number, one in enumerate((first, bad), 1):
        await sender.send(pb.PublishOptionChainRequest(batch=number, chain=one))
    await sender.next()
    error = await refused(sender.next())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_FIELD"
    assert await get(client) == merged([first])


async def test_every_violation_is_told_at_once(client: Client):
    greeks = {name: NAN for name in ("delta", "gamma", "theta", "vega", "rho")}
    bad = chain(
        0,
        quote(0.0, pb.OPTION_TYPE_UNSPECIFIED, "tomorrow"),
        quote(bid=NAN, ask=INF, last_price=-INF, volume=-1, open_interest=-1),
        quote(101.0, implied_vol=-0.1, **greeks),
        quote(102.0),
        quote(102.0),
        underlying=" A",
    )
    sender = Sender(client.options.PublishOptionChain())
    await sender.send(pb.PublishOptionChainRequest(batch=1, chain=bad))
    error = await refused(sender.next())
    at = "chain.contracts"
    names = (
        ["expiration", "strike", "option_type"],
        ["volume", "open_interest", "bid", "ask", "last_price"],
        ["implied_vol", *greeks],
    )
    fields = [f"{at}[{i}].{name}" for i, found in enumerate(names) for name in found]
    told = [field for field, _ in violations_of(error)]
    assert told == ["chain.underlying", *fields, f"{at}[4]"]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (chain(0), "chain.contracts"),
        (pb.OptionChain(underlying="A", contracts=[quote()]), "chain.time"),
        (pb.OptionChain(), "chain.underlying"),
        (chain(10**9, quote(expiration="9999-12-31")), "chain.time"),
        (chain(0, quote(), underlying=""), "chain.underlying"),
        (chain(0, quote(), underlying="A" * 65), "chain.underlying"),
        *[
            (chain(0, quote(expiration=text)), "chain.contracts[0].expiration")
            for text in ("", "20240419", "2024-W16-5", "2024-02-30", "2024-02-29")
        ],
        *[
            (chain(0, quote(strike)), "chain.contracts[0].strike")
            for strike in (0.0, -1.0, NAN, INF)
        ],
        *[
            (chain(0, quote(option_type=number)), "chain.contracts[0].option_type")
            for number in (0, 3)
        ],
        (chain(0, quote(implied_vol=NAN)), "chain.contracts[0].implied_vol"),
        (chain(0, quote(), quote()), "chain.contracts[1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_chain_is_refused(bad: pb.OptionChain, field: str):
    with pytest.raises(InvalidRequest) as raised:
        checks.check_publish(pb.PublishOptionChainRequest(batch=1, chain=bad))
    assert raised.value.violations[0][0] == field


def test_finite_numbers_whose_sum_is_not_are_accepted():
    row = quote(bid=1.7e308, ask=1.7e308, theta=-1.7e308, rho=-5.0)
    checks.check_publish(pb.PublishOptionChainRequest(batch=1, chain=chain(0, row)))


def test_no_more_than_the_limit_is_accepted():
    rows = [quote(1.0 + i) for i in range(checks.MAX_CONTRACTS + 1)]
    checks.check_publish(
        pb.PublishOptionChainRequest(batch=1, chain=chain(0, *rows[:-1]))
    )
    with pytest.raises(InvalidRequest):
        checks.check_publish(
            pb.PublishOptionChainRequest(batch=1, chain=chain(0, *rows))
        )


@both_editions
async def test_the_database_refuses_what_the_checks_refuse_in_the_same_words(dsn: str):
    bad = [quote(strike) for strike in (0.0, -1.0, NAN, INF)]
    bad += [quote(option_type=pb.OPTION_TYPE_UNSPECIFIED)]
    bad += [quote(expiration="2024-02-29")]
    conn = await asyncpg.connect(dsn)
    for row in bad:
        with pytest.raises(InvalidRequest) as checked:
            request = pb.PublishOptionChainRequest(batch=1, chain=chain(0, row))
            checks.check_publish(request)
        with pytest.raises(asyncpg.CheckViolationError) as raised:
            await queries.store_contracts(conn, "A", START, [row])
        refusal = constraints.refusal(raised.value)
        assert refusal is not None
        ((field, rule),) = checked.value.violations
        assert refusal.violations == [(field.rpartition(".")[2], rule)]
    await conn.close()


@both_editions
async def test_two_who_publish_one_chain_at_the_same_time_leave_one_of_them(
    client: Client, server: Server
):
    """Both have begun before either can store a row."""
    first = chain(0, *[quote(1.0 + i, bid=1.0) for i in range(50)])
    second = chain(0, *[quote(30.0 + i, bid=2.0) for i in range(50)])
    holder = await asyncpg.connect(server.settings.postgres_dsn)
    watcher = await asyncpg.connect(server.settings.postgres_dsn)
    async with holder.transaction():
        await holder.execute("LOCK TABLE options_chains IN SHARE MODE")
        both = [asyncio.create_task(publish(client, c)) for c in (first, second)]
        while await watcher.fetchval(WAITING) < 2:
            await asyncio.sleep(0.01)
    await asyncio.gather(*both)
    await holder.close()
    await watcher.close()
    assert await get(client) in (merged([first]), merged([second]))


WAITING = """
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


async def test_a_contract_may_expire_on_the_day_of_its_chain_in_utc(client: Client):
    late = chain(9 * 60 - 1, quote(expiration="2024-03-01"))  # a minute to midnight
    await publish(client, late)
    assert await get(client) == merged([late])
    next_day = chain(9 * 60, quote(expiration="2024-03-01"))
    error = await refused(publish(client, next_day))
    assert violations_of(error)[0][0] == "chain.contracts[0].expiration"
