"""Token buckets, by a clock that the test moves."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane_server.errors import RateLimited
from quantplane_server.rpc import limits
from quantplane_server.rpc.limits import Buckets, Limits

PER_S, BURST = 4.0, 3.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "monotonic", clock)
    return clock


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 2)))
def test_in_no_time_more_is_taken_than_the_rate_and_a_burst_allow(
    clock: Clock, pauses_s: list[float]
):
    buckets = Buckets(PER_S, BURST)
    taken_at = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        if not buckets.take("a"):
            taken_at.append(clock.now_s)
    for first, since in enumerate(taken_at):
        for last, until in enumerate(taken_at[first:], 1):
            assert last <= BURST + PER_S * (until - since) + 1e-6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 2)))
def test_after_the_wait_that_was_told_there_is_one(clock: Clock, pauses_s: list[float]):
    buckets = Buckets(PER_S, BURST)
    for pause_s in pauses_s:
        clock.now_s += pause_s
        if wait_s := buckets.take("a"):
            assert 0 < wait_s <= 1 / PER_S
            clock.now_s += wait_s + 1e-9
            assert buckets.take("a") == 0


def test_one_s_bucket_is_not_another_s(clock: Clock):
    buckets = Buckets(1, 1)
    assert buckets.take("a") == 0
    assert buckets.take("a") > 0
    assert buckets.take("b") == 0


def test_names_that_are_too_many_are_forgotten_the_oldest_first(clock: Clock):
    buckets = Buckets(1, 1, most=2)
    for name in ("a", "b", "c"):
        buckets.take(name)
    assert buckets.take("c") > 0
    assert buckets.take("a") == 0


def test_a_call_counts_until_it_ends_however_it_does(clock: Clock):
    held = Limits(calls=1, calls_per_s=10)
    with pytest.raises(ZeroDivisionError), held.held("a"):
        with pytest.raises(RateLimited, match="at a time"), held.held("a"):
            pass
        raise ZeroDivisionError
    with held.held("a"):
        pass
