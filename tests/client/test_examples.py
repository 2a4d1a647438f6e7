"""The example strategy's arithmetic."""

from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane.examples.moving_average import (
    LONG,
    SHORT,
    Crosses,
    MovingAverageCross,
    Parameters,
)

mids = st.lists(st.decimals(-100, 100, places=5), max_size=60)
lengths = st.tuples(st.integers(1, 5), st.integers(1, 10))


def crosses(values: list[Decimal], fast: int, slow: int) -> list[int]:
    found = Crosses(fast, slow)
    return [found.add(value) for value in values]


def test_a_cross_is_where_the_averages_change_sides():
    values = [Decimal(n) for n in (1, 1, 1, 2, 3, 2, 1, 1, 1, 1, 2)]
    assert [side for side in crosses(values, 1, 3) if side] == [SHORT, LONG]


@given(st.decimals(0, 1, places=5), lengths)
def test_a_flat_market_has_no_crosses(value: Decimal, lengths: tuple[int, int]):
    fast, more = lengths
    assert not any(crosses([value] * 50, fast, fast + more))


@given(mids, lengths)
def test_crosses_are_those_of_the_averages_of_the_windows(
    values: list[Decimal], lengths: tuple[int, int]
):
    fast, slow = lengths[0], sum(lengths)
    side, expected = 0, []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - slow) : end]
        difference = sum(window[-fast:]) * slow - sum(window) * fast
        now = (difference > 0) - (difference < 0) if len(window) == slow else 0
        expected.append(now if now and now == -side else 0)
        side = now or side
    assert crosses(values, fast, slow) == expected


async def test_a_decision_follows_from_the_quotes_alone():
    def decisions() -> list[object]:
        start = datetime(2024, 1, 1, tzinfo=UTC)
        strategy = MovingAverageCross(client, Parameters(["A"], start, 1, 2, 50.0))
        return [found for made in quotes if (found := strategy.decide(made))]

    quotes = [pb.Quote(symbol="A", bid=bid, ask=bid + 1) for bid in (1, 2, 3, 2, 1, 2)]
    for number, made in enumerate(quotes):
        made.time.FromNanoseconds(number * 1_000_001)
    async with Client("127.0.0.1:1") as client:
        first, second = decisions(), decisions()
    assert first == second
    sides = [(order.side, order.quantity) for _, order in first]  # type: ignore[misc]
    assert sides == [(pb.SIDE_SELL, 50), (pb.SIDE_BUY, 100)]
