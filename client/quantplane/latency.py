"""How long quotes are on their way, leg by leg, as a followed stream meets them.

    feed      the quote was made             →  handed to the publisher
    publish   handed to the publisher        →  put on the bus
    serve     put on the bus                 →  a response written
    deliver   the response written           →  read by the application
    total     the quote was made             →  read by the application

Each response counts once, with the newest of its quotes. A leg between two machines is
as true as their clocks: where they disagree it may be negative, and is kept as that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb

LEGS = ("feed", "publish", "serve", "deliver", "total")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
PRECISION_BITS = 5
OTEL = "opentelemetry.metrics"
BOUNDS_S = [  # of OpenTelemetry's buckets: from a loopback to a reader far behind
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
]


class Histogram:
    """Durations in buckets, 32 to each power of two of nanoseconds.

    So a few thousand buckets at most, and quantiles right to 1.6 %; the least and
    the greatest duration are exact.
    """

    def __init__(self) -> None:
        self.count = 0
        self.negative = 0  # of `count`
        self._buckets: dict[int, int] = {}
        self._least_ns = self._greatest_ns = 0

    def record(self, ns: int) -> None:
        if not self.count:
            self._least_ns = self._greatest_ns = ns
        elif ns < self._least_ns:
            self._least_ns = ns
        elif ns > self._greatest_ns:
            self._greatest_ns = ns
        self.count += 1
        self.negative += ns < 0
        bucket = _bucket(ns) if ns >= 0 else -_bucket(-ns)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    @property
    def min_s(self) -> float:
        """The least, in seconds; NaN of nothing."""
        return self._least_ns / 1e9 if self.count else math.nan

    @property
    def max_s(self) -> float:
        """The greatest, in seconds; NaN of nothing."""
        return self._greatest_ns / 1e9 if self.count else math.nan

    def quantile(self, q: float) -> float:
        """Return what a share `q` of all does not exceed, in seconds; NaN of nothing.

        Raises ValueError if `q` is not in 0 to 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is in 0 to 1, not {q}")
        if not self.count:
            return math.nan
        left = math.ceil(q * self.count) or 1
        found = 0
        for found in sorted(self._buckets):
            left -= self._buckets[found]
            if left <= 0:
                break
        ns = _middle(found) if found >= 0 else -_middle(-found)
        return min(max(ns, self._least_ns), self._greatest_ns) / 1e9


def _bucket(ns: int) -> int:
    """Return the number of the bucket of a duration: exact below 64 ns."""
    shift = max(0, ns.bit_length() - PRECISION_BITS - 1)
    return (shift << PRECISION_BITS) + (ns >> shift)


def _middle(bucket: int) -> int:
    """Return the duration in the middle of a bucket."""
    shift = max(0, (bucket >> PRECISION_BITS) - 1)
    least = (bucket - (shift << PRECISION_BITS)) << shift
    return least + (1 << shift >> 1)


class Latency:
    """How long the quotes of one followed stream were on their way.

    Empty on streams of anything else. A leg is empty where one of its ends is not
    told: a snapshot and history have no stamps, and a feed need not say its time.
    """

    def __init__(self) -> None:
        self._legs = {leg: Histogram() for leg in LEGS}
        self._export = _exporter()

    def __getitem__(self, leg: str) -> Histogram:
        """Return the histogram of one of LEGS."""
        return self._legs[leg]

    def quantile(self, q: float, leg: str = "total") -> float:
        """Return what a share `q` of a leg does not exceed, in seconds."""
        return self._legs[leg].quantile(q)

    def record(
        self,
        response: pb.StreamQuotesResponse | pb.SubscribeQuotesResponse,
        received_ns: int,
    ) -> None:
        """Count a response that has stamps, received at a time since 1970."""
        stamps = response.stamps
        made_ns = _ns(response.quotes[-1].time)
        accepted_ns = _ns(stamps.accept_time)
        sent_ns = _ns(stamps.send_time)
        ns = {
            "serve": sent_ns - accepted_ns,
            "deliver": received_ns - sent_ns,
            "total": received_ns - made_ns,
        }
        if stamps.HasField("publish_time"):
            published_ns = _ns(stamps.publish_time)
            ns["feed"] = published_ns - made_ns
            ns["publish"] = accepted_ns - published_ns
        for leg in ns:
            self._legs[leg].record(ns[leg])
        if self._export:
            self._export(ns)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return counts, and quantiles in seconds, of each leg that has any."""
        return {
            leg: {
                "count": found.count,
                "negative": found.negative,
                "min_s": found.min_s,
                **{f"{name}_s": found.quantile(q) for name, q in QUANTILES.items()},
                "max_s": found.max_s,
            }
            for leg, found in self._legs.items()
            if found.count
        }

    def __str__(self) -> str:
        """Return a table of 80 columns in milliseconds, a line for each leg."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        names = ("min", *QUANTILES, "max", "count", "negative")
        yield _line("ms", names)
        for leg, found in self._legs.items():
            quantiles = [found.quantile(q) for q in QUANTILES.values()]
            values = [_ms(s) for s in (found.min_s, *quantiles, found.max_s)]
            yield _line(leg, [*values, str(found.count), str(found.negative)])


def _ns(time: Timestamp) -> int:
    return time.seconds * 1_000_000_000 + time.nanos


def _line(label: str, cells: Iterable[str]) -> str:
    return f"{label:<8}" + "".join(f"{cell:>9}" for cell in cells)


def _ms(seconds: float) -> str:
    """Return eight characters at most: 0.123, 12345, or 3.6e+06; a dash for NaN."""
    ms = 1_000 * seconds
    if math.isnan(ms):
        return "-"
    if abs(ms) < 1_000:
        return f"{ms:.3f}"
    return f"{ms:.0f}" if abs(ms) < 1_000_000 else f"{ms:.2g}"


def _exporter() -> Any:
    """Return what gives durations to OpenTelemetry, if this process uses its metrics.

    Whoever has set a provider of meters has imported them; nobody else pays.
    """
    metrics = sys.modules.get(OTEL)
    return _export_to(metrics) if metrics else None


@cache
def _export_to(metrics: Any) -> Any:
    meter = metrics.get_meter("quantplane")
    try:
        latency = meter.create_histogram(
            "quantplane.quotes.latency",
            unit="s",
            description="How long quotes are on their way, by leg",
            explicit_bucket_boundaries_advisory=BOUNDS_S,
        )
    except TypeError:  # versions without buckets to choose have none below 5 s
        return None
    negative = meter.create_counter(
        "quantplane.quotes.latency.negative",
        unit="{response}",
        description="Responses with a leg below 0: clocks that disagree",
    )
    attributes = {leg: {"quantplane.leg": leg} for leg in LEGS}

    def export(legs_ns: Mapping[str, int]) -> None:
        for leg, ns in legs_ns.items():
            if ns >= 0:  # a histogram takes no others
                latency.record(ns / 1e9, attributes[leg])
            else:
                negative.add(1, attributes[leg])

    return export
