"""Coalescing: who shares a round, what each caller gets, and what is refused."""

import asyncio
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplane_server.coalescing import Coalescer
from quantplane_server.errors import Overloaded


class Rounds:
    """Work that returns ten times each item, and waits where it is held."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.fails: dict[int, BaseException] = {}  # by item: what its round raises

    async def work(self, items: list[int]) -> Sequence[int]:
        self.rounds.append(items)
        self.begun.set()
        await self.go.wait()
        for item in items:
            if error := self.fails.get(item):
                raise error
        return [10 * item for item in items]


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


def begin(
    coalescer: Coalescer[int, int], *items: Sequence[int]
) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(coalescer.do(each)) for each in items]


async def held(rounds: Rounds, coalescer: Coalescer[int, int]) -> asyncio.Task[None]:
    """Return a call of item 0 whose round is under way, and stays so."""
    rounds.go.clear()
    (task,) = begin(coalescer, [0])
    await rounds.begun.wait()
    return task


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lone_item_is_done_at_once(rounds: Rounds):
    assert await Coalescer(rounds.work, 10, 100).do([1]) == [10]
    assert rounds.rounds == [[1]]


async def test_no_items_are_no_round(rounds: Rounds):
    assert await Coalescer(rounds.work, 10, 100).do([]) == []
    assert rounds.rounds == []


async def test_items_that_come_during_a_round_are_done_together_next(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 10, 100)
    first = await held(rounds, coalescer)
    others = begin(coalescer, [1], [2, 3], [4])
    await settled()
    rounds.go.set()
    assert await asyncio.gather(first, *others) == [[0], [10], [20, 30], [40]]
    assert rounds.rounds == [[0], [1, 2, 3, 4]]


@given(
    calls=st.lists(st.lists(st.integers(1, 99), max_size=7), max_size=8),
    most=st.integers(1, 5),
)
async def test_results_match_items_and_rounds_keep_the_order(
    calls: list[list[int]], most: int
):
    rounds = Rounds()
    coalescer = Coalescer(rounds.work, most, 100)
    found = await asyncio.gather(*begin(coalescer, *calls))
    assert found == [[10 * item for item in call] for call in calls]
    assert list(chain(*rounds.rounds)) == list(chain(*calls))
    assert all(0 < len(items) <= most for items in rounds.rounds)


async def test_an_error_reaches_all_of_its_round_and_the_next_one_works(
    rounds: Rounds,
):
    coalescer = Coalescer(rounds.work, 2, 100)
    first = await held(rounds, coalescer)
    others = begin(coalescer, [1], [2, 3], [4])
    await settled()
    rounds.fails = {2: KeyError("broken")}
    rounds.go.set()
    assert await first == [0]
    for other in others[:2]:
        with pytest.raises(KeyError, match="broken"):
            await other
    assert await others[2] == [40]
    assert rounds.rounds == [[0], [1, 2], [3, 4]]
    assert await coalescer.do([5]) == [50]


async def test_too_few_results_are_an_error_and_leave_no_one_waiting():
    async def work(items: list[int]) -> list[int]:
        return items[1:]

    coalescer = Coalescer(work, 10, 100)
    async with asyncio.timeout(10):
        with pytest.raises(ValueError):
            await coalescer.do([1, 2, 3])


async def test_work_that_is_cancelled_leaves_no_one_waiting(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 10, 100)
    rounds.fails = {1: asyncio.CancelledError()}
    (task,) = begin(coalescer, [1])
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    assert await coalescer.do([2]) == [20]


async def test_at_the_limit_a_call_is_refused_whole(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 10, 3)
    first = await held(rounds, coalescer)
    (second,) = begin(coalescer, [1, 2])
    await settled()
    with pytest.raises(Overloaded):
        await coalescer.do([3, 4])
    (third,) = begin(coalescer, [5])
    await settled()
    rounds.go.set()
    assert await asyncio.gather(first, second, third) == [[0], [10, 20], [50]]
    assert rounds.rounds == [[0], [1, 2, 5]]


async def test_a_caller_that_gives_up_takes_nothing_from_others(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 10, 100)
    first = await held(rounds, coalescer)
    gone, other = begin(coalescer, [1], [2])
    await settled()
    first.cancel()
    gone.cancel()
    await settled()
    rounds.go.set()
    assert await other == [20]
    assert rounds.rounds == [[0], [1, 2]]


async def test_closing_waits_for_all_that_was_taken(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 1, 100)
    await coalescer.close()
    first = await held(rounds, coalescer)
    (second,) = begin(coalescer, [1])
    closing = asyncio.create_task(coalescer.close())
    (third,) = begin(coalescer, [2])
    await settled()
    assert not closing.done()
    rounds.go.set()
    await closing
    assert rounds.rounds == [[0], [1], [2]]
    assert [await task for task in (first, second, third)] == [[0], [10], [20]]


async def test_who_gives_up_closing_cancels_no_work(rounds: Rounds):
    coalescer = Coalescer(rounds.work, 1, 100)
    first = await held(rounds, coalescer)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await coalescer.close()
    rounds.go.set()
    assert await first == [0]
