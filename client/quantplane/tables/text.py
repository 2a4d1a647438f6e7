"""Values as text, for people and for programs."""

import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.files.times import EPOCH


def iso(time: Timestamp) -> str:
    """Return the time in UTC with all nanoseconds, as `2020-01-01T22:00:00.0...Z`."""
    second = EPOCH + timedelta(seconds=time.seconds)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{time.nanos:09}Z"


def microseconds(time: Timestamp) -> str:
    """Return a time that has nothing below microseconds."""
    return iso(time).removesuffix("000Z") + "Z"


def milliseconds(time: Timestamp) -> str:
    """Return the time in UTC, cut to milliseconds."""
    return iso(time)[: -len("000000Z")] + "Z"


def brief(time: Timestamp) -> str:
    """Return the time in UTC without the zeros behind its seconds."""
    return iso(time).rstrip("Z").rstrip("0").rstrip(".") + "Z"


def number(value: float) -> str:
    """Return nine significant digits, or more for four behind the point, as needed.

    So the noise of sums is not shown, but every digit of a price.
    """
    if not math.isfinite(value) or 0 < abs(value) < 1e-9:
        return f"{value:.9g}"
    exponent = math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{max(4, 8 - exponent)}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def money(value: float) -> str:
    """Return an amount of quote currency, as `-1,234.50`."""
    text = f"{value:,.2f}"
    return "0.00" if text == "-0.00" else text


def printable(text: str) -> str:
    """Return the text with `\\x1b` and the like for what a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text
    )


def words(kind: Any) -> dict[str, int]:
    """Return how people say the values of an enum: `{"buy": pb.SIDE_BUY, ...}`."""
    prefix = kind.Name(0).removesuffix("UNSPECIFIED")
    return {
        name.removeprefix(prefix).lower().replace("_", "-"): value
        for name, value in kind.items()
        if value
    }


def word(kind: Any, value: int) -> str:
    """Return how people say a value of an enum; its number where it is unknown."""
    said = {number: text for text, number in words(kind).items()}
    return said.get(value, str(value))


def message_json(message: Message) -> str:
    """Return the message with all its fields as a line of protobuf's JSON, in ASCII."""
    return MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=None,
    )


def event_lines(
    event: pb.StreamEvent,
    no_data: str = "nothing was published yet; is the symbol right?",
) -> Iterator[str]:
    """Yield what a person who watches a stream should know of this event.

    `no_data` is said of a key that there is nothing of.
    """
    for key in event.subscribed.keys:
        if key.state == pb.KEY_STATE_NO_DATA:
            yield f"{key.key}: {no_data}"
    if event.HasField("gap"):
        cause = pb.GapCause.Name(event.gap.cause).removeprefix("GAP_CAUSE_").lower()
        start = iso(event.gap.start_time) if event.gap.HasField("start_time") else "?"
        yield f"gap from {start} to {iso(event.gap.end_time)}: {cause}"
