"""Strategies as text."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

from quantplane import v1 as pb
from quantplane.tables.rows import print_details, print_rows
from quantplane.tables.text import milliseconds, printable
from quantplane.tables.values import (
    contents,
    differences,
    listed,
    plain,
    short,
    value_text,
)


def print_strategies(out: IO[str], strategies: Sequence[pb.Strategy]) -> None:
    dispensable = ("updated", "symbols", "limits", "name")
    print_rows(out, [_row(strategy) for strategy in strategies], dispensable)


def _row(strategy: pb.Strategy) -> dict[str, str]:
    return {
        "strategy": strategy.strategy_id,
        "name": strategy.name,
        "type": strategy.type,
        "status": strategy.status,
        "symbols": short(", ".join(strategy.symbols)),
        "limits": listed(contents(plain(strategy.risk_limits))),
        "updated": milliseconds(strategy.updated_at),
    }


def print_strategy(out: IO[str], strategies: Sequence[pb.Strategy]) -> None:
    """Print all there is to know of each, whole."""
    for strategy in strategies:
        print_details(out, _details(strategy))


def _details(strategy: pb.Strategy) -> Iterator[tuple[str, str]]:
    yield "strategy", strategy.strategy_id
    yield "name", strategy.name
    yield "type", strategy.type
    yield "status", strategy.status
    yield "symbols", ", ".join(strategy.symbols)
    yield from _entries("limit", plain(strategy.risk_limits))
    yield from _entries("parameter", plain(strategy.parameters))
    yield "created", f"{milliseconds(strategy.created_at)} by {strategy.created_by}"
    yield "updated", milliseconds(strategy.updated_at)
    yield "etag", strategy.etag


def _entries(label: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        yield label, f"{key}={value_text(value)}"


class StrategyLines:
    """Says of what a stream delivers what is new in it, one line each."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, response: pb.WatchStrategiesResponse) -> str:
        """Return the line of a response with one strategy or one deleted id."""
        for strategy in response.strategies:
            return self._changed(strategy)
        (strategy_id,) = response.deleted_ids
        self._known.pop(strategy_id, None)
        return _line("-", strategy_id, "", "not there", "")

    def _changed(self, strategy: pb.Strategy) -> str:
        is_ = _choices(strategy)
        was = self._known.get(strategy.strategy_id)
        self._known[strategy.strategy_id] = is_
        return _line(
            milliseconds(strategy.updated_at),
            strategy.strategy_id,
            strategy.type,
            strategy.status,
            listed(differences(was, is_) if was else contents(is_)),
        )


def _line(time: str, strategy_id: str, kind: str, status: str, told: str) -> str:
    return printable(
        f"{time:<24}  {strategy_id:<12} {kind:<10} {status:<9}  {told}"
    ).rstrip()


def _choices(strategy: pb.Strategy) -> dict[str, Any]:
    """Return what people choose."""
    return {
        "status": strategy.status,
        "name": strategy.name,
        "type": strategy.type,
        "parameters": plain(strategy.parameters),
        "risk_limits": plain(strategy.risk_limits),
        "symbols": list(strategy.symbols),
    }
