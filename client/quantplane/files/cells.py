"""Cells: text turned into values.

Each parser returns None for text that says that there is no value, and raises
ValueError with what is wrong, in words that go on from the field and the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import partial

from quantplane import v1 as pb
from quantplane.files.table import Parse
from quantplane.files.times import EPOCH, SECOND, Clock, check_pattern, nanoseconds

EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)


def time_parser(clock: Clock) -> Callable[[str], dict[str, int] | None]:
    """Return what parses a time into the fields of a Timestamp."""
    earliest = nanoseconds(EARLIEST - EPOCH)
    latest = nanoseconds(datetime.now(UTC) + timedelta(days=1) - EPOCH)

    def parse(text: str) -> dict[str, int] | None:
        text = text.strip()
        if not text:
            return None
        time = clock(text)
        if not earliest <= time <= latest:
            raise ValueError("lies outside 1900-01-01 to one day from now")
        seconds, nanos = divmod(time, SECOND)
        return {"seconds": seconds, "nanos": nanos}

    return parse


def date_parser(date_format: str, option: str) -> Callable[[str], str | None]:
    """Return what parses a date into YYYY-MM-DD; `option` is where the format is from.

    A time of day is left out.
    """
    if date_format == "iso":
        return partial(_date, lambda text: datetime.fromisoformat(text).date(), option)
    check_pattern(date_format, option, "iso")
    return partial(
        _date,
        lambda text: datetime.strptime(text, date_format).date(),  # noqa: DTZ007
        option,
    )


def _date(read: Callable[[str], date], option: str, text: str) -> str | None:
    text = text.strip()
    if not text:
        return None
    try:
        return read(text).isoformat()
    except ValueError:
        raise ValueError(f"is not such a date: see {option}") from None


def price(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        if text.isspace():
            return None
        raise ValueError("is not a number") from None
    if math.isfinite(value):
        return value
    if math.isnan(value):  # says that there is none
        return None
    raise ValueError("is not finite")


def positive(text: str) -> float | None:
    value = price(text)
    if value is not None and value <= 0:
        raise ValueError("is not above 0")
    return value


def not_negative(text: str) -> float | None:
    value = price(text)
    if value is not None and value < 0:
        raise ValueError("lies below 0")
    return value


def units(most: int, text: str) -> int | None:
    try:
        value = int(text)
    except ValueError:
        number = price(text)  # `417.0` is as good as `417`
        if number is None:
            return None
        value = int(number)
        if value != number:
            raise ValueError("is not a whole number") from None
    if not 0 <= value <= most:
        raise ValueError(f"lies outside 0 to {most:,}")
    return value


int32: Parse = partial(units, 2**31 - 1)
int64: Parse = partial(units, 2**63 - 1)


def option_type(text: str) -> pb.OptionType.ValueType | None:
    """Parse call or put, calls or puts, c or p, in any case."""
    text = text.strip()
    if not text:
        return None
    match = re.fullmatch("(c|calls?)|(p|puts?)", text, re.IGNORECASE)
    if not match:
        raise ValueError("is neither call nor put")
    return pb.OPTION_TYPE_CALL if match[1] else pb.OPTION_TYPE_PUT
