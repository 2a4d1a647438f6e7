"""What Prometheus reads: every number moves with what it counts, and comes back."""

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import grpc
import psutil
import pytest
import redis.asyncio as redis

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.main import recording, serving
from quantplane_server.rpc.health import check
from quantplane_server.telemetry import endpoint
from quantplane_server.telemetry.metrics import CALL_DURATION, Instrument
from tests.market_data import Sender, quotes, until
from tests.orders import UNKNOWN_ID, fill, new_order, open_order, submit
from tests.telemetry.scraping import (
    TICK_S,
    Measured,
    Page,
    accepted,
    feed,
    fill_up,
    free_ports,
    measured,
    publish,
    reader,
)

DURATION = "rpc_server_call_duration_seconds_count"
SYMBOLS = "quantplane.v1.MarketDataService/ListSymbols"
STREAM = "quantplane.v1.MarketDataService/SubscribeQuotes"
PUBLISH = "quantplane.v1.MarketDataService/PublishQuotes"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LOOK_S", 0.05)


@pytest.fixture
async def desk(settings: Settings) -> AsyncIterator[Measured]:
    async with measured(settings) as desk:
        yield desk


# --- Calls --------------------------------------------------------------------------


async def test_calls_are_counted_by_method_and_code(desk: Measured):
    labels = {"rpc_method": SYMBOLS, "rpc_response_status_code": "OK"}
    before = await desk.page()
    for _ in range(3):
        await desk.client.market_data.ListSymbols(pb.ListSymbolsRequest())
    after = await desk.page()
    assert after.value(DURATION, **labels) - before.value(DURATION, **labels) == 3


async def test_calls_that_fail_are_counted_by_their_code(desk: Measured):
    labels = {"rpc_response_status_code": "NOT_FOUND"}
    before = await desk.page()
    with pytest.raises(grpc.aio.AioRpcError):
        await desk.client.order.GetOrder(pb.GetOrderRequest(order_id=UNKNOWN_ID))
    after = await desk.page()
    assert after.value(DURATION, **labels) - before.value(DURATION, **labels) == 1


async def test_streams_count_while_they_last_and_when_they_end(desk: Measured):
    before = await desk.page()
    request = pb.SubscribeQuotesRequest(symbols=["A"])
    call = desk.client.market_data.SubscribeQuotes(request)
    await until(aiter(call), "snapshot_complete")
    live = await desk.page()
    assert live.value("quantplane_streams", rpc_method=STREAM) == 1
    assert live.value(DURATION, rpc_method=STREAM) == 0
    call.cancel()

    def has_ended(page: Page) -> bool:
        name, labels = "quantplane_streams_ended_total", {"rpc_method": STREAM}
        labels["rpc_response_status_code"] = "CANCELLED"
        return page.value(name, **labels) > before.value(name, **labels)

    after = await desk.until(has_ended)
    assert after.value("quantplane_streams", rpc_method=STREAM) == 0


async def test_who_is_not_known_is_counted(desk: Measured):
    name, labels = "quantplane_calls_refused_total", {"reason": "UNAUTHENTICATED"}
    before = await desk.page()
    async with Client(desk.target, token="qp_" + 43 * "x") as stranger:
        with pytest.raises(grpc.aio.AioRpcError):
            await stranger.market_data.ListSymbols(pb.ListSymbolsRequest())
    after = await desk.page()
    assert after.value(name, **labels) - before.value(name, **labels) == 1


async def test_a_login_that_fails_is_counted(desk: Measured):
    before = await desk.page()
    with pytest.raises(grpc.aio.AioRpcError):
        await desk.client.login("nobody", "not the password")
    after = await desk.page()
    name = "quantplane_logins_failed_total"
    assert after[name] - before[name] == 1


# --- Quotes -------------------------------------------------------------------------


async def test_quotes_are_counted_in_out_and_recorded(desk: Measured):
    before = await desk.page()
    responses = await reader(desk.client, delivery=pb.DELIVERY_LOSSLESS)
    sender = await feed(desk.client)
    await publish(sender, 1, "A", 100)
    await until(responses, "data")
    after = await desk.until(
        lambda page: (
            page["quantplane_recorder_rows_total"]
            >= before["quantplane_recorder_rows_total"] + 100
        )
    )
    name = "quantplane_quotes_accepted_total"
    assert after[name] - before[name] == 100
    name = "quantplane_quotes_delivered_bytes_total"
    assert after[name] - before[name] >= 100 * len(
        quotes("A", [1])[0].SerializeToString()
    )


async def test_quotes_left_out_are_counted(desk: Measured):
    before = await desk.page()
    responses = await reader(desk.client, min_interval={"nanos": 50_000_000})
    sender = await feed(desk.client)
    await publish(sender, 1, "A", 100)
    left_out = (await until(responses, "data")).conflated_count
    after = await desk.page()
    name = "quantplane_quotes_conflated_total"
    assert after[name] - before[name] == left_out == 99


