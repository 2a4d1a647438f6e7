import json
import math
import pickle
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from quantplane import sync
from quantplane import v1 as pb
from quantplane.latency import LEGS, Histogram, Latency, _ms
from tests.client import serving
from tests.client.test_follow import SUBSCRIBE, numbered, plays, quote

durations = st.integers(-(2**70), 2**70) | st.integers(-(10**7), 10**7)
HOUR_NS = 3_600 * 10**9


def at(ns):
    stamp = Timestamp()
    stamp.FromNanoseconds(ns)
    return stamp


def stamped(made_ns, publish_ns, accept_ns, send_ns):
    """Return a response of a quote with these times; None: not told."""
    publish_time = None if publish_ns is None else at(publish_ns)
    return pb.SubscribeQuotesResponse(
        quotes=[pb.Quote(symbol="ES", time=at(made_ns), last=1)],
        stamps=pb.Stamps(
            publish_time=publish_time, accept_time=at(accept_ns), send_time=at(send_ns)
        ),
    )


def recorded(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


def counts(latency):
    return {leg: latency[leg].count for leg in LEGS}


# Histograms.


@given(st.lists(durations, min_size=1), st.floats(0, 1))
def test_a_quantile_is_right_to_a_64th(values, q):
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1] / 1e9
    found = recorded(values).quantile(q)
    assert abs(found - exact) <= abs(exact) / 64


@given(st.lists(durations, min_size=1))
def test_the_least_the_greatest_and_the_counts_are_exact(values):
    histogram = recorded(values)
    assert histogram.min_s == min(values) / 1e9
    assert histogram.max_s == max(values) / 1e9
    assert histogram.count == len(values)
    assert histogram.negative == sum(value < 0 for value in values)


def test_a_histogram_of_anything_stays_small():
    sizes = (random.choice((-1, 1)) * 2 ** random.uniform(0, 70) for _ in range(10**5))
    assert len(pickle.dumps(recorded(map(int, sizes)))) < 50_000


def test_a_histogram_of_nothing_has_no_values():
    histogram = Histogram()
    found = (histogram.min_s, histogram.quantile(0.5), histogram.max_s)
    assert all(map(math.isnan, found))


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_what_is_no_share_is_refused(q):
    with pytest.raises(ValueError, match="0 to 1"):
        recorded([1]).quantile(q)


# Legs.


@given(st.lists(st.integers(0, 10**12), min_size=5, max_size=5))
def test_each_leg_is_between_two_stations_and_the_total_is_their_sum(times):
    latency = Latency()
    made, *others, received = times
    latency.record(stamped(made, *others), received)
    ends = dict(zip(LEGS[:4], pairwise(times), strict=True))
    for leg, (first, last) in ends.items():
        assert latency[leg].max_s == (last - first) / 1e9
    assert latency["total"].max_s == (received - made) / 1e9


def test_a_feed_that_tells_no_time_leaves_its_two_legs_empty():
    latency = Latency()
    latency.record(stamped(1, None, 3, 4), 5)
    assert counts(latency) == {
        "feed": 0, "publish": 0, "serve": 1, "deliver": 1, "total": 1
    }  # fmt: skip


def test_as_a_dictionary_it_is_json_of_the_legs_that_were_met():
    latency = Latency()
    latency.record(stamped(0, None, 20_000_000, 25_000_000), 40_000_000)
    told = json.loads(json.dumps(latency.to_dict()))
    assert list(told) == ["serve", "deliver", "total"]
    assert told["serve"] == {
        "count": 1, "negative": 0, "min_s": 0.005, "p50_s": 0.005, "p90_s": 0.005,
        "p99_s": 0.005, "p99.9_s": 0.005, "max_s": 0.005,
    }  # fmt: skip


def test_as_text_it_is_a_table_in_milliseconds():
    latency = Latency()
    latency.record(stamped(0, None, HOUR_NS, HOUR_NS + 1_500_000), HOUR_NS + 1_000_000)
    head, feed, _, serve, deliver, total = map(str.split, str(latency).splitlines())
    assert head == [
        "ms", "min", "p50", "p90", "p99", "p99.9", "max", "count", "negative"
    ]  # fmt: skip
    assert feed == ["feed", *6 * ["-"], "0", "0"]
    assert serve == ["serve", *6 * ["1.500"], "1", "0"]
    assert deliver == ["deliver", *6 * ["-0.500"], "1", "1"]
    assert total == ["total", *6 * ["3.6e+06"], "1", "0"]
    assert {len(line) for line in str(latency).splitlines()} == {80}


