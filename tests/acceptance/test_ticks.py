"""A recorded evening of ticks, replayed: to a subscriber and into the database."""

import asyncio
import time
from datetime import UTC

from quantplane import Client
from quantplane import v1 as pb
from tests.acceptance import (
    PATIENCE_S,
    TICKS,
    Tick,
    needs_data,
    quantplane,
    recorded,
    ticks,
)
from tests.conftest import Server, both_editions

pytestmark = needs_data
SYMBOL = "EURUSD"
COUNT = 9_500


async def replay(server: Server) -> str:
    return await quantplane(
        *("replay", TICKS, "--symbol", SYMBOL, "--speed", "0"),
        *("--columns", "time=0,bid=1,ask=2"),
        *("--time-format", "%Y%m%d %H%M%S%f", "--tz", "-05:00"),
        target=server.target,
    )


async def test_a_replayed_file_reaches_a_lossless_subscriber_quote_by_quote(
    server: Server, client: Client
):
    request = pb.SubscribeQuotesRequest(symbols=[SYMBOL], delivery=pb.DELIVERY_LOSSLESS)
    read: list[Tick] = []
    follower = client.follow(client.market_data.SubscribeQuotes, request)
    await anext(follower)  # subscribed: nothing is missed from here on
    replaying = asyncio.create_task(replay(server))
    async with asyncio.timeout(PATIENCE_S):
        async for response in follower:
            for quote in response.quotes:
                assert quote.symbol == SYMBOL
                at = quote.time.ToDatetime(tzinfo=UTC)
                read.append(Tick(at, quote.bid, quote.ask))
            if len(read) >= COUNT:
                break
    assert f"{COUNT:,} published" in await replaying
    assert read == ticks()


@both_editions
async def test_a_replayed_file_is_recorded_row_by_row(server: Server):
    await replay(server)
    deadline = time.monotonic() + PATIENCE_S
    while len(rows := await recorded(server.settings.postgres_dsn)) < COUNT:
        assert time.monotonic() < deadline, f"only {len(rows)} rows"
        await asyncio.sleep(0.1)
    assert [Tick(row["time"], row["bid"], row["ask"]) for row in rows] == ticks()
    for row in rows:
        middle = (row["bid"] + row["ask"]) / 2
        assert [row[name] for name in ("open", "high", "low", "close")] == 4 * [middle]
        assert row["symbol"] == SYMBOL
        assert row["volume"] is row["bid_size"] is row["ask_size"] is None
