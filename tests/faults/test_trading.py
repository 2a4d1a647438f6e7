"""Whatever is killed, what was acknowledged is there, and was told once and in order.

Each ordeal trades on two servers at once, at 200 orders a second.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import gt
from typing import NamedTuple

import grpc

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import Desk, Server, until
from tests.faults.trading import (
    RATE,
    SYMBOLS,
    Gateway,
    Journal,
    Trading,
    Venue,
    kill_a_commit,
    new_order,
    number_of,
    slow_commits,
    stored_orders,
)
from tests.orders import events, report, submit, watching

AWAY_S = 30  # several heartbeats (5 s) and many polls (1 s) of every follower
TWICE = 400  # orders that are sent twice


class Ordeal(NamedTuple):
    servers: list[Server]
    trading: Trading


@asynccontextmanager
async def ordeal(desk: Desk) -> AsyncIterator[Ordeal]:
    """Trade while the block kills; then compare everything."""
    async with (
        desk.server() as one,
        desk.server() as other,
        Client(one.target) as client,
        Client(other.target) as second,
    ):
        trading = Trading(client, second)
        async with trading.running():
            await desk.pause()
            yield Ordeal([one, other], trading)
            await desk.pause()
        await trading.agrees()


async def test_a_killed_server_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk) as (servers, _):
        for _ in range(3):
            server = desk.rng.choice(servers)
            await server.kill()
            await server.start()
            await desk.pause()


async def test_a_killed_valkey_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk):
        for _ in range(2):
            await desk.restart(desk.valkey)
            await desk.pause()


async def test_a_killed_postgresql_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk):
        for _ in range(2):
            await desk.restart(desk.postgres)
            await desk.pause()


async def test_postgresql_killed_while_it_commits_loses_and_doubles_nothing(desk: Desk):
    await slow_commits(desk.dsn)
    async with ordeal(desk) as (_, trading):
        for _ in range(4):
            await kill_a_commit(desk.dsn)
            await goes_on(trading)


async def test_two_of_them_killed_together_lose_and_double_nothing(desk: Desk):
    async with ordeal(desk) as (servers, _):
        for _ in range(2):
            killed = desk.rng.sample(["server", "valkey", "postgres"], 2)
            print("killed together:", killed)
            server = desk.rng.choice(servers)
            if "server" in killed:
                await server.kill()
            services = [desk.valkey] * ("valkey" in killed)
            services += [desk.postgres] * ("postgres" in killed)
            await asyncio.gather(*(desk.restart(service) for service in services))
            if "server" in killed:
                await server.start()
            await desk.pause()


async def test_a_server_that_is_told_to_stop_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk) as (servers, _):
        server = desk.rng.choice(servers)
        assert await server.stop() == 0
        await desk.pause()
        await server.start()


async def test_trading_goes_on_while_valkey_is_away(desk: Desk):
    async with ordeal(desk) as (_, trading):
        await until(lambda: trading.settled, "an order is settled")
        failures = trading.journal.failures.total()
        await desk.valkey.kill()
        back_at = time.monotonic() + AWAY_S
        while time.monotonic() < back_at:
            await goes_on(trading)
        assert trading.journal.failures.total() == failures
        await desk.valkey.start()


def ahead(trading: Trading, before: tuple[int, int, int]) -> bool:
    return all(map(gt, progress(trading), before))


def progress(trading: Trading) -> tuple[int, int, int]:
    return trading.acknowledged, trading.reported, trading.settled


async def goes_on(trading: Trading) -> None:
    """Wait for another order, another fill, and for both watchers to see an end."""
    before = progress(trading)
    await until(lambda: all(map(gt, progress(trading), before)), "trading goes on")


async def test_a_server_where_nothing_is_done_polls_while_valkey_is_away(desk: Desk):
    async with (
        desk.server() as busy,
        desk.server() as idle,
        Client(busy.target) as client,
        Client(idle.target) as second,
        watching(second) as stream,
    ):
        await desk.valkey.kill()
        for _ in range(2):
            order = await submit(client)
            assert [event.order for event in await events(stream, 1)] == [order]
        await desk.valkey.start()


async def test_orders_wait_while_postgresql_is_away(desk: Desk):
    async with ordeal(desk) as (_, trading):
        await until(lambda: trading.settled, "an order is settled")
        failures = trading.journal.failures
        await desk.postgres.kill()
        await until(lambda: failures, "a call fails")
        before = progress(trading)
        await until(lambda: failures.total() > 2 * RATE, "all calls fail")
        assert failures.keys() == {
            (grpc.StatusCode.UNAVAILABLE, "BACKEND_UNAVAILABLE"),
        }
        assert progress(trading) == before
        await desk.postgres.start()
        await goes_on(trading)


async def test_a_killed_gateway_loses_and_doubles_nothing(desk: Desk):
    async with ordeal(desk) as (_, trading):
        for _ in range(10):
            await desk.pause(0.1, 0.4)
            trading.kill_gateway(desk.rng.randrange(2))


async def test_a_gateway_is_told_what_its_predecessor_had_taken(desk: Desk):
    journal = Journal()
    async with desk.server() as server, Client(server.target) as client:
        for number in (1, 2, 3):
            request = pb.SubmitOrderRequest(order=new_order(number))
            await journal.call(client.order.SubmitOrder, request)
        taken, working, new = journal.orders
        await report(client, taken, "SUBMITTED")
        await report(client, working, "ACKNOWLEDGED")
        await server.kill()
        await server.start()
        gateway = Gateway(journal, client, Venue(), SYMBOLS)
        task = asyncio.create_task(gateway.run())
        await until(gateway.ready.is_set, "it has the snapshot")
        task.cancel()
    told = [
        (c.order.order_id, c.type, c.order.HasField("submitted_at"))
        for c in gateway.found
    ]
    assert told == [
        (taken.order_id, pb.BROKER_COMMAND_TYPE_NEW, True),
        (working.order_id, pb.BROKER_COMMAND_TYPE_WORKING, False),
        (new.order_id, pb.BROKER_COMMAND_TYPE_NEW, False),
    ]


async def test_an_order_sent_to_two_servers_at_once_is_one(desk: Desk):
    journal = Journal()
    async with (
        desk.server() as one,
        desk.server() as other,
        Client(one.target) as client,
        Client(other.target) as second,
    ):

        async def submit_to_both(number: int) -> None:
            request = pb.SubmitOrderRequest(order=new_order(number))
            calls = (
                journal.call(each.order.SubmitOrder, request)
                for each in (client, second)
            )
            answers = await asyncio.gather(*calls)
            assert sum(not answer.duplicate for answer in answers) <= 1

        async with asyncio.TaskGroup() as group:
            for number in range(TWICE):
                group.create_task(submit_to_both(number))
            known = desk.rng.randrange(TWICE)
            await until(lambda: len(journal.orders) > known, "some are known")
            await one.kill()
            await one.start()
        stored = await stored_orders(second)
        assert sorted(map(number_of, stored.values())) == list(range(TWICE))
        assert len(journal.orders) == 2 * TWICE
        assert [o for o in journal.orders if stored.get(o.order_id) != o] == []
