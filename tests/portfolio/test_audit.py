"""The audit finds what is not as the executions say, and nothing else."""

import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.portfolio import audit
from tests.conftest import both_editions
from tests.portfolio import Desk, at, bust, correct, fill


async def audited(client: Client) -> pb.AuditPositionsResponse:
    return await client.portfolio.AuditPositions(pb.AuditPositionsRequest())


async def drifts(client: Client) -> list[tuple[str, str, float, float]]:
    found = (await audited(client)).drifts
    return [(d.key, d.column, d.stored, d.recomputed) for d in found]


@both_editions
async def test_nothing_has_drifted_where_all_was_booked(client: Client, desk: Desk):
    one, two = fill("A", 0.1, 10.1), fill("A", 0.2, 9.7, strategy_id="t")
    await desk.book(one, two, fill("B", -3, 7))
    await desk.book(bust(one), *correct(two, price=9.9), fill("C", 1, 1))
    await desk.execute("UPDATE orders SET filled_quantity = 0, avg_fill_price = NULL"
                       " WHERE order_id = $1", one.order_id)  # fmt: skip
    await desk.execute("UPDATE orders SET avg_fill_price = 9.9 WHERE order_id = $1",
                       two.order_id)  # fmt: skip
    response = await audited(client)
    assert not response.drifts
    assert response.n_executions == 7
    assert (response.n_orders, response.n_positions) == (4, 3)


@both_editions
@pytest.mark.parametrize("column", ["quantity", "average_cost", "realized_pnl"])
async def test_a_drifted_position_is_found(client: Client, desk: Desk, column: str):
    await desk.book(fill("A", 3, 100), fill("A", -1, 110), fill("B", 1, 1))
    await desk.execute(f"UPDATE positions SET {column} = 7 WHERE symbol = 'A'")
    expected = {"quantity": 2, "average_cost": 100, "realized_pnl": 10}[column]
    assert await drifts(client) == [("A", f"positions.{column}", 7, expected)]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("quantity", 2),
        ("average_cost", 100),
        ("realized_pnl", 9.5),
        ("cash_flow", -190.5),
        ("commission", 0.5),
    ],
)
async def test_a_drifted_position_of_a_strategy_is_found(
    client: Client, desk: Desk, column: str, expected: float
):
    await desk.book(fill("A", 3, 100, strategy_id="t"))
    await desk.book(fill("A", -1, 110, commission=0.5, strategy_id="t"))
    await desk.execute(f"UPDATE strategy_positions SET {column} = 7")
    found = [("t A", f"strategy_positions.{column}", 7, expected)]
    assert await drifts(client) == found


async def test_a_drifted_order_is_found(client: Client, desk: Desk):
    execution = fill("A", 3, 100)
    await desk.book(execution)
    await desk.execute("UPDATE orders SET filled_quantity = 2, avg_fill_price = 99")
    assert await drifts(client) == [
        (execution.order_id, "orders.filled_quantity", 2, 3),
        (execution.order_id, "orders.avg_fill_price", 99, 100),
    ]


async def test_small_drifts_of_large_sums_are_found(client: Client, desk: Desk):
    await desk.book(fill("A", 1e6, 1e4), fill("A", -1e6, 1e4))
    await desk.execute("UPDATE positions SET realized_pnl = realized_pnl + 0.1")
    assert await drifts(client) == [("A", "positions.realized_pnl", 0.1, 0)]


async def test_rows_that_are_missing_or_that_nothing_explains_are_found(
    client: Client, desk: Desk
):
    await desk.book(fill("A", 1, 100), fill("B", 2, 5))
    await desk.execute("DELETE FROM positions WHERE symbol = 'A'")
    await desk.execute("DELETE FROM strategy_positions WHERE symbol = 'B'")
    await desk.execute(
        "INSERT INTO positions (symbol, quantity, average_cost, opened_at)"
        " VALUES ('C', 3, 0, $1)",
        at(0),
    )
    assert await drifts(client) == [
        ("A", "positions.quantity", 0, 1),
        ("A", "positions.average_cost", 0, 100),
        ("s B", "strategy_positions.quantity", 0, 2),
        ("s B", "strategy_positions.average_cost", 0, 5),
        ("s B", "strategy_positions.cash_flow", 0, -10),
        ("C", "positions.quantity", 3, 0),
    ]


async def test_executions_that_were_never_booked_are_found(client: Client, desk: Desk):
    await desk.book(fill("A", 1, 100))
    await desk.execute(
        "INSERT INTO executions (time, symbol, side, quantity, price)"
        " VALUES ($1, 'A', 'sell', 3, 110), ($1, 'B', 'buy', 1, 5)",
        at(0),
    )
    assert await drifts(client) == [
        ("A", "positions.quantity", 1, -2),
        ("A", "positions.average_cost", 100, 110),
        ("A", "positions.realized_pnl", 0, 10),
        (" A", "strategy_positions.quantity", 0, -3),
        (" A", "strategy_positions.average_cost", 0, 110),
        (" A", "strategy_positions.cash_flow", 0, 330),
        ("B", "positions.quantity", 0, 1),
        ("B", "positions.average_cost", 0, 5),
        (" B", "strategy_positions.quantity", 0, 1),
        (" B", "strategy_positions.average_cost", 0, 5),
        (" B", "strategy_positions.cash_flow", 0, -5),
    ]


async def test_many_symbols_are_compared_in_batches_and_the_first_drifts_returned(
    client: Client, desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(audit, "BATCH", 2)
    await desk.book(*(fill(symbol, 1, 1) for symbol in "ABCDE"))
    assert not await drifts(client)
    await desk.execute("UPDATE positions SET quantity = 2 WHERE symbol IN ('B', 'E')")
    expected = [("B", "positions.quantity", 2, 1), ("E", "positions.quantity", 2, 1)]
    assert await drifts(client) == expected
    monkeypatch.setattr(audit, "MAX_DRIFTS", 1)
    assert await drifts(client) == expected[:1]
