"""Booking in real databases."""

import asyncio
import random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane.ids import new_id
from quantplane_server.checks import FIRST, LAST
from quantplane_server.pages import LAST_ID
from quantplane_server.portfolio import queries
from quantplane_server.portfolio.audit import Audit
from quantplane_server.portfolio.booking import book
from tests.conftest import both_editions
from tests.portfolio import (
    Desk,
    assert_held,
    at,
    bust,
    correct,
    fill,
    insert_orders,
    replayed,
)


async def numbers(desk: Desk) -> list[Any]:
    return await desk.fetch(
        "SELECT symbol, position_number FROM executions ORDER BY execution_id"
    )


async def no_orders(conn: Any, limit: int) -> tuple[list[pb.Drift], int]:
    return [], 0


async def drifts(desk: Desk) -> list[pb.Drift]:
    return list((await Audit(desk.db, no_orders).run()).drifts)


@both_editions
async def test_executions_are_stored_as_they_are_and_told_what_they_did(desk: Desk):
    first = fill("A", 2, 100, 1, commission=1, venue="X", late=True)
    second = fill("A", -3, 110, 2, strategy_id="s")
    await desk.book(first)
    await desk.book(second)
    assert (first.position_quantity, first.realized_pnl) == (2, -1)
    assert (second.position_quantity, second.realized_pnl) == (-1, 20)
    async with desk.db.connection() as conn:
        stored = await queries.executions_of(
            conn, [first.order_id, second.order_id], 10
        )
    assert stored == [first, second]


async def test_several_of_a_symbol_in_one_transaction_count_in_their_order(desk: Desk):
    executions = [
        fill("A", 1, 100),
        fill("B", 1, 5),
        fill("A", 1, 110),
        fill("A", -2, 120),
    ]
    await desk.book(*executions)
    await desk.book(fill("B", 1, 6))
    assert [e.position_quantity for e in executions] == [1, 1, 2, 0]
    assert [e.realized_pnl for e in executions] == [0, 0, 0, 30]
    assert await desk.account() == (0, 0, 30)
    expected = [("A", 1), ("B", 1), ("A", 2), ("A", 3), ("B", 2)]
    assert await numbers(desk) == expected


async def test_the_account_nets_what_strategies_hold_against_each_other(desk: Desk):
    long = fill("A", 3, 100, 1, strategy_id="a")
    short = fill("A", -2, 110, 2, strategy_id="b", commission=1)
    await desk.book(long, short)
    assert await desk.account() == (1, 100, 19)
    assert await desk.strategy("a") == (3, 100, 0)
    assert await desk.strategy("b") == (-2, 110, -1)
    assert short.position_quantity == -2
    flows = "SELECT cash_flow, commission FROM strategy_positions ORDER BY strategy_id"
    assert await desk.fetch(flows) == [(-300, 0), (219, 1)]
    opener = "SELECT strategy_id, opened_at, updated_at, n_executions FROM positions"
    assert await desk.fetch(opener) == [("a", at(1), at(2), 2)]


async def test_what_no_strategy_did_is_kept_under_an_empty_one(desk: Desk):
    execution = fill("A", 1, 100, strategy_id="")
    await desk.book(execution)
    assert await desk.strategy("") == (1, 100, 0)
    assert execution.position_quantity == 1


async def test_nothing_is_booked_where_the_transaction_fails(desk: Desk):
    first = fill("A", 1, 100)
    await desk.book(first)
    again = fill("A", 1, 100)
    again.order_id, again.broker_exec_id = first.order_id, first.broker_exec_id
    with pytest.raises(Exception, match="broker_exec_id"):
        await desk.book(fill("A", 5, 7), again)
    assert await desk.account() == (1, 100, 0)
    assert await numbers(desk) == [("A", 1)]


# --- Busts and corrections ----------------------------------------------------------


@both_editions
async def test_a_bust_leaves_what_there_would_be_without_the_fill(desk: Desk):
    wrong = fill("A", 2, 50)
    rest = [fill("A", 2, 100), fill("A", -1, 120, commission=1)]
    await desk.book(wrong, *rest)
    assert await desk.account() == (3, 75, 44)
    reversal = bust(wrong, 9)
    await desk.book(reversal)
    assert await desk.account() == await desk.strategy() == (1, 100, 19)
    assert (reversal.position_quantity, reversal.realized_pnl) == (1, -25)
    updated = "SELECT updated_at, n_executions FROM positions"
    assert await desk.fetch(updated) == [(at(9), 4)]


