"""The rules of market data's requests, as their proto comments state them."""

from collections.abc import Sequence
from math import isfinite
from time import time

from quantplane import v1 as pb
from quantplane_server.checks import (
    AHEAD_S,
    BOUND,
    COUNT,
    PRICE,
    SYMBOL,
    TIME,
    Checks,
    is_bound,
    is_name,
    is_price,
    is_time,
)

MAX_BATCH = 2_000
MAX_SYMBOLS = 10_000
MAX_STREAM_BARS_SYMBOLS = 1_000
WEEK_S = 7 * 86_400
FIRST_S, LAST_S = -62_135_596_800, 253_402_300_799  # of any Timestamp


def check_feed(request: pb.PublishQuotesRequest) -> None:
    with Checks() as check:
        check(
            is_name(request.feed),
            "feed",
            "the first message must name the feed, in 1 to 64 printable characters "
            "without leading or trailing space",
        )
        check(not request.quotes, "quotes", "the first message must not carry quotes")


def check_quotes(quotes: Sequence[pb.Quote], batch: int) -> None:
    """Check a batch of quotes; this is the hot path, so rules are tried in bulk."""
    latest = time() + AHEAD_S
    if 0 < len(quotes) <= MAX_BATCH and all(_is_plain(q, latest) for q in quotes):
        return
    with Checks(batch=batch) as check:
        check(
            0 < len(quotes) <= MAX_BATCH, "quotes", f"must be 1 to {MAX_BATCH:,} quotes"
        )
        for i, quote in enumerate(quotes[: MAX_BATCH + 1]):
            _check_quote(check, quote, f"quotes[{i}]")


def check_publish_time(request: pb.PublishQuotesRequest) -> None:
    """Check that it is a time at all: the rule for times is not for wrong clocks."""
    told = request.publish_time
    known = 0 <= told.nanos < 1_000_000_000 and FIRST_S <= told.seconds <= LAST_S
    if not known:
        with Checks(batch=request.batch) as check:
            check(known, "publish_time", "must be a valid time")


def _is_plain(quote: pb.Quote, latest: float) -> bool:
    """Tell whether a quote is certainly valid, as nearly all are, at little cost."""
    bid, ask = quote.bid, quote.ask
    stamp = quote.time
    return (
        0 < stamp.seconds <= latest
        and 0 <= stamp.nanos < 1_000_000_000
        and (bid != 0 or ask != 0)
        and isfinite(bid + ask + quote.last)
        and quote.bid_size >= 0
        and quote.ask_size >= 0
        and quote.volume >= 0
        and is_known(quote.symbol)
    )


def _check_quote(check: Checks, quote: pb.Quote, at: str) -> None:
    check(is_name(quote.symbol), f"{at}.symbol", SYMBOL)
    check(quote.HasField("time") and is_time(quote.time), f"{at}.time", TIME)
    for field in ("bid", "ask", "last"):
        check(is_price(getattr(quote, field)), f"{at}.{field}", PRICE)
    for field in ("bid_size", "ask_size", "volume"):
        check(getattr(quote, field) >= 0, f"{at}.{field}", COUNT)
    present = any(quote.HasField(field) for field in ("bid", "ask", "last"))
    check(present, at, "must have at least one of bid, ask and last")


_known: set[str] = set()  # symbols that were checked before


def is_known(symbol: str) -> bool:
    if symbol in _known:
        return True
    if not is_name(symbol):
        return False
    if len(_known) >= 100_000:
        _known.clear()
    _known.add(symbol)
    return True


def check_subscription(
    request: pb.SubscribeQuotesRequest | pb.StreamQuotesRequest,
) -> None:
    with Checks() as check:
        check.symbols(request.symbols, "symbols", MAX_SYMBOLS)
        known = request.delivery in pb.Delivery.values()
        check(known, "delivery", "must be LATEST or LOSSLESS")
        if request.HasField("min_interval"):
            check.duration(request.min_interval, "min_interval", 0, 60)
            lossless = request.delivery == pb.DELIVERY_LOSSLESS
            check(not lossless, "min_interval", "must be omitted with LOSSLESS")
        if request.HasField("start_time"):
            check(is_bound(request.start_time), "start_time", BOUND)
        check.heartbeat(request)
        if isinstance(request, pb.StreamQuotesRequest):
            bounded = request.max_unacknowledged <= 1_000
            check(bounded, "max_unacknowledged", "must be 0 to 1,000")
            later = request.add_symbols or request.remove_symbols or request.acknowledge
            check(not later, "symbols", "the first message must only subscribe")


def check_change(symbols: Sequence[str], room: bool) -> None:
    """Check the symbols that a changed subscription would have."""
    with Checks() as check:
        check.symbols(symbols, "symbols", MAX_SYMBOLS)
        check(room, "symbols", "too many changes wait for their Subscribed")


def check_latest(request: pb.GetLatestQuotesRequest) -> None:
    with Checks() as check:
        check.symbols(request.symbols, "symbols", MAX_SYMBOLS)
        if request.HasField("as_of"):
            check(is_bound(request.as_of), "as_of", BOUND)


def check_bars(bars: Sequence[pb.Bar], batch: int) -> None:
    with Checks(batch=batch) as check:
        check(0 < len(bars) <= MAX_BATCH, "bars", f"must be 1 to {MAX_BATCH:,} bars")
        for i, bar in enumerate(bars[: MAX_BATCH + 1]):
            _check_bar(check, bar, f"bars[{i}]")


def _check_bar(check: Checks, bar: pb.Bar, at: str) -> None:
    check(is_name(bar.symbol), f"{at}.symbol", SYMBOL)
    check(bar.HasField("time") and is_time(bar.time), f"{at}.time", TIME)
    check(bar.HasField("close"), f"{at}.close", "must be present")
    for field in ("open", "high", "low", "close", "vwap", "bid", "ask"):
        check(is_price(getattr(bar, field)), f"{at}.{field}", PRICE)
    for field in ("volume", "bid_size", "ask_size"):
        check(getattr(bar, field) >= 0, f"{at}.{field}", COUNT)


def check_list_bars(request: pb.ListBarsRequest) -> None:
    with Checks() as check:
        check(is_name(request.symbol), "symbol", SYMBOL)
        _check_range(check, request)
        check.page_size(request)


def check_stream_bars(request: pb.StreamBarsRequest) -> None:
    with Checks() as check:
        check.symbols(request.symbols, "symbols", MAX_STREAM_BARS_SYMBOLS)
        _check_range(check, request)


def _check_range(
    check: Checks, request: pb.ListBarsRequest | pb.StreamBarsRequest
) -> None:
    check.time_range(request)
    if request.HasField("interval"):
        whole = request.interval.nanos == 0
        inside = 1 <= request.interval.seconds <= WEEK_S
        check(whole and inside, "interval", "must be whole seconds, 1 s to 7 days")


def check_list_symbols(request: pb.ListSymbolsRequest) -> None:
    with Checks() as check:
        check.page_size(request)