@given(st.floats(-1e12, 1e12) | st.just(math.nan))
def test_no_cell_of_the_table_is_wider_than_its_column(seconds):
    assert len(_ms(seconds)) <= 8


# Followed streams.


@pytest.mark.parametrize("method", ["SubscribeQuotes", "StreamQuotes"])
async def test_a_followed_stream_tells_how_long_its_quotes_took(method):
    now = time.time_ns()
    response = stamped(now - 9_000, now - 5_000, now - 3_000, now - 2_000)
    request = SUBSCRIBE
    if method == "StreamQuotes":
        response = numbered(1, response)
        request = pb.StreamQuotesRequest(symbols=["ES"])
    async with serving(plays(response, response)) as (client, _):
        follower = client.follow(getattr(client.market_data, method), request)
        await anext(follower)
        await anext(follower)
    assert counts(follower.latency) == dict.fromkeys(LEGS, 2)
    legs = [follower.latency[leg].max_s * 1e9 for leg in ("feed", "publish", "serve")]
    assert legs == pytest.approx([4_000, 2_000, 1_000])
    assert follower.latency["deliver"].min_s * 1e9 >= 2_000
    assert follower.latency.quantile(0.5) * 1e9 >= 9_000


async def test_clocks_that_disagree_are_counted_and_not_hidden():
    ahead = time.time_ns() + HOUR_NS
    async with serving(plays(stamped(0, ahead, ahead, ahead))) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
    assert follower.latency["deliver"].negative == 1
    assert -3_600 <= follower.latency.quantile(0.5, "deliver") < -3_500


async def test_what_has_no_stamps_is_not_counted():
    unstamped, empty = quote(1), pb.SubscribeQuotesResponse(stamps=pb.Stamps())
    async with serving(plays(unstamped, empty, quote(2))) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        for _ in range(3):
            await anext(follower)
    assert counts(follower.latency) == dict.fromkeys(LEGS, 0)


async def test_the_latency_goes_on_over_reconnects():
    response = stamped(1, 2, 3, 4)

    async def cut():
        pass

    async with serving(plays(response, then=cut), plays(response)) as (client, _):
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        await anext(follower)
        await anext(follower)
    assert (follower.reconnects, follower.latency["total"].count) == (1, 2)


def test_without_asyncio_it_is_the_same(tmp_path):
    with sync.Client("127.0.0.1:1") as client:
        follower = client.follow(client.market_data.SubscribeQuotes, SUBSCRIBE)
        assert counts(follower.latency) == dict.fromkeys(LEGS, 0)


# OpenTelemetry. A process has one provider, so each case is a process.

EXPORTED = """
from tests.client.test_latency import Latency, stamped

Latency()  # a stream from before there was a provider
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
for _ in range(2):  # two streams of one process are one metric
    Latency().record(stamped(0, 4_000_000, 3_000_000, 3_500_000), 5_000_000)
print(reader.get_metrics_data().to_json(indent=None))
"""

UNUSED = """
import sys
from quantplane.latency import OTEL, Latency

Latency()
print(OTEL in sys.modules)
"""


def run(program):
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout


def test_a_process_with_a_provider_of_meters_exports_it():
    (resource,) = json.loads(run(EXPORTED))["resource_metrics"]
    (scope,) = resource["scope_metrics"]
    metrics = {each["name"]: each for each in scope["metrics"]}
    latency = metrics["quantplane.quotes.latency"]
    points = {
        point["attributes"]["quantplane.leg"]: (point["count"], point["sum"])
        for point in latency["data"]["data_points"]
    }
    assert latency["unit"] == "s"
    assert points == {
        "feed": (2, 0.008), "serve": (2, 0.001), "deliver": (2, 0.003),
        "total": (2, 0.01),
    }  # fmt: skip
    (point,) = metrics["quantplane.quotes.latency.negative"]["data"]["data_points"]
    assert (point["attributes"], point["value"]) == ({"quantplane.leg": "publish"}, 2)


def test_a_process_that_has_none_does_not_import_it():
    assert run(UNUSED) == "False\n"