@both_editions
async def test_a_correction_counts_where_the_wrong_one_did(desk: Desk):
    wrong = fill("A", 2, 40)
    await desk.book(wrong)
    await desk.book(fill("A", 1, 130), fill("A", -1, 120))
    assert await desk.account() == (2, 70, 50)
    reversal, right = correct(wrong, price=100)
    await desk.book(reversal, right)
    assert await desk.account() == (2, 110, 10)
    assert (reversal.position_quantity, right.position_quantity) == (0, 2)
    assert (reversal.realized_pnl, right.realized_pnl) == (-60, 20)
    rows = "SELECT position_number FROM executions ORDER BY execution_id"
    assert await desk.fetch(rows) == [(1,), (2,), (3,), (4,), (1,)]
    assert await desk.fetch("SELECT n_executions FROM positions") == [(4,)]


async def test_a_correction_can_be_corrected_and_taken_back(desk: Desk):
    wrong = fill("A", 2, 50)
    await desk.book(wrong, fill("A", -1, 120))
    _, second = first = correct(wrong, price=100)
    await desk.book(*first)
    _, third = again = correct(second, quantity=1)
    await desk.book(*again)
    assert await desk.account() == (0, 0, 20)
    await desk.book(bust(third))
    assert await desk.account() == (-1, 120, 0)


async def test_a_fill_and_its_correction_may_come_in_one_transaction(desk: Desk):
    wrong = fill("A", 2, 50)
    await desk.book(wrong, *correct(wrong, price=100), fill("A", -1, 120))
    assert await desk.account() == (1, 100, 20)


async def test_a_bust_of_all_there_was_leaves_nothing(desk: Desk):
    only = fill("A", 2, 50, 1, commission=1)
    await desk.book(only)
    await desk.book(bust(only, 2))
    assert await desk.account() == await desk.strategy() == (0, 0, 0)
    rows = "SELECT cash_flow, commission, opened_at FROM strategy_positions"
    assert await desk.fetch(rows) == [(0, 0, at(1))]


async def test_a_bust_leaves_other_strategies_alone(desk: Desk):
    wrong = fill("A", 2, 50, strategy_id="a")
    await desk.book(wrong, fill("A", -2, 60, strategy_id="b"))
    await desk.book(bust(wrong))
    assert await desk.strategy("b") == (-2, 60, 0)
    assert await desk.account() == (-2, 60, 0)
    opener = "SELECT strategy_id FROM positions"
    assert await desk.fetch(opener) == [("b",)]


async def test_what_was_never_booked_can_be_taken_back(desk: Desk):
    foreign = fill("A", 2, 50)
    await desk.book(fill("A", 1, 100))
    await insert(desk, foreign)
    await desk.book(*correct(foreign, price=60))
    assert await desk.account() == (3, pytest.approx((100 + 2 * 60) / 3), 0)


async def insert(desk: Desk, execution: pb.Execution) -> None:
    """Store an execution without booking it, as whoever knows only the tables."""
    await desk.execute(
        "INSERT INTO executions (execution_id, time, symbol, side, quantity, price)"
        " VALUES ($1, $2, $3, 'buy', $4, $5)",
        execution.execution_id,
        at(0),
        execution.symbol,
        execution.quantity,
        execution.price,
    )
    await desk.execute(
        "INSERT INTO orders (order_id, created_at, symbol, side, order_type, quantity)"
        " VALUES ($1, $2, 'A', 'buy', 'market', 1)",
        execution.order_id,
        at(0),
    )


kinds = st.sampled_from(["fill", "fill", "fill", "bust", "correct"])
steps = st.lists(
    st.tuples(
        kinds,
        st.integers(0, 100),  # which one to bust or correct
        st.integers(1, 9),  # tenths
        st.sampled_from([1, -1]),
        st.integers(-8, 80),  # price
        st.integers(-2, 9),  # commission
        st.sampled_from(["a", "b"]),
        st.booleans(),  # the transaction ends here
    ),
    min_size=1,
    max_size=20,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=steps)
async def test_whatever_is_taken_back_counts_as_if_it_had_been_right_from_the_start(
    desk: Desk, steps: Any
):
    symbol = new_id()
    right: list[pb.Execution] = []  # as it should have been from the start
    booked: list[pb.Execution] = []
    waiting: list[pb.Execution] = []
    for kind, which, tenths, sign, price, commission, strategy, ends in steps:
        terms = {"quantity": tenths / 10, "price": price, "commission": commission}
        if kind == "fill" or not right:
            new = fill(symbol, sign, 1, strategy_id=strategy)
            for name, value in terms.items():
                setattr(new, name, value)
            right.append(new)
            waiting.append(new)
        elif kind == "bust":
            waiting.append(bust(right.pop(which % len(right))))
        else:
            both = correct(right[which % len(right)], **terms)
            right[which % len(right)] = both[1]
            waiting += both
        if ends:
            await desk.book(*waiting)
            booked += waiting
            waiting = []
    await desk.book(*waiting)
    booked += waiting
    assert_held(await desk.account(symbol), replayed(right))
    for strategy in {execution.strategy_id for execution in booked}:
        of_strategy = [e for e in right if e.strategy_id == strategy]
        held = await desk.strategy(strategy, symbol)
        assert_held(held, replayed(of_strategy))
        told = [e for e in booked if e.strategy_id == strategy]
        assert sum(e.realized_pnl for e in told) == pytest.approx(held[2], abs=1e-9)
        assert told[-1].position_quantity == held[0]
    async with desk.db.connection() as conn:
        found = await queries.executions_of(conn, [e.order_id for e in booked], 1_000)
    assert found == booked
    assert not await drifts(desk)


