"""What a server tells of itself and its streams, while real readers are slow."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server import log, streams
from quantplane_server.admin.status import server_id
from quantplane_server.config import Settings
from quantplane_server.embedded import Valkey
from quantplane_server.main import recording, serving
from tests.admin import connected
from tests.conftest import Server
from tests.market_data import quotes, read, until
from tests.options import chain
from tests.options import publish as publish_chains
from tests.options import quote as option
from tests.signals import signal

PATIENCE_S = 60
LONG = "A".ljust(64, "-")  # quotes of about 110 bytes
SYMBOLS = ["A", "B", "C"]

Report = pb.Subscription
State = pb.SubscriptionState


async def subscriptions(client: Client) -> list[Report]:
    found = await client.admin.ListSubscriptions(pb.ListSubscriptionsRequest())
    return list(found.subscriptions)


async def of(client: Client, method: str) -> Report:
    """Return the only open stream of a method, once it is open."""
    return await becomes(client, method, lambda _: True)


async def becomes(
    client: Client, method: str, wanted: Callable[[Report], object]
) -> Report:
    """Wait until the only stream of a method is open and as wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await subscriptions(client)
            reports = [each for each in found if each.method.endswith(method)]
            assert len(reports) < 2
            if reports and wanted(reports[0]):
                return reports[0]
            await asyncio.sleep(0.02)


async def status(client: Client) -> pb.GetServerStatusResponse:
    return await client.admin.GetServerStatus(pb.GetServerStatusRequest())


async def status_becomes(
    client: Client, wanted: Callable[[pb.GetServerStatusResponse], object]
) -> pb.GetServerStatusResponse:
    async with asyncio.timeout(PATIENCE_S):
        while not wanted(found := await status(client)):
            await asyncio.sleep(0.02)
    return found


def states(*names: str) -> Callable[[Report], bool]:
    wanted = {State.Value(f"SUBSCRIPTION_STATE_{name}") for name in names}
    return lambda report: report.state in wanted


