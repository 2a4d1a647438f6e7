"""Orders for the day end with the session, once, and their broker is told."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.orders.expiry import last_end
from quantplane_server.reference.settings import SESSION_END
from tests.conftest import Server, both_editions
from tests.orders import (
    book,
    events,
    execution,
    get,
    open_order,
    report,
    submit,
    watching,
)


async def configure(dsn: str, key: str, value: Any) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO configurations (key, value) VALUES ($1, $2)"
        " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        key,
        json.dumps(value),
    )
    await connection.close()


async def end_session(server: Server) -> None:
    """Have a session end now, as seen by orders that exist."""
    now = datetime.now(UTC)
    await configure(server.settings.postgres_dsn, SESSION_END.key, f"{now:%H:%M:%S.%f}")


@both_editions
async def test_day_orders_from_before_the_end_of_the_session_expire(
    server: Server, client: Client
):
    pending, working = await submit(client), await open_order(client)
    lasting = await open_order(client, time_in_force=pb.TIME_IN_FORCE_GTC)
    async with watching(client) as stream:
        await end_session(server)
        late = await submit(client)
        created, *expired = await events(stream, 3)
    assert created.order == late
    assert {event.order.order_id for event in expired} == {
        *(pending.order_id, working.order_id)
    }
    for event in expired:
        assert event.type == pb.ORDER_EVENT_TYPE_EXPIRED
        assert event.actor == "server"
        assert event.order.status == pb.ORDER_STATUS_EXPIRED
    assert (await get(client, lasting)).status == pb.ORDER_STATUS_OPEN
    assert (await get(client, late)).status == pb.ORDER_STATUS_PENDING


async def test_the_broker_is_told_to_stop_working_it(server: Server, client: Client):
    order = await open_order(client)
    request = pb.WatchBrokerCommandsRequest()
    async with client.follow(client.broker.WatchBrokerCommands, request) as stream:
        async for response in stream:
            if response.event.HasField("snapshot_complete"):
                await end_session(server)
            for command in response.commands:
                if command.type == pb.BROKER_COMMAND_TYPE_EXPIRE:
                    assert command.order.order_id == order.order_id
                    return


async def test_an_expiry_that_a_broker_reports_is_no_command(client: Client):
    request = pb.WatchBrokerCommandsRequest()
    async with client.follow(client.broker.WatchBrokerCommands, request) as stream:
        async for response in stream:
            if response.event.HasField("snapshot_complete"):
                break
        order = await open_order(client)
        await report(client, order, "EXPIRED")
        await submit(client)
        kinds = [c.type for _ in range(2) for c in (await anext(stream)).commands]
    assert kinds == [pb.BROKER_COMMAND_TYPE_NEW] * 2


async def test_a_fill_after_the_end_is_kept_and_marked_late(
    server: Server, client: Client
):
    order = await open_order(client)
    async with watching(client) as stream:
        await end_session(server)
        await events(stream, 1)
    (result,) = await book(client, execution(order, 3))
    assert result.order.status == pb.ORDER_STATUS_EXPIRED
    assert result.order.filled_quantity == 3


NEW_YORK = "17:00 America/New_York"
ENDS = [
    ("17:00", "2024-05-01T17:00:00", "2024-05-01T17:00:00"),
    ("17:00", "2024-05-01T16:59:59", "2024-04-30T17:00:00"),
    (NEW_YORK, "2024-05-01T21:30:00", "2024-05-01T21:00:00"),
    (NEW_YORK, "2024-05-01T20:30:00", "2024-04-30T21:00:00"),
    (NEW_YORK, "2024-01-02T01:00:00", "2024-01-01T22:00:00"),
    # Over the changes of the clocks, on 2024-03-10 and 2024-11-03.
    (NEW_YORK, "2024-03-10T20:59:59", "2024-03-09T22:00:00"),
    (NEW_YORK, "2024-03-10T21:00:00", "2024-03-10T21:00:00"),
    (NEW_YORK, "2024-11-03T21:59:59", "2024-11-02T21:00:00"),
    ("02:30 America/New_York", "2024-03-10T12:00:00", "2024-03-10T07:30:00"),
]


@pytest.mark.parametrize(("configured", "now", "ended"), ENDS)
def test_the_last_end_of_a_session(configured: str, now: str, ended: str):
    at = datetime.fromisoformat(now).replace(tzinfo=UTC)
    end = last_end(SESSION_END.parse(configured), at)  # type: ignore[arg-type]
    assert end == datetime.fromisoformat(ended).replace(tzinfo=UTC)
    assert at - timedelta(days=1, hours=1) <= end <= at
