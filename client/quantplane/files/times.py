"""Times as files write them, in nanoseconds since 1970 UTC."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import cast
from zoneinfo import ZoneInfo

from quantplane.files.report import FileProblem

SECOND = 1_000_000_000  # nanoseconds
UNITS = {"s": SECOND, "ms": 1_000_000, "us": 1_000, "ns": 1}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Clock = Callable[[str], int]
# Turns a moment, with a zone or on the wall clock of the file's zone, into
# nanoseconds since 1970 UTC.
Zone = Callable[[datetime], int]

_OFFSET = re.compile(r"(?:UTC|GMT)?([+-])(\d{1,2})(?::?(\d\d))?", re.IGNORECASE)
_BELOW_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")
# The directives of strptime that have one width, and the texts they surely match.
_FIXED_WIDTH = {
    "Y": "([0-9]{4})",
    "m": "(0[1-9]|1[0-2])",
    "d": "(0[1-9]|[12][0-9]|3[01])",
    "H": "([01][0-9]|2[0-3])",
    "M": "([0-5][0-9])",
    "S": "([0-5][0-9])",
    "f": "([0-9]{1,9})",
}


def parse_time(text: str, time_format: str = "iso", tz: str = "UTC") -> int:
    """Return nanoseconds since 1970, as the readers do; ValueError if it is no time."""
    return clock_of(time_format, zone_of(tz))(text)


def nanoseconds(since: timedelta) -> int:
    seconds = since.days * 86_400 + since.seconds
    return seconds * SECOND + since.microseconds * 1_000


def zone_of(name: str) -> Zone:
    if match := _OFFSET.fullmatch(name):
        sign, hours, minutes = match.groups()
        offset = timedelta(hours=int(hours), minutes=int(minutes or 0))
        if offset < timedelta(days=1):
            return _fixed_zone(-offset if sign == "-" else offset)
    if name.upper() in ("UTC", "GMT", "Z"):
        return _fixed_zone(timedelta())
    try:
        return _named_zone(ZoneInfo(name))
    except (OSError, ValueError, KeyError):  # ZoneInfo raises all of them
        raise FileProblem(
            f"--tz {name!r} is no zone; use a name like America/New_York "
            "or an offset like -05:00"
        ) from None


def _fixed_zone(offset: timedelta) -> Zone:
    start = EPOCH.replace(tzinfo=None) + offset

    def convert(moment: datetime) -> int:
        return nanoseconds(moment - (EPOCH if moment.tzinfo else start))

    return convert


def _named_zone(zone: ZoneInfo) -> Zone:
    def convert(moment: datetime) -> int:
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=zone)
            before = cast(timedelta, moment.utcoffset())
            after = cast(timedelta, moment.replace(fold=1).utcoffset())
            # To guess would store the rows of one hour over those of another.
            if before != after:
                times = "never" if before < after else "twice"
                raise ValueError(f"comes {times} in {zone}: its clocks change there")
        return nanoseconds(moment - EPOCH)

    return convert


def clock_of(time_format: str, zone: Zone) -> Clock:
    if time_format == "iso":
        return _iso_clock(zone)
    if time_format in UNITS:
        return partial(count, UNITS[time_format])
    return _pattern_clock(time_format, zone)


def _iso_clock(zone: Zone) -> Clock:
    def read(text: str) -> int:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError("is not an ISO time: see --time-format") from None
        # Up to `20200101T220000.065000` there is nothing below microseconds.
        return zone(moment) + (_below_microseconds(text) if len(text) > 22 else 0)

    return read


def _below_microseconds(text: str) -> int:
    """Return the nanoseconds that fromisoformat leaves out."""
    if "." not in text and "," not in text:
        return 0
    match = _BELOW_MICROSECONDS.search(text)
    return int(match[1].ljust(3, "0")) if match else 0


def count(unit: int, text: str) -> int:
    try:
        return int(text) * unit
    except ValueError:
        # A float would not hold `1577916000.065` seconds to the nanosecond.
        try:
            return int(Decimal(text) * unit)
        except (ValueError, ArithmeticError):
            raise ValueError("is not a number") from None


def wall_count(zone: Zone, unit: int, text: str) -> int:
    """Return the time whose wall clock in `zone` counts so many units since 1970."""
    seconds, rest = divmod(int(text) * unit, SECOND)
    try:
        moment = EPOCH.replace(tzinfo=None) + timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError("lies outside all calendars") from None
    return zone(moment) + rest


def _pattern_clock(pattern: str, zone: Zone) -> Clock:
    check_pattern(pattern, "--time-format", "iso, s, ms, us or ns")
    fast = _fixed_width_clock(pattern, zone)

    def read(text: str) -> int:
        time = fast(text)
        if time is not None:
            return time
        try:
            moment = datetime.strptime(text, pattern)  # noqa: DTZ007 - `zone` adds it
        except ValueError:
            raise ValueError(f"does not match {pattern!r}") from None
        return zone(moment)

    return read


def check_pattern(pattern: str, option: str, words: str) -> None:
    """Raise FileProblem unless this pattern of `option` gives days.

    `words` are what may stand in place of a pattern.
    """
    if not re.search("%[YyGcx]", pattern):
        raise FileProblem(
            f"{option} {pattern!r} is neither {words}, "
            "nor a pattern of strptime with a year"
        )
    try:
        datetime.strptime("", pattern)  # noqa: DTZ007 - only the pattern counts
    except re.error:
        raise FileProblem(f"{option} {pattern!r} repeats a directive") from None
    except ValueError as error:
        if "does not match" not in str(error):
            raise FileProblem(f"{option} {pattern!r}: {error}") from None


def _fixed_width_clock(pattern: str, zone: Zone) -> Callable[[str], int | None]:
    """Return a fast clock for the texts that surely mean what strptime says.

    It returns None for all others.
    """
    letters = re.findall("%(.)", pattern)
    if (
        not {"Y", "m", "d"} <= set(letters) <= set(_FIXED_WIDTH)
        or len(set(letters)) < len(letters)
        or re.search("%f[%0-9]", pattern)  # where the fraction ends is not sure
    ):
        return lambda text: None
    match = _expression(pattern).fullmatch
    iso = _iso_template(letters)
    fraction = letters.index("f") + 1 if "f" in letters else 0

    def read(text: str) -> int | None:
        found = match(text)
        if not found:
            return None
        try:
            moment = datetime.fromisoformat(iso(*found.groups()))
        except ValueError:
            return None
        time = zone(moment)
        if fraction and len(digits := found[fraction]) > 6:
            time += int(digits[6:].ljust(3, "0"))
        return time

    return read


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split("%(.)", pattern)
    parts[::2] = [re.escape(literal) for literal in parts[::2]]
    parts[1::2] = [_FIXED_WIDTH[letter] for letter in parts[1::2]]
    return re.compile("".join(parts))


def _iso_template(letters: list[str]) -> Callable[..., str]:
    """Return what puts the values of the directives in the order of an ISO time."""
    year, month, day, hour, minute, second = (
        f"{{{letters.index(letter)}}}" if letter in letters else "00"
        for letter in "YmdHMS"
    )
    fraction = f".{{{letters.index('f')}}}" if "f" in letters else ""
    return f"{year}-{month}-{day}T{hour}:{minute}:{second}{fraction}".format