def lag_s(report: Report) -> float:
    return report.lag.ToTimedelta().total_seconds()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader is stalled after half a second."""
    monkeypatch.setattr(streams, "STALLED_S", 0.5)


@pytest.fixture
async def publish(client: Client) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """Publish quotes of a symbol, by their numbers."""
    async with client.publish_quotes("feed") as publisher:

        async def publish(symbol: str, numbers: range) -> None:
            for start in range(numbers.start, numbers.stop, 1_000):
                part = range(start, min(start + 1_000, numbers.stop))
                await publisher.send(quotes(symbol, part))
            await publisher.flush()

        yield publish


def stream(client: Client, *symbols: str, **fields: Any) -> Any:
    """Begin a raw StreamQuotes, of which nothing is read that nobody asks for."""
    call = client.market_data.StreamQuotes()
    request = pb.StreamQuotesRequest(symbols=symbols or SYMBOLS, **fields)
    call.begun = asyncio.ensure_future(call.write(request))
    return call


# --- Whose they are -----------------------------------------------------------------


async def test_a_stream_is_listed_with_whose_it_is_and_what_it_asked_for(
    client: Client, dsn: str
):
    request = pb.StreamQuotesRequest(symbols=SYMBOLS, delivery=pb.DELIVERY_LATEST)
    request.min_interval.FromMilliseconds(250)
    request.heartbeat_interval.FromSeconds(7)
    call = client.market_data.StreamQuotes()
    await call.write(request)
    await until(aiter(call), "snapshot_complete")
    report = await of(client, "StreamQuotes")
    async with connected(dsn) as conn:
        key_id = await conn.fetchval("SELECT key_id::text FROM api_keys")
    assert report.method == "quantplane.v1.MarketDataService/StreamQuotes"
    assert (report.username, report.key_id) == ("test", key_id)
    assert report.peer.startswith("ipv4:127.0.0.1:")
    assert report.state == pb.SUBSCRIPTION_STATE_LIVE
    assert report.keys == len(SYMBOLS)
    assert report.delivery == pb.DELIVERY_LATEST
    assert report.min_interval == request.min_interval
    assert report.heartbeat_interval == request.heartbeat_interval
    assert report.responses >= 2
    assert report.response_bytes > 0


async def test_every_kind_of_stream_is_listed_until_it_ends(client: Client):
    watched = pb.WatchStrategiesRequest(strategy_ids=["s", "t"])
    async with AsyncExitStack() as stack:
        for method, request in (
            (client.market_data.SubscribeQuotes, pb.SubscribeQuotesRequest),
            (client.order.WatchOrders, pb.WatchOrdersRequest),
            (client.signal.WatchSignals, pb.WatchSignalsRequest),
            (client.broker.WatchBrokerCommands, pb.WatchBrokerCommandsRequest),
            (client.portfolio.WatchPortfolio, pb.WatchPortfolioRequest),
            (client.strategy.WatchStrategies, lambda: watched),
        ):
            asked = request()
            if (
                hasattr(asked, "symbols")
                and method == client.market_data.SubscribeQuotes
            ):
                asked.symbols.append("A")
            call = method(asked)
            await until(aiter(call), "snapshot_complete")
            stack.callback(call.cancel)
        found = {r.method.rpartition("/")[2]: r for r in await subscriptions(client)}
        assert list(found) == [
            *("SubscribeQuotes", "WatchOrders", "WatchSignals", "WatchBrokerCommands"),
            *("WatchPortfolio", "WatchStrategies"),
        ]
        assert {r.state for r in found.values()} == {pb.SUBSCRIPTION_STATE_LIVE}
        assert {lag_s(r) for r in found.values()} == {0}
        assert found["WatchStrategies"].keys == 2
    async with asyncio.timeout(PATIENCE_S):
        while await subscriptions(client):
            await asyncio.sleep(0.02)


async def test_a_list_comes_by_pages_in_the_order_of_their_beginning(client: Client):
    calls = []
    for _ in range(5):
        calls.append(client.order.WatchOrders(pb.WatchOrdersRequest()))
        await until(aiter(calls[-1]), "snapshot_complete")
    request = pb.ListSubscriptionsRequest(page_size=2)
    pages = []
    while True:
        page = await client.admin.ListSubscriptions(request)
        assert page.server_id == server_id()
        pages.append([each.id for each in page.subscriptions])
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    ids = [id for page in pages for id in page]
    assert ids == sorted(set(ids))
    for call in calls:
        call.cancel()


async def test_a_page_has_a_bound_and_a_token_of_its_own(client: Client):
    too_large = pb.ListSubscriptionsRequest(page_size=1_001)
    with pytest.raises(Exception) as refused:
        await client.admin.ListSubscriptions(too_large)
    assert dict(violations_of(refused.value)) == {"page_size": "must be 0 to 1,000"}
    with pytest.raises(Exception) as refused:
        await client.admin.ListSubscriptions(
            pb.ListSubscriptionsRequest(page_token="AbCd")
        )
    assert reason_of(refused.value) == "INVALID_PAGE_TOKEN"


# --- Slow readers of quotes ---------------------------------------------------------


async def test_a_reader_that_keeps_up_has_no_lag(client: Client, publish: Any):
    call = stream(client, max_unacknowledged=8)
    responses = aiter(call)
    await until(responses, "snapshot_complete")
    await publish("A", range(1, 50))
    await read(responses, 49)
    report = await becomes(client, "StreamQuotes", lambda r: not r.pending_entries)
    assert (report.state, lag_s(report)) == (pb.SUBSCRIPTION_STATE_LIVE, 0)
    assert (report.pending_bytes, report.conflated_count) == (0, 0)
    assert report.max_unacknowledged == 8
    await call.write(pb.StreamQuotesRequest(acknowledge=2))
    await becomes(client, "StreamQuotes", lambda r: r.acknowledged == 2)
    call.cancel()


@pytest.mark.usefixtures("impatient")
async def test_a_lossless_reader_that_acknowledges_nothing_stalls_and_recovers(
    client: Client, publish: Any
):
    call = stream(client, delivery=pb.DELIVERY_LOSSLESS, max_unacknowledged=3)
    responses = aiter(call)
    await until(responses, "snapshot_complete")
    for number in range(1, 6):
        await publish("A", range(number, number + 1))
    report = await becomes(client, "StreamQuotes", states("STALLED"))
    assert report.pending_entries >= 1
    assert report.pending_bytes > 0
    assert 0.5 < lag_s(report) < PATIENCE_S
    assert report.acknowledged == 0
    await call.write(pb.StreamQuotesRequest(acknowledge=1_000))
    await read(responses, 5)
    report = await becomes(client, "StreamQuotes", states("LIVE"))
    assert (report.pending_entries, lag_s(report)) == (0, 0)
    call.cancel()


async def test_lag_grows_while_what_waits_grows_older(client: Client, publish: Any):
    call = stream(client, delivery=pb.DELIVERY_LOSSLESS, max_unacknowledged=1)
    await until(aiter(call), "subscribed")
    await publish("A", range(1, 3))
    first = await becomes(client, "StreamQuotes", lambda r: lag_s(r) > 0)
    await becomes(client, "StreamQuotes", lambda r: lag_s(r) > lag_s(first))
    call.cancel()


async def test_what_a_reader_of_the_latest_was_not_given_is_counted(
    client: Client, publish: Any
):
    call = stream(client, LONG, "B", max_unacknowledged=3)
    await until(aiter(call), "snapshot_complete")
    await publish(LONG, range(1, 8_000))  # beyond what may wait for it
    report = await becomes(client, "StreamQuotes", lambda r: r.conflated_count > 1_000)
    assert (report.keys, report.pending_entries) == (2, 1)
    assert 0 < report.pending_bytes < 200
    call.cancel()


@pytest.mark.usefixtures("impatient")
async def test_a_reader_that_does_not_even_read_its_connection_is_stalled(
    client: Client, publish: Any
):
    request = pb.SubscribeQuotesRequest(symbols=[LONG], delivery=pb.DELIVERY_LOSSLESS)
    call = client.market_data.SubscribeQuotes(request)
    await until(aiter(call), "snapshot_complete")
    await publish(LONG, range(1, 120_000))  # more than connections and queues hold
    report = await becomes(client, "SubscribeQuotes", states("STALLED"))
    assert lag_s(report) > 0.5
    assert report.since_response.ToTimedelta().total_seconds() > 0.5
    call.cancel()


async def test_a_reader_that_overflowed_is_told_by_the_entries_it_lacks(
    client: Client, publish: Any
):
    call = stream(client, LONG, delivery=pb.DELIVERY_LOSSLESS, max_unacknowledged=3)
    await until(aiter(call), "snapshot_complete")
    await publish(LONG, range(1, 50_000))  # more than may wait for it
    report = await becomes(client, "StreamQuotes", states("CATCHING_UP"))
    assert report.pending_entries > 1
    assert lag_s(report) > 0
    call.cancel()


async def test_a_reader_of_history_is_as_late_as_its_quotes(client: Client):
    async with client.publish_quotes() as publisher:
        for start in range(0, 6_000, 1_000):
            await publisher.send(quotes("A", range(start, start + 1_000)))
        await publisher.durable()
    request = pb.StreamQuotesRequest(symbols=["A"], delivery=pb.DELIVERY_LOSSLESS)
    request.start_time.FromSeconds(1_600_000_000)
    request.max_unacknowledged = 2
    call = client.market_data.StreamQuotes()
    await call.write(request)
    await read(aiter(call), 1)
    report = await becomes(client, "StreamQuotes", states("HISTORY"))
    assert lag_s(report) > 1e6  # these quotes are of 2023
    call.cancel()


async def test_a_feed_that_is_held_back_says_why(dsn: str, redis_url: str):
    settings = Settings(
        postgres_dsn=dsn, redis_url=redis_url, listen="127.0.0.1:0", grace_s=2, cap_mb=1
    )
    async with (
        serving(settings) as target,
        Client(target) as client,
        client.publish_quotes("big") as publisher,
    ):
        sending = asyncio.ensure_future(_send_much(publisher))
        report = await becomes(client, "PublishQuotes", states("HELD"))
        assert report.feed == "big"
        assert report.hold == pb.HOLD_REASON_BUS_FULL
        found = await status_becomes(client, lambda s: s.bus.unrecorded_bytes > 1 << 17)
        assert found.bus.max_unrecorded_bytes == 1 << 20
        assert found.bus.recorder_lag.ToTimedelta().total_seconds() > 0
        assert found.quotes_accepted > 0
        async with recording(settings):
            await sending
            await becomes(client, "PublishQuotes", states("LIVE"))


async def _send_much(publisher: Any) -> None:
    for start in range(0, 10_000, 500):
        await publisher.send(quotes(LONG, range(start, start + 500)))


# --- Slow readers of logs -----------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_a_reader_of_a_log_that_does_not_read_is_told_by_the_events_it_lacks(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(log, "KEPT", 500)  # events that the server remembers
    call = client.signal.WatchSignals(pb.WatchSignalsRequest())
    await until(aiter(call), "snapshot_complete")
    for _ in range(8):
        signals = [signal(metadata={"x": "x" * 300}) for _ in range(500)]
        await client.signal.PublishSignals(pb.PublishSignalsRequest(signals=signals))
    report = await becomes(client, "WatchSignals", states("STALLED"))
    assert report.pending_entries > 100
    assert lag_s(report) > 0
    logs = {each.log: each.revision for each in (await status(client)).logs}
    assert logs == {"signals": 4_000}
    call.cancel()


async def test_a_reader_of_states_that_does_not_read_lacks_the_newest(client: Client):
    request = pb.SubscribeOptionChainRequest(underlyings=["A", "B"])
    call = client.options.SubscribeOptionChain(request)
    await until(aiter(call), "snapshot_complete")
    report = await of(client, "SubscribeOptionChain")
    assert (report.keys, report.pending_entries) == (2, 0)

    async def publish_for_ever() -> None:
        for minute in count(1):
            strikes = range(1, 3_001)
            quoted = [option(strike, bid=minute, ask=minute + 1) for strike in strikes]
            await publish_chains(client, chain(minute, *quoted))

    publishing = asyncio.ensure_future(publish_for_ever())
    report = await becomes(client, "SubscribeOptionChain", lambda r: lag_s(r) > 0.5)
    assert report.pending_entries == 1
    publishing.cancel()
    call.cancel()


# --- The process --------------------------------------------------------------------


async def test_the_status_tells_what_streams_were_sent_those_that_ended_too(
    client: Client, server: Server
):
    before = await status(client)
    assert before.server_id == server_id()
    assert before.max_streams == server.settings.max_streams
    assert before.streams == 0
    call = client.order.WatchOrders(pb.WatchOrdersRequest())
    await until(aiter(call), "snapshot_complete")
    during = await status(client)
    assert during.streams == 1
    call.cancel()
    after = await status_becomes(client, lambda s: s.streams == 0)
    assert after.responses >= during.responses == before.responses + 2
    assert after.response_bytes >= during.response_bytes > before.response_bytes


async def test_the_status_is_told_while_the_bus_and_the_database_do_not_answer(
    dsn: str, redis_url: str
):
    async with Valkey() as valkey:
        settings = Settings(
            postgres_dsn=dsn, redis_url=valkey.url, listen="127.0.0.1:0", grace_s=2,
            pool_size=1,
        )  # fmt: skip
        async with (
            serving(settings) as target,
            Client(target) as client,
            connected(dsn) as conn,
        ):
            await status_becomes(client, lambda s: s.HasField("bus"))
            await valkey.kill()
            async with conn.transaction():
                await conn.execute("LOCK TABLE strategies")
                request = pb.ListStrategiesRequest()
                stuck = asyncio.ensure_future(client.strategy.ListStrategies(request))
                found = await status_becomes(client, _all_down)
            await stuck
            await valkey.start()
            await status_becomes(client, _all_up)
    assert not found.logs
    assert found.pools[0].in_use == 1
    assert all(backend.problem for backend in found.backends)


def _all_down(status: pb.GetServerStatusResponse) -> bool:
    return not any(backend.up for backend in status.backends)


def _all_up(status: pb.GetServerStatusResponse) -> bool:
    return all(backend.up for backend in status.backends)
