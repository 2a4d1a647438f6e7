"""The rules of the options' requests, as their proto comments state them."""

from datetime import date
from math import isfinite
from typing import Any

from quantplane import v1 as pb
from quantplane_server.checks import (
    COUNT,
    PRICE,
    SYMBOL,
    TIME,
    Checks,
    is_name,
    is_price,
    is_time,
    time_us,
    to_datetime,
)
from quantplane_server.constraints import NOT_NEGATIVE, ONCE, POSITIVE

MAX_CONTRACTS = 20_000  # of a chain
MAX_UNDERLYINGS = 100
TYPES = (pb.OPTION_TYPE_CALL, pb.OPTION_TYPE_PUT)

DATE = "must be a date, YYYY-MM-DD"
LEAST = "must not be below its minimum"


def check_publish(request: pb.PublishOptionChainRequest) -> None:
    chain = request.chain
    contracts = chain.contracts[: MAX_CONTRACTS + 1]
    with Checks(batch=request.batch) as check:
        timed = chain.HasField("time") and is_time(chain.time)
        check(is_name(chain.underlying), "chain.underlying", SYMBOL)
        check(timed, "chain.time", TIME)
        check(
            0 < len(contracts) <= MAX_CONTRACTS,
            "chain.contracts",
            f"must be 1 to {MAX_CONTRACTS:,} contracts",
        )
        day = to_datetime(time_us(chain.time)).date() if timed else date.min
        current = _current({quote.expiration for quote in contracts}, day)
        seen: set[tuple[str, float, int]] = set()
        for i, quote in enumerate(contracts):
            at = f"chain.contracts[{i}]"
            if not _is_plain(quote, current):
                _check_contract(check, quote, f"{at}.", current)
            key = (quote.expiration, quote.strike, quote.option_type)
            check(key not in seen, at, ONCE)
            seen.add(key)


def _current(expirations: set[str], day: date) -> set[str]:
    """Return those that are dates, and not before a day."""
    dates = {text: to_date(text) for text in expirations}
    return {text for text, found in dates.items() if found and found >= day}


def _is_plain(quote: pb.OptionQuote, current: set[str]) -> bool:
    """Tell whether a contract is certainly valid, as nearly all are, at little cost."""
    return (
        quote.expiration in current
        and quote.strike > 0
        and quote.option_type in TYPES
        and quote.volume >= 0
        and quote.open_interest >= 0
        and quote.implied_vol >= 0
        and isfinite(
            quote.strike + quote.bid + quote.ask + quote.last_price
            + quote.implied_vol + quote.delta + quote.gamma + quote.theta
            + quote.vega + quote.rho
        )
    )  # fmt: skip


def _check_contract(
    check: Checks, quote: pb.OptionQuote, at: str, current: set[str]
) -> None:
    strike, vol = quote.strike, quote.implied_vol
    check.constraint("valid_expiration", quote.expiration in current, at)
    check.constraint("valid_strike", strike > 0 and isfinite(strike), at)
    check.constraint("valid_option_type", quote.option_type in TYPES, at)
    check(vol >= 0 and isfinite(vol), at + "implied_vol", NOT_NEGATIVE)
    for field in ("volume", "open_interest"):
        check(getattr(quote, field) >= 0, at + field, COUNT)
    for field in ("bid", "ask", "last_price", "delta", "gamma", "theta", "vega", "rho"):
        check(is_price(getattr(quote, field)), at + field, PRICE)


def check_get(request: pb.GetOptionChainRequest) -> None:
    with Checks() as check:
        _check_as_of(check, request)
        _check_filter(check, request.filter)


def check_expirations(request: pb.ListExpirationsRequest) -> None:
    with Checks() as check:
        _check_as_of(check, request)


def check_subscription(request: pb.SubscribeOptionChainRequest) -> None:
    with Checks() as check:
        check.symbols(request.underlyings, "underlyings", MAX_UNDERLYINGS)
        _check_filter(check, request.filter)
        check.heartbeat(request)


def _check_as_of(
    check: Checks, request: pb.GetOptionChainRequest | pb.ListExpirationsRequest
) -> None:
    check(is_name(request.underlying), "underlying", SYMBOL)
    if request.HasField("as_of"):
        check(is_time(request.as_of), "as_of", TIME)


def _check_filter(check: Checks, wanted: pb.OptionFilter) -> None:
    dates = [wanted.min_expiration, wanted.max_expiration]
    for name, text in zip(("min", "max"), dates, strict=True):
        valid = not text or to_date(text) is not None
        check(valid, f"filter.{name}_expiration", DATE)
    check(not all(dates) or dates[0] <= dates[1], "filter.max_expiration", LEAST)
    known = wanted.option_type in pb.OptionType.values()
    check(known, "filter.option_type", "must be CALL or PUT")
    _check_bounds(check, wanted, "filter.", "min_strike", "max_strike")
    _check_bounds(check, wanted, "filter.", "min_delta", "max_delta")
    if wanted.HasField("moneyness"):
        price = wanted.moneyness.underlying_price
        positive = price > 0 and isfinite(price)
        check(positive, "filter.moneyness.underlying_price", POSITIVE)
        _check_bounds(check, wanted.moneyness, "filter.moneyness.", "min", "max")


def _check_bounds(check: Checks, message: Any, at: str, low: str, high: str) -> None:
    for field in (low, high):
        check(is_price(getattr(message, field)), at + field, PRICE)
    if message.HasField(low) and message.HasField(high):
        below = getattr(message, high) < getattr(message, low)
        check(not below, at + high, LEAST)


def to_date(text: str) -> date | None:
    """Return the date that YYYY-MM-DD says, or None."""
    try:
        found = date.fromisoformat(text)
    except ValueError:
        return None
    return found if found.isoformat() == text else None  # there are other ISO forms
