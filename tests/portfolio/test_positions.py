"""What fills make of positions."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane_server.portfolio.positions import Book, Position, after, fill_of
from tests.portfolio import assert_held, at, fill, replayed


def folded(*fills: pb.Execution) -> Position:
    position = Position()
    for execution in fills:
        position, _ = after(position, fill_of(execution))
    return position


def test_a_fill_that_adds_moves_the_average_by_quantity():
    position = folded(fill("A", 1, 100), fill("A", 3, 104))
    assert (position.quantity, position.average_cost) == (4, 103)
    assert position.realized_pnl == 0


def test_a_fill_that_reduces_realises_and_leaves_the_average():
    position = folded(fill("A", 4, 100), fill("A", -1, 110))
    assert (position.quantity, position.average_cost) == (3, 100)
    assert position.realized_pnl == 10


def test_a_short_position_gains_when_it_is_bought_back_lower():
    position = folded(fill("A", -4, 100), fill("A", 3, 90))
    assert (position.quantity, position.average_cost) == (-1, 100)
    assert position.realized_pnl == 30


def test_a_fill_that_flips_realises_all_and_opens_the_rest():
    position = folded(fill("A", 2, 100), fill("A", -5, 103))
    assert (position.quantity, position.average_cost) == (-3, 103)
    assert position.realized_pnl == 6


def test_commissions_and_rebates_are_part_of_what_is_realised():
    position = folded(
        fill("A", 2, 100, commission=3), fill("A", -2, 101, commission=-0.5)
    )
    assert (position.realized_pnl, position.commission) == (-0.5, 2.5)
    assert position.cash_flow == -0.5


def test_prices_may_be_negative():
    position = folded(fill("A", 2, -1), fill("A", 2, 0), fill("A", -4, -2))
    assert (position.quantity, position.realized_pnl) == (0, -6)


@pytest.mark.parametrize(
    "quantities", [(0.1, 0.2, -0.3), (0.3, -0.1, -0.2), (-0.3, 0.1, 0.2)]
)
def test_what_rounding_leaves_is_nothing(quantities: tuple[float, ...]):
    position = folded(*(fill("A", quantity, 100) for quantity in quantities))
    assert (position.quantity, position.average_cost) == (0, 0)


def test_what_is_dropped_as_rounding_is_still_accounted_for():
    position = folded(fill("A", 1e10, 100), fill("A", -1e10 + 1, 100))
    assert position.quantity == 0
    assert position.realized_pnl == position.cash_flow == -100


def test_a_position_is_opened_from_flat_and_by_a_flip_only():
    fills = [
        fill("A", 1, 1, 1, strategy_id="a"),
        fill("A", 1, 1, 2, strategy_id="b"),
        fill("A", -1, 1, 3, strategy_id="b"),
        fill("A", -3, 1, 4, strategy_id="c"),
        fill("A", 2, 1, 5, strategy_id="d"),
        fill("A", 1, 1, 6, strategy_id="e"),
    ]
    opened = [folded(*fills[:n]) for n in range(1, 7)]
    assert [position.strategy_id for position in opened] == list("aaacce")
    assert [position.opened_at for position in opened] == [
        at(minute) for minute in (1, 1, 1, 4, 4, 6)
    ]


def test_a_late_execution_does_not_turn_the_time_back():
    position = folded(fill("A", 1, 1, 5), fill("A", 1, 1, 3))
    assert position.updated_at == at(5)
    assert position.opened_at == at(5)
    assert position.updated_at - at(3) == timedelta(minutes=2)


fills = st.lists(
    st.builds(
        lambda tenths, sign, ticks, cents, strategy: fill(
            "A",
            sign * tenths / 10,
            ticks / 4,
            commission=cents / 100,
            strategy_id=strategy,
        ),
        st.integers(1, 20),
        st.sampled_from([1, -1]),
        st.integers(-40, 400),
        st.integers(-5, 50),
        st.sampled_from(["a", "b", ""]),
    ),
    max_size=40,
)


@given(fills=fills, mark=st.integers(-400, 4_000))
def test_positions_are_what_exact_numbers_make_of_the_fills(
    fills: list[pb.Execution], mark: int
):
    book = Book(Position(), {})
    gains = [book.add(fill_of(execution)) for execution in fills]
    everyone = {"": fills} | {
        id: [execution for execution in fills if execution.strategy_id == id]
        for id in book.strategies
    }
    assert_held(book.account[:3], replayed(fills))
    for strategy_id, held in book.strategies.items():
        expected = replayed(everyone[strategy_id])
        assert_held(held[:3], expected)
        assert held.cash_flow == pytest.approx(float(expected.cash), abs=1e-9)
    held_by_all = [book.account, *book.strategies.values()]
    for held in held_by_all:
        unrealized = held.quantity * (mark - held.average_cost)
        worth = held.cash_flow + held.quantity * mark
        assert held.realized_pnl + unrealized == pytest.approx(worth, abs=1e-6)
    realized = sum(held.realized_pnl for held in book.strategies.values())
    assert sum(gains) == pytest.approx(realized, abs=1e-6)
