"""The rules of the requests on reference data, as their proto comments state them."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server.checks import EMPTY, SYMBOL, Checks, is_name
from quantplane_server.constraints import ONCE
from quantplane_server.reference.limits import check_limits
from quantplane_server.reference.queries import (
    CONFIGURATIONS,
    MAX_JSON_BYTES,
    STRATEGIES,
    Resource,
)
from quantplane_server.reference.settings import SETTINGS
from quantplane_server.structs import is_json, rule, to_json

MAX_SYMBOLS = 1_000
MAX_IDS = 1_000
MAX_NAMES = 100  # in a filter, in a mask
MAX_PAGE = 1_000
MAX_KEY = 128  # characters
MAX_DESCRIPTION = 1_000  # characters

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
PREFIX = re.compile(r"[A-Za-z0-9_.-]*")

JSON = rule(MAX_JSON_BYTES)
VALUE = f"must be set; {JSON}"
SYMBOLS = f"must be at most {MAX_SYMBOLS:,} symbols"
KEY = (
    f"must be 1 to {MAX_KEY} letters, digits, hyphens and underscores, in parts"
    " joined by dots"
)
KEY_PREFIX = f"must be at most {MAX_KEY} letters, digits, hyphens, underscores and dots"
DESCRIPTION = f"must be at most {MAX_DESCRIPTION:,} characters, without NUL"
AT_MOST = f"must be at most {MAX_NAMES}"
IDS = f"must be 1 to {MAX_IDS:,} ids"

# --- Strategies ---------------------------------------------------------------------


def check_create_strategy(strategy: pb.Strategy) -> None:
    with Checks() as check:
        check(is_name(strategy.strategy_id), "strategy.strategy_id", SYMBOL)
        _check_strategy(check, strategy, STRATEGIES.columns)
        _check_new(check, STRATEGIES, strategy)


def check_update_strategy(request: pb.UpdateStrategyRequest) -> None:
    with Checks() as check:
        strategy = request.strategy
        check(is_name(strategy.strategy_id), "strategy.strategy_id", SYMBOL)
        _check_mask(check, request.update_mask.paths, STRATEGIES.columns)
        _check_strategy(check, strategy, set(request.update_mask.paths))


def check_strategy_id(request: Any) -> None:
    with Checks() as check:
        check(is_name(request.strategy_id), "strategy_id", SYMBOL)


def check_list_strategies(request: pb.ListStrategiesRequest) -> None:
    with Checks() as check:
        for field in ("statuses", "types"):
            names = getattr(request, field)
            check(len(names) <= MAX_NAMES, field, AT_MOST)
            _check_names(check, names[:MAX_NAMES], field)
        check.page_size(request, MAX_PAGE)


def check_watch_strategies(request: pb.WatchStrategiesRequest) -> None:
    with Checks() as check:
        ids = request.strategy_ids
        check(0 < len(ids) <= MAX_IDS, "strategy_ids", IDS)
        _check_names(check, ids[:MAX_IDS], "strategy_ids")
        check.heartbeat(request)


def _check_strategy(
    check: Checks, strategy: pb.Strategy, fields: Collection[str]
) -> None:
    for field in ("name", "type", "status"):
        if field in fields:
            check(is_name(getattr(strategy, field)), f"strategy.{field}", SYMBOL)
    if "parameters" in fields:
        kept = is_json(strategy.parameters, MAX_JSON_BYTES)
        check(kept, "strategy.parameters", JSON)
    if "risk_limits" in fields:
        check_limits(check, strategy.risk_limits, "strategy.risk_limits")
    if "symbols" in fields:
        _check_symbols(check, strategy.symbols)


def _check_names(check: Checks, names: Sequence[str], field: str) -> None:
    for i, name in enumerate(names):
        check(is_name(name), f"{field}[{i}]", SYMBOL)


def _check_symbols(check: Checks, symbols: Sequence[str]) -> None:
    check(len(symbols) <= MAX_SYMBOLS, "strategy.symbols", SYMBOLS)
    _check_names(check, symbols[:MAX_SYMBOLS], "strategy.symbols")
    seen = set[str]()
    for i, symbol in enumerate(symbols[:MAX_SYMBOLS]):
        check(symbol not in seen, f"strategy.symbols[{i}]", ONCE)
        seen.add(symbol)


# --- Configurations -----------------------------------------------------------------


def check_create_configuration(configuration: pb.Configuration) -> None:
    with Checks() as check:
        check(is_key(configuration.key), "configuration.key", KEY)
        _check_configuration(check, configuration, CONFIGURATIONS.columns)
        _check_new(check, CONFIGURATIONS, configuration)


def check_update_configuration(request: pb.UpdateConfigurationRequest) -> None:
    with Checks() as check:
        check(is_key(request.configuration.key), "configuration.key", KEY)
        _check_mask(check, request.update_mask.paths, CONFIGURATIONS.columns)
        _check_configuration(
            check, request.configuration, set(request.update_mask.paths)
        )


def check_key(request: Any) -> None:
    with Checks() as check:
        check(is_key(request.key), "key", KEY)


def check_list_configurations(request: pb.ListConfigurationsRequest) -> None:
    with Checks() as check:
        prefix = request.prefix
        kept = len(prefix) <= MAX_KEY and PREFIX.fullmatch(prefix) is not None
        check(kept, "prefix", KEY_PREFIX)
        check.page_size(request, MAX_PAGE)


def _check_configuration(
    check: Checks, configuration: pb.Configuration, fields: Collection[str]
) -> None:
    if "value" in fields:
        _check_value(check, configuration)
    if "description" in fields:
        text = configuration.description
        kept = len(text) <= MAX_DESCRIPTION and "\0" not in text
        check(kept, "configuration.description", DESCRIPTION)


def _check_value(check: Checks, configuration: pb.Configuration) -> None:
    kept = is_json(configuration.value, MAX_JSON_BYTES)
    check(kept, "configuration.value", VALUE)
    setting = SETTINGS.get(configuration.key)
    if kept and setting:
        value = json.loads(to_json(configuration.value))
        check(setting.takes(value), "configuration.value", f"must be {setting.type}")


def is_key(text: str) -> bool:
    return len(text) <= MAX_KEY and NAME.fullmatch(text) is not None


# --- Both ---------------------------------------------------------------------------


def _check_mask(check: Checks, paths: Sequence[str], columns: Collection[str]) -> None:
    *most, last = columns
    rule = f"must name {', '.join(most)} or {last}"
    check(0 < len(paths) <= MAX_NAMES, "update_mask", rule)
    for i, path in enumerate(paths[:MAX_NAMES]):
        check(path in columns, f"update_mask.paths[{i}]", rule)


def _check_new(check: Checks, resource: Resource, message: Message) -> None:
    """Check that what callers do not set is empty."""
    for field, _ in message.ListFields():
        settable = field.name == resource.key or field.name in resource.columns
        check(settable, f"{resource.kind}.{field.name}", EMPTY)
