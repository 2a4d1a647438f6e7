"""How much one caller may ask for, so that it leaves room for others."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from quantplane_server.errors import RateLimited

AGAIN_S = 1.0  # after which a caller with too many calls may try again


class Buckets:
    """Token buckets by name: each holds a second's worth, or `burst`, and refills.

    Of names that were not heard of for longest the buckets are forgotten, beyond
    `most` of them: they begin full again.
    """

    def __init__(self, per_s: float, burst: float, most: int = 10_000) -> None:
        self._per_s = per_s
        self._burst = burst
        self._most = most
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, name: str) -> float:
        """Return 0, or in how many seconds there is a token."""
        level, since = self._levels.get(name, (self._burst, 0.0))
        level += (monotonic() - since) * self._per_s
        return 0.0 if level >= 1 else (1 - level) / self._per_s

    def take(self, name: str) -> float:
        """Take a token; return 0, or in how many seconds there is one."""
        now = monotonic()
        level, since = self._levels.pop(name, (self._burst, now))
        level = min(level + (now - since) * self._per_s, self._burst)
        taken = level >= 1
        self._levels[name] = (level - 1 if taken else level, now)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)
        return 0.0 if taken else (1 - level) / self._per_s


class Limits:
    """What each caller of this process has begun, and what of it is under way."""

    def __init__(self, calls: int, calls_per_s: int) -> None:
        self._calls = calls
        self._calls_per_s = calls_per_s
        self._buckets = Buckets(calls_per_s, calls_per_s)
        self._under_way: dict[str, int] = {}

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Make a call. Raises RateLimited."""
        count = self._under_way.get(name, 0)
        if count >= self._calls:
            raise RateLimited(self._calls, "calls at a time", AGAIN_S)
        if wait_s := self._buckets.take(name):
            raise RateLimited(self._calls_per_s, "calls in a second", wait_s)
        self._under_way[name] = count + 1
        try:
            yield
        finally:
            if self._under_way[name] == 1:
                del self._under_way[name]
            else:
                self._under_way[name] -= 1