async def test_a_bus_that_nobody_records_shows_and_a_recorder_mends_it(
    settings: Settings,
):
    settings = settings.model_copy(update={"cap_mb": 1})
    async with measured(settings, recorder=False) as desk:
        sender = await feed(desk.client)
        publishing = asyncio.create_task(fill_up(sender, 20))
        held = {"reason": "BUS_FULL"}
        page = await desk.until(
            lambda page: (
                page.value("quantplane_feeds_held", **held)
                and page["quantplane_recorder_lag_seconds"]
            )
        )
        assert page.value("quantplane_feeds_holds_total", **held) >= 1
        assert page["quantplane_bus_cap_bytes"] == 1 << 20
        full = page["quantplane_bus_unrecorded_bytes"]
        assert full >= 1 << 18  # all on one of the four shards
        async with recording(desk.settings.process(1)):
            await accepted(sender, 20)
            await publishing
            await desk.until(
                lambda page: (
                    page["quantplane_bus_unrecorded_bytes"] == 0
                    and page["quantplane_recorder_lag_seconds"] == 0
                    and page.value("quantplane_feeds_held", **held) == 0
                )
            )


async def test_a_reader_that_does_not_read_shows(desk: Measured):
    request = pb.StreamQuotesRequest(
        symbols=["A"], delivery=pb.DELIVERY_LOSSLESS, max_unacknowledged=4
    )
    slow = Sender(desk.client.market_data.StreamQuotes())
    await slow.send(request)
    await until(slow.responses, "snapshot_complete")
    sender = await feed(desk.client)
    for number in range(1, 6):
        await publish(sender, number, "A", 100)
        await accepted(sender, number)
    page = await desk.until(lambda page: page["quantplane_subscribers_lag_seconds"])
    assert page["quantplane_subscribers_pending_bytes"] > 0
    assert page.value("quantplane_subscriptions", state="live") >= 1
    await slow.send(pb.StreamQuotesRequest(acknowledge=1_000))
    await desk.until(lambda page: page["quantplane_subscribers_lag_seconds"] == 0)


# --- Trading ------------------------------------------------------------------------


async def test_events_of_orders_are_counted_by_type(desk: Measured):
    name, labels = "quantplane_log_events_total", {"log": "orders", "type": "CREATED"}
    before = await desk.page()
    await submit(desk.client)
    await submit(desk.client)
    after = await desk.page()
    assert after.value(name, **labels) - before.value(name, **labels) == 2


async def test_executions_and_refused_orders_are_counted(desk: Measured):
    name, labels = "quantplane_orders_refused_total", {"reason": "UNKNOWN_SIGNAL"}
    before = await desk.page()
    await fill(desk.client, await open_order(desk.client), 4)
    with pytest.raises(grpc.aio.AioRpcError):
        await submit(desk.client, new_order(signal_id=UNKNOWN_ID))
    after = await desk.page()
    executions = "quantplane_executions_total"
    assert after[executions] - before[executions] == 1
    assert after.value(name, **labels) - before.value(name, **labels) == 1


async def test_the_end_of_a_log_and_its_readers_are_shown(desk: Measured):
    watching = aiter(desk.client.order.WatchOrders(pb.WatchOrdersRequest()))
    await until(watching, "snapshot_complete")
    await submit(desk.client)
    page = await desk.until(
        lambda page: page.value("quantplane_log_revision", log="orders") == 1
    )
    assert page.value("quantplane_log_tail_behind", log="orders") == 0


async def test_the_audit_log_is_behind_until_it_has_entered_all(desk: Measured):
    conn = await asyncpg.connect(desk.settings.postgres_dsn)
    try:
        async with conn.transaction():
            await conn.execute("LOCK TABLE audit_positions IN EXCLUSIVE MODE")
            await submit(desk.client)
            page = await desk.until(lambda page: page["quantplane_audit_behind"], 1)
            assert page.value("quantplane_audit_behind", log="orders") == 1
            assert page.value("quantplane_audit_lag_seconds", log="orders") > 0
    finally:
        await conn.close()
    page = await desk.until(
        lambda page: (
            "quantplane_audit_behind" in page.labels()
            and not page["quantplane_audit_behind"]
        ),
        1,
    )
    assert page["quantplane_audit_lag_seconds"] == 0


# --- What all stands on -------------------------------------------------------------


async def test_valkey_that_is_away_shows_until_it_is_back(desk: Measured):
    def up(page: Page, backend: str) -> float | None:
        """None: it was not looked at yet."""
        name = "quantplane_backend_up"
        return page.value(name, backend=backend) if name in page.labels() else None

    await desk.until(lambda page: up(page, "bus") == 1)
    async with redis.Redis.from_url(desk.settings.redis_url) as valkey:
        await valkey.execute_command("CLIENT", "PAUSE", "3000", "ALL")
    page = await desk.until(lambda page: up(page, "bus") == 0)
    assert up(page, "db") == 1
    await desk.until(lambda page: up(page, "bus") == 1)


