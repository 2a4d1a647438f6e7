"""The stream contract of SubscribeOptionChain, over the wire."""

import asyncio
from itertools import count
from typing import Any

import asyncpg
import grpc
import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server import watch
from quantplane_server.config import Settings
from quantplane_server.embedded import Valkey
from quantplane_server.errors import InvalidRequest
from quantplane_server.main import serving
from quantplane_server.options import checks
from tests.conftest import Server, both_editions
from tests.market_data import kind
from tests.options import (
    CALL,
    DAY,
    PUT,
    Reader,
    chain,
    merged,
    part,
    publish,
    quote,
    time,
)

ACTIVE, NO_DATA = pb.KEY_STATE_ACTIVE, pb.KEY_STATE_NO_DATA


async def refused(reader: Reader) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        while True:
            await reader.next()
    return raised.value


async def beginning(reader: Reader) -> list[str]:
    """Read on to SnapshotComplete; return what came."""
    kinds = [kind(await reader.next())]
    while kinds[-1] != "snapshot_complete":
        kinds.append(kind(await reader.next()))
    return kinds


# --- Snapshot and changes -----------------------------------------------------------


@both_editions
async def test_a_subscriber_gets_whole_chains_then_the_contracts_that_change(
    client: Client,
):
    sent = [chain(0, quote(1.0), quote(2.0, bid=1.0), quote(3.0, bid=0.0))]
    await publish(client, *sent, part(0, quote(5.0), underlying="B"))
    reader = Reader(client, "A", "B", "A")
    subscribed = await reader.next()
    keys = subscribed.event.subscribed.keys
    assert [(key.key, key.state) for key in keys] == [("A", ACTIVE), ("B", ACTIVE)]
    for underlying in ("A", "B"):
        snapshot = await reader.next()
        assert [(c.underlying, c.partial) for c in snapshot.chains] == [
            (underlying, False)
        ]
    assert reader.chains["A"] == merged(sent)
    assert kind(await reader.next()) == "snapshot_complete"

    sent.append(part(1, quote(2.0, bid=2.0), quote(4.0)))
    await publish(client, sent[-1])
    (changed,) = (await reader.next("data")).chains
    assert changed == part(1, quote(2.0, bid=2.0), quote(4.0))
    assert reader.chains["A"] == merged(sent)


async def test_a_chain_that_lists_less_replaces_the_one_before(client: Client):
    await publish(client, chain(0, quote(1.0), quote(2.0)))
    reader = Reader(client, "A")
    await beginning(reader)
    await publish(client, chain(1, quote(2.0)))
    (replaced,) = (await reader.next("data")).chains
    assert replaced == chain(1, quote(2.0))


async def test_a_filter_holds_for_what_changes_too(client: Client):
    await publish(
        client, chain(0, quote(1.0, delta=0.5), quote(2.0, delta=0.5), quote(3.0, PUT))
    )
    wanted = pb.OptionFilter(option_type=CALL, min_delta=0.4)
    reader = Reader(client, "A", filter=wanted)
    await beginning(reader)
    assert [row.strike for row in reader.chains["A"].contracts] == [1.0, 2.0]
    await publish(client, part(1, quote(2.0, delta=0.3), quote(3.0, PUT, delta=0.5)))
    (replaced,) = (await reader.next("data")).chains
    assert not replaced.partial
    assert replaced.time == time(1)
    assert [row.strike for row in replaced.contracts] == [1.0]


async def test_each_reader_has_its_own_filter(client: Client):
    await publish(client, chain(0, quote(1.0), quote(2.0)))
    bounds = pb.OptionFilter(max_strike=1.0), pb.OptionFilter(min_strike=2.0)
    low, high = (Reader(client, "A", filter=wanted) for wanted in bounds)
    await beginning(low)
    await beginning(high)
    await publish(client, part(1, quote(2.0, bid=1.0)))
    await low.until(merged([chain(0, quote(1.0)), part(1)]))
    await high.until(chain(1, quote(2.0, bid=1.0)))


async def test_contracts_that_expire_with_a_change_are_gone(client: Client):
    sent = [chain(0, quote(expiration="2024-03-01"), quote(expiration="2024-03-15"))]
    await publish(client, *sent)
    reader = Reader(client, "A")
    await beginning(reader)
    sent.append(part(DAY, quote(101.0)))
    await publish(client, sent[-1])
    await reader.until(merged(sent))
    assert [row.strike for row in reader.chains["A"].contracts] == [100.0, 101.0]


async def test_an_unknown_underlying_is_delivered_once_it_comes(client: Client):
    reader = Reader(client, "A")
    (status,) = (await reader.next()).event.subscribed.keys
    assert (status.key, status.state) == ("A", NO_DATA)
    assert kind(await reader.next()) == "snapshot_complete"
    await publish(client, chain(0, quote()))
    await reader.until(chain(0, quote()))


