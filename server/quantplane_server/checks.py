"""What every slice's checks.py stands on: rules collected, refused all at once."""

import math
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane_server.constraints import RULES
from quantplane_server.errors import InvalidRequest, OutOfOrder, Violation

EARLIEST_S = -2_208_988_800  # 1900-01-01
AHEAD_S = 86_400
MAX_PAGE = 10_000

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST = datetime(1900, 1, 1, tzinfo=UTC)
LAST = datetime(9999, 12, 31, tzinfo=UTC)
TICK = timedelta(microseconds=1)

CANONICAL = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

SYMBOL = "must be 1 to 64 printable characters without leading or trailing space"
TIME = "must lie between 1900-01-01 and one day ahead of the server's clock"
BOUND = "must lie between the years 1900 and 9999"
PRICE = "must be finite"
ID = "must be a UUID, in lower case with hyphens"
MAX_AMOUNT = 1e15  # of what is summed and multiplied, so that results stay finite
AMOUNT = "must be finite and at most 1e15 in magnitude"
COUNT = "must be at least 0"
EMPTY = "must be empty: the server sets it"


class Checks:
    """Collects the violations of one request.

    with Checks() as check:
        check(request.quantity > 0, "quantity", "must be above 0")

    Raises InvalidRequest at the end of the block, with everything that was found.
    """

    def __init__(self, **metadata: object) -> None:
        self._metadata = metadata
        self._violations: list[Violation] = []

    def __call__(self, kept: bool, field: str, rule: str) -> None:
        if not kept:
            self._violations.append((field, rule))

    def __enter__(self) -> "Checks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._violations and kind is None:
            raise InvalidRequest(self._violations, **self._metadata)

    def constraint(self, name: str, kept: bool, at: str = "") -> None:
        """Check what a constraint of the database says; `at` precedes its field."""
        field, rule = RULES[name]
        self(kept, at + field, rule)

    def symbols(self, symbols: Iterable[str], field: str, at_most: int) -> None:
        symbols = list(symbols)
        self(0 < len(symbols) <= at_most, field, f"must be 1 to {at_most:,} symbols")
        for i, symbol in enumerate(symbols[: at_most + 1]):
            self(is_name(symbol), f"{field}[{i}]", SYMBOL)

    def time_range(self, request: Any) -> None:
        """Check start_time and end_time, either of which may be omitted."""
        for field in ("start_time", "end_time"):
            if request.HasField(field):
                self(is_bound(getattr(request, field)), field, BOUND)
        if request.HasField("start_time") and request.HasField("end_time"):
            start, end = request.start_time, request.end_time
            ordered = (start.seconds, start.nanos) <= (end.seconds, end.nanos)
            self(ordered, "end_time", "must not lie before start_time")

    def page_size(self, request: Any, at_most: int = MAX_PAGE) -> None:
        inside = 0 <= request.page_size <= at_most
        self(inside, "page_size", f"must be 0 to {at_most:,}")

    def heartbeat(self, request: Any) -> None:
        if request.HasField("heartbeat_interval"):
            self.duration(request.heartbeat_interval, "heartbeat_interval", 1, 60)

    def duration(
        self, value: Duration, field: str, least_s: float, most_s: float
    ) -> None:
        inside = least_s <= seconds(value) <= most_s
        self(inside, field, f"must be {least_s:g} to {most_s:g} s")


def check_order(batch: int, expected: int) -> None:
    """Refuse a batch that is not the next of its stream. Raises OutOfOrder."""
    if batch != expected:
        raise OutOfOrder(
            f"batch {batch} came where {expected} was due; "
            "number batches 1, 2, 3, ... in each stream",
            expected=expected,
        )


def is_name(text: str) -> bool:
    """Tell whether this can be a symbol, or the name of a feed."""
    return 0 < len(text) <= 64 and text.isprintable() and text == text.strip()


def is_time(stamp: Timestamp) -> bool:
    latest = time.time() + AHEAD_S
    return EARLIEST_S <= stamp.seconds <= latest and 0 <= stamp.nanos < 1_000_000_000


def is_bound(stamp: Timestamp) -> bool:
    """Tell whether this can bound a range of times: any time of the calendar."""
    latest = 253_402_300_800  # the year 10000
    return EARLIEST_S <= stamp.seconds < latest and 0 <= stamp.nanos < 1_000_000_000


def is_price(value: float) -> bool:
    return math.isfinite(value)


def is_id(text: str) -> bool:
    """Tell whether this is a UUID as the server writes it."""
    return CANONICAL.fullmatch(text) is not None


def is_amount(value: float) -> bool:
    return abs(value) <= MAX_AMOUNT


def seconds(value: Duration) -> float:
    return value.seconds + value.nanos / 1e9


def time_us(stamp: Timestamp) -> int:
    """Return microseconds since 1970, what the database keeps of a time."""
    return stamp.seconds * 1_000_000 + stamp.nanos // 1_000


def time_given(request: Any, field: str, default: datetime) -> datetime:
    """Return a time of a checked request, or the default where it is omitted."""
    if not request.HasField(field):
        return default
    return to_datetime(time_us(getattr(request, field)))


def to_datetime(stamp_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=stamp_us)


def to_us(time: datetime) -> int:
    return (time - EPOCH) // TICK
