"""The rules of the signals' requests, as their proto comments state them."""

from collections.abc import Sequence

from quantplane import v1 as pb
from quantplane_server.checks import (
    AMOUNT,
    EMPTY,
    ID,
    SYMBOL,
    TIME,
    Checks,
    is_amount,
    is_bound,
    is_id,
    is_name,
    is_time,
    time_us,
)
from quantplane_server.constraints import FRACTION, ONCE, RULES
from quantplane_server.structs import is_json, rule

MAX_BATCH = 1_000
MAX_NAMES = 1_000
MAX_METADATA_BYTES = 16 << 10  # as JSON

EXPIRATION = "must lie after time, and before the year 10000"
METADATA = rule(MAX_METADATA_BYTES)
AT_MOST = f"must be at most {MAX_NAMES:,}"

TYPES = set(pb.SignalType.values()) - {pb.SIGNAL_TYPE_UNSPECIFIED}
STATUSES = set(pb.SignalStatus.values()) - {pb.SIGNAL_STATUS_UNSPECIFIED}


def check_publish(signals: Sequence[pb.Signal]) -> None:
    with Checks() as check:
        some = 0 < len(signals) <= MAX_BATCH
        check(some, "signals", f"must be 1 to {MAX_BATCH:,} signals")
        seen = set()
        for i, signal in enumerate(signals[: MAX_BATCH + 1]):
            at = f"signals[{i}]."
            check(is_id(signal.signal_id), at + "signal_id", ID)
            check(signal.signal_id not in seen, at + "signal_id", ONCE)
            seen.add(signal.signal_id)
            _check_signal(check, signal, at)


def _check_signal(check: Checks, signal: pb.Signal, at: str) -> None:
    check(signal.HasField("time") and is_time(signal.time), at + "time", TIME)
    check(is_name(signal.strategy_id), at + "strategy_id", SYMBOL)
    check(is_name(signal.symbol), at + "symbol", SYMBOL)
    check.constraint("valid_signal_type", signal.signal_type in TYPES, at)
    check.constraint("valid_strength", is_fraction(signal.strength), at)
    check.constraint("valid_confidence", is_fraction(signal.confidence), at)
    check(is_amount(signal.target_price), at + "target_price", AMOUNT)
    check(is_amount(signal.stop_loss), at + "stop_loss", AMOUNT)
    if signal.HasField("expiration"):
        later = time_us(signal.expiration) > time_us(signal.time)
        after = later and is_bound(signal.expiration)
        check(after, at + "expiration", EXPIRATION)
    if signal.HasField("metadata"):
        kept = is_json(signal.metadata, MAX_METADATA_BYTES)
        check(kept, at + "metadata", METADATA)
    check(not signal.status, at + "status", EMPTY)
    check(not signal.trace_id, at + "trace_id", EMPTY)


def check_id(request: pb.GetSignalRequest | pb.CancelSignalRequest) -> None:
    with Checks() as check:
        check(is_id(request.signal_id), "signal_id", ID)


def check_list(request: pb.ListSignalsRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        check(len(request.statuses) <= MAX_NAMES, "statuses", AT_MOST)
        for i, status in enumerate(request.statuses[:MAX_NAMES]):
            _, rule = RULES["valid_signal_status"]
            check(status in STATUSES, f"statuses[{i}]", rule)
        check.time_range(request)
        check.page_size(request)


def check_watch(request: pb.WatchSignalsRequest) -> None:
    with Checks() as check:
        _check_filter(check, request.filter)
        check.heartbeat(request)


def _check_filter(check: Checks, wanted: pb.SignalFilter) -> None:
    for field in ("strategy_ids", "symbols"):
        names = getattr(wanted, field)
        check(len(names) <= MAX_NAMES, f"filter.{field}", AT_MOST)
        for i, name in enumerate(names[:MAX_NAMES]):
            check(is_name(name), f"filter.{field}[{i}]", SYMBOL)
    types = wanted.signal_types
    check(len(types) <= MAX_NAMES, "filter.signal_types", AT_MOST)
    for i, type in enumerate(types[:MAX_NAMES]):
        _, rule = RULES["valid_signal_type"]
        check(type in TYPES, f"filter.signal_types[{i}]", rule)
    check(is_fraction(wanted.min_strength), "filter.min_strength", FRACTION)


def is_fraction(value: float) -> bool:
    return 0 <= value <= 1