# --- Together -----------------------------------------------------------------------


async def test_transactions_on_the_same_symbols_in_any_order_wait_for_each_other(
    desk: Desk,
):
    symbols = [f"S{number}" for number in range(12)]
    choose = random.Random(7)

    async def trade() -> None:
        for _ in range(15):
            some = choose.sample(symbols, 8)
            await desk.book(*(fill(symbol, 1, 10) for symbol in some))

    await asyncio.gather(*(trade() for _ in range(8)))
    total = "SELECT sum(quantity), sum(n_executions) FROM positions"
    assert await desk.fetch(total) == [(8 * 15 * 8, 8 * 15 * 8)]
    assert await desk.fetch(
        "SELECT count(*) FROM (SELECT DISTINCT symbol, position_number"
        " FROM executions) AS distinct_numbers"
    ) == [(8 * 15 * 8,)]
    assert not await drifts(desk)


async def test_who_opens_a_symbol_waits_for_who_is_opening_it(desk: Desk):
    first, second = fill("A", 1, 100), fill("A", 1, 110)
    async with desk.db.transaction() as conn:
        await insert_orders(conn, [first])
        await book(conn, [first])
        waiting = asyncio.create_task(desk.book(second))
        while not await desk.fetch("SELECT FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
    await waiting
    assert second.position_quantity == 2


# --- Reading ------------------------------------------------------------------------


@both_editions
async def test_executions_are_found_by_the_names_that_brokers_gave_them(desk: Desk):
    one, two = fill("A", 1, 100), fill("A", 2, 101)
    await desk.book(one, two)
    names = [(e.order_id, e.broker_exec_id) for e in (one, two)]
    crossed = (one.order_id, two.broker_exec_id)
    async with desk.db.connection() as conn:
        found = await queries.executions_by_broker_id(conn, [*names, crossed])
    assert found == dict(zip(names, (one, two), strict=True))


@both_editions
async def test_sums_over_an_order_count_reversals_against_fills(desk: Desk):
    one = fill("A", 2, 100)
    two = fill("A", 3, 110, order_id=one.order_id)
    other = fill("B", 7, 10)
    await desk.book(one, two, other, bust(one))
    wanted = [one.order_id, other.order_id, new_id()]
    async with desk.db.connection() as conn:
        sums = await queries.filled(conn, wanted)
    assert sums == {one.order_id: (3, 330, 330), other.order_id: (7, 70, 70)}


@both_editions
async def test_executions_are_listed_by_pages_the_latest_first(desk: Desk):
    booked = [
        fill("AB"[n % 2], 1, 100, n // 4, strategy_id=f"s{n % 3}") for n in range(12)
    ]
    await desk.book(*booked)
    latest = sorted(booked, key=lambda e: (-e.time.seconds, e.execution_id))

    async def listed(size: int, order_id: str = "", **fields: Any) -> list[Any]:
        wanted, place, found = pb.OrderFilter(**fields), (at(2), LAST_ID), []
        while True:
            async with desk.db.connection() as conn:
                page = await queries.list_executions(
                    conn, wanted, order_id, at(1), place, size
                )
            found += page
            if len(page) < size:
                return found
            place = (
                page[-1].time.ToDatetime(tzinfo=FIRST.tzinfo),
                UUID(page[-1].execution_id),
            )

    inside = [e for e in latest if e.time.ToDatetime(tzinfo=FIRST.tzinfo) == at(1)]
    assert await listed(3) == inside
    assert await listed(1, symbols=["A"]) == [e for e in inside if e.symbol == "A"]
    some = await listed(2, strategy_ids=["s0", "s2"], symbols=["A", "B"])
    assert some == [e for e in inside if e.strategy_id != "s1"]
    assert await listed(2, inside[0].order_id) == [inside[0]]
    async with desk.db.connection() as conn:
        all_of_them = await queries.list_executions(
            conn, pb.OrderFilter(), "", FIRST, (LAST, LAST_ID), 100
        )
    assert all_of_them == latest
