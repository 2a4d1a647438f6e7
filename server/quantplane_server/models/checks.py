"""The rules of the models' requests, as their proto comments state them."""

from collections.abc import Iterator, Sequence
from math import inf, isfinite, log
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
)
from quantplane_server.constraints import FRACTION, NOT_NEGATIVE, ONCE

MAX_BATCH = 2_000
MAX_KEYS = 1_000

AT_MOST_1 = "must be finite and at most 1"
COMPUTABLE = "can't be told: 2 kappa theta or sigma^2 leaves the range of a double"
IN_ALL = f"must be 1 to {MAX_KEYS:,} keys, with sabr_symbols and ou_pair_ids"


def check_heston(rows: Sequence[pb.HestonParameters]) -> None:
    with Checks() as check:
        for at, row in _rows(check, rows, "symbol"):
            check.constraint("valid_heston_kappa", is_positive(row.kappa), at)
            check.constraint("valid_heston_theta", is_positive(row.theta), at)
            check.constraint("valid_heston_sigma", is_positive(row.sigma), at)
            check.constraint("valid_heston_rho", -1 <= row.rho <= 1, at)
            check.constraint("valid_heston_v0", is_positive(row.v0), at)
            _check_feller(check, row, at)
            _check_fit(check, row, at)
            fitted = row.r_squared <= 1 and isfinite(row.r_squared)
            check(fitted, at + "r_squared", AT_MOST_1)
            took = row.calibration_time_ms
            check(took >= 0, at + "calibration_time_ms", COUNT)


def _check_feller(check: Checks, row: pb.HestonParameters, at: str) -> None:
    if not all(map(is_positive, (row.kappa, row.theta, row.sigma))):
        return
    # As the constraint computes it, but for what the database refuses to compute:
    # what leaves the range of a double, which Python rounds to 0 or infinity.
    drift, noise = 2 * row.kappa * row.theta, row.sigma * row.sigma
    if 0 < drift < inf and 0 < noise < inf:
        kept = row.feller_satisfied == (drift > noise)
        check.constraint("valid_feller", kept, at)
    else:
        check(False, at + "feller_satisfied", COMPUTABLE)


def check_sabr(rows: Sequence[pb.SabrParameters]) -> None:
    with Checks() as check:
        for at, row in _rows(check, rows, "symbol", "maturity"):
            check.constraint("valid_sabr_maturity", is_positive(row.maturity), at)
            check.constraint("valid_sabr_alpha", is_positive(row.alpha), at)
            check.constraint("valid_sabr_beta", 0 <= row.beta <= 1, at)
            check.constraint("valid_sabr_rho", -1 <= row.rho <= 1, at)
            check.constraint("valid_sabr_nu", is_not_negative(row.nu), at)
            _check_fit(check, row, at)


def check_ou(rows: Sequence[pb.OuParameters]) -> None:
    with Checks() as check:
        for at, row in _rows(check, rows, "pair_id"):
            for asset in ("asset1", "asset2"):
                check(is_name(getattr(row, asset)), at + asset, SYMBOL)
            check.constraint("valid_ou_theta", is_positive(row.theta), at)
            check.constraint("valid_ou_sigma", is_positive(row.sigma), at)
            half_lives = row.half_life * row.theta / log(2)
            check.constraint("valid_half_life", abs(half_lives - 1) <= 1e-6, at)
            check(0 <= row.adf_pvalue <= 1, at + "adf_pvalue", FRACTION)
            for field in (
                "hedge_ratio", "mu", "adf_statistic", "entry_lower", "entry_upper",
                "exit_target", "stop_loss",
            ):  # fmt: skip
                check(is_price(getattr(row, field)), at + field, PRICE)


def _rows(
    check: Checks, rows: Sequence[Any], name: str, *more: str
) -> Iterator[tuple[str, Any]]:
    """Yield each row and what precedes its fields, having checked what names it."""
    check(0 < len(rows) <= MAX_BATCH, "parameters", f"must be 1 to {MAX_BATCH:,} rows")
    seen = set()
    for i, row in enumerate(rows[: MAX_BATCH + 1]):
        at = f"parameters[{i}]"
        check(is_name(getattr(row, name)), f"{at}.{name}", SYMBOL)
        timed = row.HasField("time") and is_time(row.time)
        check(timed, f"{at}.time", TIME)
        key = tuple(getattr(row, field) for field in (name, *more))
        check((key, time_us(row.time)) not in seen, at, ONCE)
        seen.add((key, time_us(row.time)))
        yield f"{at}.", row


def _check_fit(
    check: Checks, row: pb.HestonParameters | pb.SabrParameters, at: str
) -> None:
    check(is_not_negative(row.rmse), at + "rmse", NOT_NEGATIVE)
    check(row.n_options >= 0, at + "n_options", COUNT)


def check_latest(
    request: pb.GetLatestHestonRequest
    | pb.GetLatestSabrRequest
    | pb.GetLatestOuRequest,
    names: str,
) -> None:
    with Checks() as check:
        check.symbols(getattr(request, names), names, MAX_KEYS)
        if request.HasField("as_of"):
            check(is_time(request.as_of), "as_of", TIME)


def check_list(
    request: pb.ListHestonRequest | pb.ListSabrRequest | pb.ListOuRequest, name: str
) -> None:
    with Checks() as check:
        check(is_name(getattr(request, name)), name, SYMBOL)
        check.time_range(request)
        check.page_size(request)


def check_watch(request: pb.WatchModelsRequest) -> None:
    with Checks() as check:
        total = 0
        for field in ("heston_symbols", "sabr_symbols", "ou_pair_ids"):
            names = getattr(request, field)
            for i, name in enumerate(names[:MAX_KEYS]):
                check(is_name(name), f"{field}[{i}]", SYMBOL)
            total += len(names)
        check(0 < total <= MAX_KEYS, "heston_symbols", IN_ALL)
        check.heartbeat(request)


def is_positive(value: float) -> bool:
    return 0 < value < inf


def is_not_negative(value: float) -> bool:
    return 0 <= value < inf