async def test_a_chain_that_is_deleted_is_delivered_as_none(
    client: Client, server: Server
):
    await publish(client, chain(0, quote()), chain(0, quote(), underlying="B"))
    reader = Reader(client, "A", "B")
    await beginning(reader)
    conn = await asyncpg.connect(server.settings.postgres_dsn)
    await conn.execute("DELETE FROM options_chains")
    await conn.execute("DELETE FROM option_chain_times")
    await conn.close()
    await beginning(Reader(client, "A", "B"))  # for which both are read again
    await reader.until(pb.OptionChain(underlying="A"))
    await reader.until(pb.OptionChain(underlying="B"))


async def test_a_change_published_through_another_server_arrives(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "REFRESH_S", 3_600)  # it arrives for it is announced
    await publish(client, chain(0, quote()))
    reader = Reader(client, "A")
    await beginning(reader)
    async with serving(server.settings) as target, Client(target) as other:
        await publish(other, part(1, quote(bid=1.0)))
        await reader.until(chain(1, quote(bid=1.0)))


async def test_a_change_that_is_not_announced_arrives_too(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(watch, "REFRESH_S", 0.2)
    await publish(client, chain(0, quote(1.0), quote(2.0)))
    reader = Reader(client, "A")
    await beginning(reader)
    conn = await asyncpg.connect(server.settings.postgres_dsn)
    await conn.execute("DELETE FROM options_chains WHERE strike = 2.0")
    await conn.close()
    await reader.until(chain(0, quote(1.0)))


async def test_chains_that_come_faster_than_they_are_read_are_merged(client: Client):
    """Each is more than the window between server and reader holds."""
    contracts = [quote(1.0 + i) for i in range(3_000)]
    await publish(client, chain(0, *contracts))
    reader = Reader(client, "A")
    await beginning(reader)
    total = 12
    for number in range(1, total + 1):
        for row in contracts:
            row.bid = number
        await publish(client, part(number, *contracts))
    seen = 0
    while reader.chains["A"] != chain(total, *contracts):
        await reader.next("data")
        seen += 1
    assert seen < total


@both_editions
async def test_a_subscriber_never_sees_half_a_chain(client: Client):
    def numbered(number: int) -> pb.OptionChain:
        contracts = [quote(1.0 + i, bid=number) for i in range(100 + number)]
        return chain(number // 3, *contracts)  # thrice under one time

    last = 30
    await publish(client, numbered(0))
    reader = Reader(client, "A")
    feeding = asyncio.create_task(publish(client, *map(numbered, range(1, last + 1))))
    while reader.chains.get("A") != numbered(last):
        await reader.next("data")
        (number,) = {int(row.bid) for row in reader.chains["A"].contracts}
        assert reader.chains["A"] == numbered(number)
    await feeding


contracts = st.lists(
    st.builds(
        quote,
        st.sampled_from([1.0, 2.0, 3.0, 4.0]),
        delta=st.sampled_from([None, 0.1, 0.9]),
    ),
    min_size=1,
    unique_by=lambda row: row.strike,
)
names = (f"U{number}" for number in count())
steps = st.lists(st.tuples(st.booleans(), contracts), min_size=1, max_size=6)


@given(steps, st.sampled_from([{}, {"min_delta": 0.5}, {"max_strike": 2.0}]))
@hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_what_was_delivered_makes_what_would_be_read(
    client: Client, sent: list[tuple[bool, list[pb.OptionQuote]]], wanted: Any
):
    underlying = next(names)
    bounds = pb.OptionFilter(**wanted)
    chains = [
        chain(minute, *rows, partial=partial, underlying=underlying)
        for minute, (partial, rows) in enumerate(sent)
    ]
    reader = Reader(client, underlying, filter=bounds)
    await beginning(reader)
    for number, one in enumerate(chains, 1):
        await publish(client, one)
        await reader.until(merged(chains[:number], bounds))
    reader.call.cancel()


# --- Tokens -------------------------------------------------------------------------


async def test_no_token_comes_before_the_snapshot_is_complete(client: Client):
    await publish(client, chain(0, quote()), chain(0, quote(), underlying="B"))
    reader = Reader(client, "A", "B")
    for wanted in ("subscribed", "data", "data"):
        response = await reader.next()
        assert kind(response) == wanted
        assert not response.resume_token
    complete = await reader.next()
    assert kind(complete) == "snapshot_complete"
    assert complete.resume_token


async def test_a_resumed_reader_gets_no_snapshot_if_nothing_changed(
    client: Client, server: Server
):
    await publish(client, chain(0, quote()))
    reader = Reader(client, "A", "B")
    await beginning(reader)
    await publish(client, part(1, quote(bid=1.0)))
    token = (await reader.next("data")).resume_token
    nothing = ["subscribed", "snapshot_complete"]
    again = Reader(client, "A", "B", resume_token=token)
    assert await beginning(again) == nothing
    async with serving(server.settings) as target, Client(target) as other:
        elsewhere = Reader(other, "A", "B", resume_token=again.token)
        assert await beginning(elsewhere) == nothing
    await publish(client, part(2, quote(bid=2.0)))
    (changed,) = (await again.next("data")).chains
    assert changed == chain(2, quote(bid=2.0))


async def test_a_resumed_reader_gets_a_snapshot_if_something_changed(client: Client):
    await publish(client, chain(0, quote(1.0), quote(2.0)))
    reader = Reader(client, "A")
    await beginning(reader)
    reader.call.cancel()
    await publish(client, chain(1, quote(2.0)))
    again = Reader(client, "A", resume_token=reader.token)
    assert await beginning(again) == ["subscribed", "data", "snapshot_complete"]
    assert again.chains["A"] == chain(1, quote(2.0))


async def test_a_token_of_another_request_is_refused(client: Client):
    reader = Reader(client, "A")
    await beginning(reader)
    token = reader.token
    call = {"option_type": CALL}
    for other in (
        Reader(client, "B", resume_token=token),
        Reader(client, "A", "B", resume_token=token),
        Reader(client, "A", resume_token=token, filter=pb.OptionFilter(**call)),
        Reader(client, "A", resume_token=token[:-1]),
        Reader(client, "A", resume_token=b"nonsense"),
    ):
        assert reason_of(await refused(other)) == "INVALID_RESUME_TOKEN"
    same = Reader(client, "A", resume_token=token, heartbeat_interval={"seconds": 1})
    assert await beginning(same) == ["subscribed", "snapshot_complete"]


# --- Heartbeats, ends, faults -------------------------------------------------------


async def test_a_heartbeat_carries_the_token(client: Client):
    reader = Reader(client, "A", heartbeat_interval={"seconds": 1})
    await beginning(reader)
    beat = await reader.next("heartbeat")
    assert beat.resume_token == reader.token
    again = Reader(client, "A", resume_token=beat.resume_token)
    assert await beginning(again) == ["subscribed", "snapshot_complete"]


async def test_draining_says_goodbye_with_a_token_that_goes_on(
    client: Client, server: Server
):
    await publish(client, chain(0, quote()))
    async with serving(server.settings) as target:
        leaving = Client(target)
        reader = Reader(leaving, "A")
        await beginning(reader)
        goodbye = asyncio.create_task(reader.next("goodbye"))
    said = (await goodbye).event.goodbye
    assert said.reason == pb.GOODBYE_REASON_DRAINING
    await leaving.close()
    again = Reader(client, "A", resume_token=reader.token)
    assert await beginning(again) == ["subscribed", "snapshot_complete"]


async def test_streams_beyond_the_limit_are_refused(server: Server):
    few = server.settings.model_copy(update={"max_streams": 1})
    async with serving(few) as target, Client(target) as client:
        await beginning(Reader(client, "A"))
        assert reason_of(await refused(Reader(client, "A"))) == "TOO_MANY_STREAMS"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"underlyings": []}, "underlyings"),
        ({"underlyings": [f"U{i}" for i in range(101)]}, "underlyings"),
        ({"underlyings": ["A", ""]}, "underlyings[1]"),
        ({"heartbeat_interval": {"nanos": 1}}, "heartbeat_interval"),
        ({"heartbeat_interval": {"seconds": 61}}, "heartbeat_interval"),
        ({"filter": {"min_expiration": "soon"}}, "filter.min_expiration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_subscription_is_refused(fields: Any, field: str):
    request = pb.SubscribeOptionChainRequest(**({"underlyings": ["A"]} | fields))
    with pytest.raises(InvalidRequest) as raised:
        checks.check_subscription(request)
    assert [name for name, _ in raised.value.violations] == [field]


async def test_a_bad_subscription_is_told_why(client: Client):
    error = await refused(Reader(client))
    assert reason_of(error) == "INVALID_FIELD"
    assert [name for name, _ in violations_of(error)] == ["underlyings"]


async def test_changes_arrive_whatever_becomes_of_the_bus(settings: Settings):
    async with Valkey() as valkey:
        own = settings.model_copy(update={"redis_url": valkey.url})
        async with (
            serving(own) as target,
            serving(own) as second,
            Client(target) as client,
            Client(second) as other,
        ):
            await publish(client, chain(0, quote()))
            reader = Reader(client, "A")
            await beginning(reader)

            await valkey.kill()
            await publish(other, part(1, quote(bid=1.0)))  # it can't be announced
            await valkey.start()
            await reader.until(chain(1, quote(bid=1.0)))

            await publish(other, part(2, quote(bid=2.0)))
            await reader.until(chain(2, quote(bid=2.0)))
