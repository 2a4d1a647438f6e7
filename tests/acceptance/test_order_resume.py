"""A watcher of orders goes away, and comes back: to the rest, or to a gap."""

import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc

from quantplane import Client
from quantplane import v1 as pb
from quantplane.follow import Follower
from tests.conftest import Server
from tests.orders import new_order, refused, report, submit, watching

BATCH = 1_000
AWAY = 10 * BATCH  # events


def follow(client: Client, token: bytes) -> Follower[pb.WatchOrdersResponse]:
    request = pb.WatchOrdersRequest(resume_token=token)
    return client.follow(client.order.WatchOrders, request)


async def token_of(client: Client) -> bytes:
    """Return a token that goes on behind an order's first event."""
    async with watching(client) as stream:
        await submit(client)
        response = await anext(stream)
        return bytes(response.resume_token)


async def happen(client: Client, count: int) -> None:
    """Have orders created and acknowledged, two events each."""
    for _ in range(count // 2 // BATCH):
        orders = [new_order() for _ in range(BATCH)]
        request = pb.SubmitOrdersRequest(orders=orders)
        made = (await client.order.SubmitOrders(request)).results
        kind = pb.ORDER_EVENT_TYPE_ACKNOWLEDGED
        reports = [
            pb.OrderReport(order_id=r.order.order_id, type=kind, broker_order_id="b")
            for r in made
        ]
        await client.broker.ReportOrderEvents(
            pb.ReportOrderEventsRequest(reports=reports)
        )


async def taken(stream: AsyncIterator[Any], count: int) -> list[pb.OrderEvent]:
    found: list[pb.OrderEvent] = []
    while len(found) < count:
        found += (await anext(stream)).events
    return found


async def test_after_ten_thousand_events_a_watcher_gets_exactly_the_rest(
    client: Client,
):
    token = await token_of(client)
    await happen(client, AWAY)
    began = time.monotonic()
    async with follow(client, token) as stream:
        found = await taken(stream, AWAY)
        print(f"{AWAY:,} events in {time.monotonic() - began:.2f} s")
        assert [event.revision for event in found] == list(range(2, AWAY + 2))
        order = await submit(client)
        (event,) = await taken(stream, 1)
        assert event.order == order
        assert stream.gaps == stream.reconnects == 0


async def test_behind_what_is_kept_a_watcher_gets_a_gap_and_what_is_live(
    client: Client, server: Server
):
    token = await token_of(client)
    live, over = await submit(client), await submit(client)
    await report(client, over, "CANCELLED")
    connection = await asyncpg.connect(server.settings.postgres_dsn)
    await connection.execute("DELETE FROM event_log WHERE revision < 3")
    await connection.close()
    call = client.order.WatchOrders(pb.WatchOrdersRequest(resume_token=token))
    code, reason, _ = await refused(anext(aiter(call)))
    assert (code, reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPACTED")
    async with follow(client, token) as stream:
        gap = (await anext(stream)).event.gap
        assert gap.cause == pb.GAP_CAUSE_COMPACTED
        snapshot: list[pb.Order] = []
        async for response in stream:
            snapshot += response.orders
            assert not response.events
            if response.event.HasField("snapshot_complete"):
                break
        ids = [order.order_id for order in snapshot]
        assert live.order_id in ids
        assert over.order_id not in ids
        await report(client, live, "ACKNOWLEDGED")
        (event,) = await taken(stream, 1)
        assert event.order.order_id == live.order_id