async def test_who_waits_for_a_connection_shows(settings: Settings):
    settings = settings.model_copy(update={"pool_size": 2})
    async with measured(settings, recorder=False) as desk:
        conn = await asyncpg.connect(desk.settings.postgres_dsn)
        try:
            async with conn.transaction():
                await conn.execute("LOCK TABLE market_data")
                listing = [
                    asyncio.ensure_future(
                        desk.client.market_data.ListSymbols(pb.ListSymbolsRequest())
                    )
                    for _ in range(6)
                ]
                await desk.until(
                    lambda page: page["db_client_connection_pending_requests"] >= 4
                )
                page = await desk.page()
                assert page["db_client_connection_max"] == 2
        finally:
            await conn.close()
        await asyncio.gather(*listing)
        await desk.until(
            lambda page: page["db_client_connection_pending_requests"] == 0
        )


async def test_errors_of_the_database_are_counted_by_their_kind(desk: Measured):
    db = await Database.open(desk.settings.postgres_dsn)
    before = await desk.page()
    try:
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with db.connection() as conn:
                await conn.execute("SELECT 1 / 0")
    finally:
        await db.close()
    after = await desk.page()
    name, labels = "quantplane_db_errors_total", {"error_type": "DivisionByZeroError"}
    assert after.value(name, **labels) - before.value(name, **labels) == 1


async def test_an_event_loop_that_hangs_shows_and_is_answered_for(desk: Measured):
    await desk.page()
    asking = asyncio.create_task(desk.page())
    await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251
    await asking
    await asyncio.sleep(2 * endpoint.TICK_S)
    shown = [(await asking)["quantplane_event_loop_delay_seconds"]]
    shown.append((await desk.page())["quantplane_event_loop_delay_seconds"])
    assert max(shown) >= 0.3


# --- The endpoint -------------------------------------------------------------------


async def test_processes_are_told_apart(desk: Measured):
    names = []
    for number in (0, 1):
        page = await desk.page(number)
        (info,) = (s.labels for s in page.samples if s.name == "target_info")
        names.append(info["service_name"])
        assert page["process_resident_memory_bytes"] > 0
        assert page["process_cpu_seconds_total"] > 0
    assert names == ["quantplane-server", "quantplane-recorder"]


async def test_only_the_address_that_is_told_is_listened_on(desk: Measured):
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections()
        if connection.laddr
        and connection.laddr.port in desk.ports
        and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


async def test_without_an_address_nothing_is_measured(settings: Settings):
    async with serving(settings) as target, Client(target) as client:
        await client.market_data.ListSymbols(pb.ListSymbolsRequest())
        assert not CALL_DURATION.on


async def test_a_server_is_measured_while_it_drains(settings: Settings):
    ports = free_ports()
    settings.metrics_listen = f"127.0.0.1:{ports[0]}"
    started, stop = asyncio.get_running_loop().create_future(), asyncio.Event()

    async def serve() -> None:
        async with serving(settings) as target:
            started.set_result(target)
            await stop.wait()

    server = asyncio.create_task(serve())
    target = await started
    conn = await asyncpg.connect(settings.postgres_dsn)
    async with Client(target) as client:
        desk = Measured(client, target, settings, ports)
        async with conn.transaction():
            await conn.execute("LOCK TABLE market_data")
            request = pb.ListSymbolsRequest()
            asking = asyncio.ensure_future(client.market_data.ListSymbols(request))
            await desk.until(lambda page: page["quantplane_calls"] == 1)
            stop.set()
            while await check(target) == "SERVING":
                await asyncio.sleep(TICK_S)
            assert (await desk.page())["quantplane_calls"] == 1
        await asking
    await server
    await conn.close()


async def test_a_port_that_is_taken_is_told(settings: Settings):
    async with measured(settings, recorder=False) as desk:
        with pytest.raises(RuntimeError, match=r"can't serve metrics on 127\.0\.0\.1"):
            async with recording(desk.settings):
                pass


def test_metrics_stay_on_loopback_unless_it_is_said():
    settings = Settings(metrics_listen="0.0.0.0:9464")
    with pytest.raises(ValueError, match="beyond loopback"):
        settings.metrics_address()
    told = Settings(metrics_listen="0.0.0.0:9464", insecure=True)
    assert told.metrics_address() == ("0.0.0.0", 9464)


@pytest.mark.parametrize("listen", ["9464", "localhost", "localhost:x"])
def test_what_is_no_address_is_refused(listen: str):
    with pytest.raises(ValueError, match="HOST:PORT"):
        Settings(metrics_listen=listen).metrics_address()


def test_further_processes_have_the_ports_behind():
    settings = Settings(metrics_listen="[::1]:9464")
    assert settings.process(0).metrics_address() == ("::1", 9464)
    assert settings.process(3).metrics_address() == ("::1", 9467)
    assert Settings(metrics_listen="localhost:0").process(3).metrics_address() == (
        "localhost",
        0,
    )


def test_no_two_instruments_have_a_name():
    names = [instrument.name for instrument in Instrument.all]
    assert len(names) == len(set(names))
