"""The documented rules of the portfolio's requests."""

from typing import Any

from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL, Checks, is_name


def check_get(request: pb.GetPortfolioRequest) -> None:
    with Checks() as check:
        _check_strategy(check, request)


def check_list(request: pb.ListPositionsRequest) -> None:
    with Checks() as check:
        _check_strategy(check, request)
        check.page_size(request)


def check_watch(request: pb.WatchPortfolioRequest) -> None:
    with Checks() as check:
        _check_strategy(check, request)
        if request.HasField("interval"):
            check.duration(request.interval, "interval", 0.1, 60)
        check.heartbeat(request)


def check_snapshots(request: pb.ListSnapshotsRequest) -> None:
    with Checks() as check:
        check.time_range(request)
        check.page_size(request)


def _check_strategy(check: Checks, request: Any) -> None:
    given = request.strategy_id
    check(not given or is_name(given), "strategy_id", SYMBOL)
