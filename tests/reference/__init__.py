"""Short ways to say what people change, and what is kept of it."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value

from quantplane import Client
from quantplane import v1 as pb

BY_SERVER = ("created_at", "updated_at", "created_by", "etag")

# Where the reference data is: with the time series, or in a database of its own.
one_or_two_databases = pytest.mark.parametrize(
    "databases", [1, 2], indirect=True, ids=["one database", "two databases"]
)


def strategy(strategy_id: str = "s", **fields: Any) -> pb.Strategy:
    """Return a strategy as it is sent."""
    fields = {
        "name": "Momentum", "type": "momentum", "status": "running",
        "parameters": {"fast": 5, "on": True, "of": ["a", None, {"b": 1.5}]},
        "risk_limits": {"max_position": 10, "allowed_symbols": ["A", "B"]},
        "symbols": ["B", "A"],
    } | fields  # fmt: skip
    return pb.Strategy(strategy_id=strategy_id, **fields)


def sent(row: pb.Strategy) -> pb.Strategy:
    """Return a strategy without what the server sets."""
    copy = pb.Strategy()
    copy.CopyFrom(row)
    for field in BY_SERVER:
        copy.ClearField(field)  # type: ignore[arg-type]
    return copy


async def create(
    client: Client, new: pb.Strategy | None = None, **fields: Any
) -> pb.Strategy:
    request = pb.CreateStrategyRequest(strategy=new or strategy(**fields))
    return (await client.strategy.CreateStrategy(request)).strategy


async def get(client: Client, strategy_id: str = "s") -> pb.Strategy:
    request = pb.GetStrategyRequest(strategy_id=strategy_id)
    return (await client.strategy.GetStrategy(request)).strategy


async def update(
    client: Client, mask: Sequence[str], strategy_id: str = "s", **fields: Any
) -> pb.Strategy:
    request = pb.UpdateStrategyRequest(
        strategy=pb.Strategy(strategy_id=strategy_id, **fields),
        update_mask={"paths": mask},  # type: ignore[arg-type]
    )
    return (await client.strategy.UpdateStrategy(request)).strategy


async def delete(client: Client, strategy_id: str = "s", etag: str = "") -> None:
    request = pb.DeleteStrategyRequest(strategy_id=strategy_id, etag=etag)
    await client.strategy.DeleteStrategy(request)


async def page(client: Client, **fields: Any) -> pb.ListStrategiesResponse:
    return await client.strategy.ListStrategies(pb.ListStrategiesRequest(**fields))


async def listed(client: Client, **fields: Any) -> list[pb.Strategy]:
    """Return the strategies of all pages."""
    response = await page(client, **fields)
    strategies = list(response.strategies)
    while response.next_page_token:
        fields["page_token"] = response.next_page_token
        response = await page(client, **fields)
        assert response.strategies
        strategies += response.strategies
    return strategies


def watch(client: Client, *ids: str, **fields: Any) -> AsyncIterator[Any]:
    request = pb.WatchStrategiesRequest(strategy_ids=ids, **fields)
    return aiter(client.strategy.WatchStrategies(request))


def configuration(key: str = "k", value: Any = 1, **fields: Any) -> pb.Configuration:
    """Return a configuration as it is sent; the value as JSON has it."""
    made = pb.Configuration(key=key, **fields)
    made.value.CopyFrom(json_value(value))
    return made


def json_value(value: Any) -> Value:
    return ParseDict(value, Value())


async def put(client: Client, key: str = "k", value: Any = 1, **fields: Any) -> Any:
    """Create a configuration; return it."""
    new = configuration(key, value, **fields)
    request = pb.CreateConfigurationRequest(configuration=new)
    return (await client.configuration.CreateConfiguration(request)).configuration


async def read(client: Client, key: str = "k") -> pb.Configuration:
    request = pb.GetConfigurationRequest(key=key)
    return (await client.configuration.GetConfiguration(request)).configuration


async def change(
    client: Client,
    key: str = "k",
    value: Any = None,
    mask: Sequence[str] = ("value",),
    **fields: Any,
) -> pb.Configuration:
    request = pb.UpdateConfigurationRequest(
        configuration=configuration(key, value, **fields),
        update_mask={"paths": mask},  # type: ignore[arg-type]
    )
    return (await client.configuration.UpdateConfiguration(request)).configuration


async def unset(client: Client, key: str = "k", etag: str = "") -> None:
    request = pb.DeleteConfigurationRequest(key=key, etag=etag)
    await client.configuration.DeleteConfiguration(request)


async def fetch(dsn: str, query: str, *args: Any) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(query, *args)]
    finally:
        await connection.close()


async def entries(dsn: str) -> list[Any]:
    """Return the audit log: action, kind, name, what was, what is."""
    rows = await fetch(
        dsn,
        """
        SELECT action, resource_type, resource_id, old_value, new_value
          FROM audit_logs ORDER BY log_id
        """,
    )
    return [
        (*names, *(None if value is None else json.loads(value) for value in values))
        for *names, values in ((*row[:3], row[3:]) for row in rows)
    ]


async def actions(dsn: str) -> list[str]:
    return [action for action, *_ in await entries(dsn)]
