import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane_server.fanout import framed
from quantplane_server.market_data.checks import FIRST_S, LAST_S
from quantplane_server.stamps import (
    UNTRACED_BYTES,
    accepted_s,
    sampled,
    sent,
    stamped,
    traceparent_of,
)

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
times = st.builds(
    Timestamp, seconds=st.integers(FIRST_S, LAST_S), nanos=st.integers(0, 999_999_999)
)


@given(st.none() | times)
def test_only_a_stamp_with_a_trace_is_long(time: Timestamp | None):
    assert len(stamped(time, "")) <= UNTRACED_BYTES < len(stamped(time, TRACE))


@given(times, st.lists(st.builds(pb.Quote, symbol=st.text(), bid=st.floats(0))))
def test_a_stamp_among_records_leaves_them_a_message_of_the_same_quotes(
    time: Timestamp, quotes: list[pb.Quote]
):
    records = [framed(quote.SerializeToString()) for quote in quotes]
    message = b"".join([stamped(time, TRACE), *records])
    assert list(pb.StreamQuotesResponse.FromString(message).quotes) == quotes


def shown(stamp: bytes, traced: bytes, send_time: Timestamp) -> pb.Stamps:
    field = sent(stamp, traced, send_time)
    return pb.StreamQuotesResponse.FromString(field).stamps


@given(st.none() | times, times, st.booleans())
def test_a_response_shows_the_times_and_the_trace_of_its_stamp(
    published: Timestamp | None, send_time: Timestamp, traced: bool
):
    stamp = stamped(published, TRACE if traced else "")
    assert shown(stamp, stamp if traced else b"", send_time) == pb.Stamps(
        publish_time=published,
        accept_time=shown(stamp, b"", send_time).accept_time,
        send_time=send_time,
        traceparent=TRACE if traced else "",
    )


@given(times, times)
def test_a_response_shows_the_trace_of_an_older_stamp_with_the_times_of_the_newest(
    published: Timestamp, send_time: Timestamp
):
    newest, older = stamped(published, ""), stamped(None, TRACE)
    found = shown(newest, older, send_time)
    assert (found.publish_time, found.traceparent) == (published, TRACE)
    assert found.send_time == send_time


def test_the_bus_gets_a_round_after_it_was_published():
    began = Timestamp()
    began.GetCurrentTime()
    accepted = shown(stamped(began, ""), b"", began).accept_time
    assert accepted.ToNanoseconds() >= began.ToNanoseconds()


def test_a_stamp_tells_its_trace_and_when_the_bus_got_it():
    stamp = stamped(None, TRACE)
    assert traceparent_of(stamp) == TRACE
    accepted = shown(stamp, b"", Timestamp()).accept_time
    assert accepted_s(stamp) == accepted.ToNanoseconds() / 1e9


def test_a_sampled_trace_is_taken():
    assert sampled(TRACE) == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        TRACE[:-1] + "0",  # not sampled
        "01" + TRACE[2:],
        TRACE.upper(),
        TRACE + "-extra",
        TRACE + "\n",
        TRACE.replace("0af7651916cd43dd8448eb211c80319c", 32 * "0"),
        TRACE.replace("b7ad6b7169203331", 16 * "0"),
        10_000 * "0",
    ],
)
def test_any_other_trace_is_none(traceparent: str):
    assert sampled(traceparent) == ""
