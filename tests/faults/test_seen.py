"""What is wrong is seen from outside: by health, a metric, a log line and an alert.

All of it clears by itself once the cause is gone.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
import yaml

from quantplane import v1 as pb
from quantplane_server import readings, stamps
from quantplane_server.config import Settings
from quantplane_server.rpc.health import ask
from quantplane_server.telemetry import endpoint
from tests.faults import Desk, until
from tests.market_data import Sender
from tests.market_data import until as until_event
from tests.telemetry.lines import Lines, lines_of
from tests.telemetry.scraping import Measured, Page, accepted, feed, measured, publish

ALERTS = yaml.safe_load((Path(__file__).parents[2] / "deploy/alerts.yml").read_text())
EXPRESSIONS = {a["alert"]: a["expr"] for a in ALERTS["groups"][0]["rules"]}
CONDITION = re.compile(
    r"(?:(?P<over>min_over_time|increase)\()?"
    r"(?P<name>\w+)(?:{(?P<label>\w+)=~?\"(?P<value>[^\"]*)\"})?"
    r"(?:\[\w+]\))? (?P<op>>|==) (?P<bound>[\d.]+)"
)
HEALTH = "quantplane_server.rpc.health"
RECORDER = "quantplane_server.market_data.recorder"
ORDERS, QUOTES = "quantplane.v1.OrderService", "quantplane.v1.MarketDataService"


def holds(alert: str, page: Page, before: Page) -> bool:
    """Tell whether an alert's condition holds, if the pages are its whole window."""
    for part in EXPRESSIONS[alert].split(" or "):
        found = CONDITION.fullmatch(part.strip())
        assert found, part
        name, label = found["name"], found["label"]
        for sample in page.samples:
            if sample.name != name or (
                label and not re.fullmatch(found["value"], sample.labels[label])
            ):
                continue
            value, bound = sample.value, float(found["bound"])
            if found["over"] == "increase":
                value -= before.value(name, **sample.labels)
            if value > bound if found["op"] == ">" else value == bound:
                return True
    return False


class Seen(NamedTuple):
    """Servers, and all that can be seen of them."""

    desk: Measured
    lines: Lines

    async def fires(self, alert: str) -> Page:
        before = await self.desk.page()
        return await self.desk.until(lambda page: holds(alert, page, before))

    async def clears(self, alert: str) -> None:
        for _ in range(400):
            before = await self.desk.page()
            await asyncio.sleep(0.1)
            if not holds(alert, await self.desk.page(), before):
                return
        raise AssertionError(f"{alert} does not clear")

    async def is_told(self, logger: str, message: str) -> None:
        def told() -> bool:
            lines = self.lines.of(logger)
            return any(re.search(message, line["message"]) for line in lines)

        await until(told, f"a line of {logger} with {message!r}")

    async def serves(self, service: str, wanted: str) -> None:
        async with asyncio.timeout(60):
            while await ask(self.desk.target, service) != wanted:
                await asyncio.sleep(0.05)


@pytest.fixture
def lines() -> Iterator[Lines]:
    with lines_of() as lines:
        yield lines


@pytest.fixture
async def seen(
    desk: Desk, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Seen]:
    monkeypatch.setattr(endpoint, "LOOK_S", 0.1)
    monkeypatch.setattr(readings, "LOOK_S", 0.1)
    settings = Settings(
        postgres_dsn=desk.dsn,
        redis_url=desk.valkey.address,
        listen="127.0.0.1:0",
        grace_s=2,
        pool_size=4,
        maintenance_s=3600,
    )
    async with measured(settings) as servers:
        yield Seen(servers, lines)


async def recorded(seen: Seen, sender: Sender, number: int) -> None:
    """Return once a batch more is in the database."""
    before = (await seen.desk.page())["quantplane_recorder_rows_total"]
    await publish(sender, number, "A", 10)
    await accepted(sender, number)
    rows: Callable[[Page], bool] = lambda page: (  # noqa: E731
        page["quantplane_recorder_rows_total"] > before
    )
    await seen.desk.until(rows)


async def test_postgresql_that_is_down_is_seen(desk: Desk, seen: Seen):
    await desk.postgres.kill()
    await seen.fires("PostgresUnavailable")
    await seen.serves(ORDERS, "NOT_SERVING")
    await seen.serves(QUOTES, "SERVING")
    await seen.is_told(HEALTH, "^db: ")
    await desk.postgres.start()
    await seen.clears("PostgresUnavailable")
    await seen.serves(ORDERS, "SERVING")
    await seen.is_told(HEALTH, "^db is well")


