"""Stamps: when quotes passed the stations of their way from a feed to a reader.

A round is stamped once, when it is put on the bus. The stamp travels with its entry
as the bytes of a response's field, so that all of an entry joined is still a message.
"""

import re
from time import time_ns

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb

UNTRACED_BYTES = 40  # a stamp with a traceparent has more
HEAD = 2  # bytes: the field's number, and how many bytes follow
STAMPS = pb.StreamQuotesResponse.STAMPS_FIELD_NUMBER
SEND_TIME = pb.Stamps.SEND_TIME_FIELD_NUMBER
TRACEPARENT = pb.Stamps.TRACEPARENT_FIELD_NUMBER
SAMPLED = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[13579bdf]")


def stamped(publish_time: Timestamp | None, traceparent: str) -> bytes:
    """Return the stamp of what is put on the bus now."""
    stamps = pb.Stamps(publish_time=publish_time, traceparent=traceparent)
    stamps.accept_time.FromNanoseconds(time_ns())
    return pb.StreamQuotesResponse(stamps=stamps).SerializeToString()


def sampled(traceparent: str) -> str:
    """Return the trace context if its span was sampled, else nothing."""
    return traceparent if SAMPLED.fullmatch(traceparent) else ""


def sent(stamp: bytes, traced: bytes, send_time: Timestamp) -> bytes:
    """Return what a response shows, as its field: a stamp, and the trace of another.

    Put together from bytes, as it is made for every response of every reader.
    """
    shown = stamp[HEAD:] + _field(SEND_TIME, send_time.SerializeToString())
    if traced and traced != stamp:
        shown += _field(TRACEPARENT, traceparent_of(traced).encode())
    return _field(STAMPS, shown)


def traceparent_of(stamp: bytes) -> str:
    return _stamps(stamp).traceparent


def accepted_s(stamp: bytes) -> float:
    """Return when the bus got an entry, in seconds since 1970."""
    return _stamps(stamp).accept_time.ToNanoseconds() / 1e9


def _stamps(stamp: bytes) -> pb.Stamps:
    return pb.StreamQuotesResponse.FromString(stamp).stamps


def _field(number: int, contents: bytes) -> bytes:
    """Return a field of a message; nothing here has more than 127 bytes."""
    return bytes((number << 3 | 2, len(contents))) + contents