async def test_valkey_that_is_down_is_seen(desk: Desk, seen: Seen):
    sender = await feed(seen.desk.client)
    await desk.valkey.kill()
    await publish(sender, 1, "A", 10)
    await seen.fires("ValkeyUnavailable")
    await seen.fires("FeedsHeld")
    await seen.serves(QUOTES, "NOT_SERVING")
    await seen.serves(ORDERS, "SERVING")
    await seen.is_told(HEALTH, "^bus: ")
    await desk.valkey.start()
    await seen.clears("ValkeyUnavailable")
    await seen.clears("FeedsHeld")
    await seen.serves(QUOTES, "SERVING")
    await seen.is_told(HEALTH, "^bus is well")


async def test_a_recorder_that_is_stuck_is_seen(
    desk: Desk, seen: Seen, monkeypatch: pytest.MonkeyPatch
):
    sender = await feed(seen.desk.client)
    await recorded(seen, sender, 1)
    conn = await asyncpg.connect(desk.dsn)
    try:
        async with conn.transaction():
            await conn.execute("LOCK TABLE market_data IN SHARE MODE")
            with monkeypatch.context() as context:  # it has been so for a minute
                now_ns = stamps.time_ns
                context.setattr(stamps, "time_ns", lambda: now_ns() - 60 * 10**9)
                await publish(sender, 2, "A", 10)
                await accepted(sender, 2)
            await seen.fires("RecorderStuck")
            await seen.serves("recorder", "NOT_SERVING")
            await seen.serves("", "SERVING")
            await seen.is_told(HEALTH, "^recorder: .* has waited for 6")
    finally:
        await conn.close()
    await seen.clears("RecorderStuck")
    await seen.serves("recorder", "SERVING")
    await seen.is_told(HEALTH, "^recorder is well")


async def test_a_slow_subscriber_is_seen(seen: Seen):
    slow = Sender(seen.desk.client.market_data.StreamQuotes())
    request = pb.StreamQuotesRequest(
        symbols=["A"], delivery=pb.DELIVERY_LOSSLESS, max_unacknowledged=4
    )
    await slow.send(request)
    await until_event(slow.responses, "snapshot_complete")
    sender = await feed(seen.desk.client)
    for number in range(1, 6):
        await publish(sender, number, "A", 10)
        await accepted(sender, number)
    await seen.fires("SubscriberSlow")
    await seen.serves("", "SERVING")
    await seen.is_told("quantplane_server.readings", "the reader has stopped to read")
    await slow.send(pb.StreamQuotesRequest(acknowledge=1_000))
    await seen.clears("SubscriberSlow")
    await seen.is_told("quantplane_server.readings", "the reader reads again")


async def test_an_exhausted_pool_is_seen(desk: Desk, seen: Seen):
    conn = await asyncpg.connect(desk.dsn)
    try:
        async with conn.transaction():
            await conn.execute("LOCK TABLE market_data")
            listing = [
                asyncio.ensure_future(
                    seen.desk.client.market_data.ListSymbols(pb.ListSymbolsRequest())
                )
                for _ in range(8)
            ]
            await seen.fires("PoolExhausted")
            await seen.serves(ORDERS, "NOT_SERVING")
            await seen.is_told(HEALTH, "^db: all 4 connections are in use")
    finally:
        await conn.close()
    await asyncio.gather(*listing)
    await seen.clears("PoolExhausted")
    await seen.serves(ORDERS, "SERVING")


async def test_a_full_disk_of_postgresql_is_seen(desk: Desk, seen: Seen):
    sender = await feed(seen.desk.client)
    await recorded(seen, sender, 1)
    conn = await asyncpg.connect(desk.dsn)
    try:
        await conn.execute(
            """
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE 'could not extend file: No space left on device'
                USING ERRCODE = 'disk_full';
            END $$;
            CREATE TRIGGER full_disk BEFORE INSERT ON market_data
                FOR EACH STATEMENT EXECUTE FUNCTION full_disk()
            """
        )
        await publish(sender, 2, "A", 10)
        await seen.fires("PostgresDiskFull")
        await seen.serves(QUOTES, "SERVING")
        await seen.is_told(RECORDER, "No space left on device")
        await conn.execute("DROP TRIGGER full_disk ON market_data")
    finally:
        await conn.close()
    await seen.clears("PostgresDiskFull")
    await recorded(seen, sender, 3)
