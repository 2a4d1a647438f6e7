"""Risk limits are checked when they are written, and hold from the next order on."""

import asyncio
from typing import Any

import grpc
import pytest

from quantplane import Client
from quantplane_server.checks import SYMBOL
from quantplane_server.constraints import NOT_NEGATIVE
from quantplane_server.reference.limits import LIST, NAMES
from tests.orders import submit
from tests.reference import (
    create,
    delete,
    fetch,
    get,
    one_or_two_databases,
    sent,
    update,
)
from tests.signals import refused, violations

SYMBOLS = [f"S{number}" for number in range(1_001)]

GOOD: list[dict[str, Any]] = [
    {},
    {"max_order_quantity": 0, "max_order_notional": 0.5, "max_position": 1e300},
    {"max_open_orders": 3, "allowed_symbols": []},
    {"allowed_symbols": SYMBOLS[:1_000]},
]
BAD: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"max_orders": 1}, [("", NAMES)]),
    ({"": 1}, [("", NAMES)]),
    ({"Max_position": 1}, [("", NAMES)]),
    ({"max_position": -1}, [(".max_position", NOT_NEGATIVE)]),
    ({"max_position": float("nan")}, [(".max_position", NOT_NEGATIVE)]),
    ({"max_open_orders": float("inf")}, [(".max_open_orders", NOT_NEGATIVE)]),
    ({"max_order_quantity": "1"}, [(".max_order_quantity", NOT_NEGATIVE)]),
    ({"max_order_notional": None}, [(".max_order_notional", NOT_NEGATIVE)]),
    ({"max_order_notional": True}, [(".max_order_notional", NOT_NEGATIVE)]),
    ({"allowed_symbols": "A"}, [(".allowed_symbols", LIST)]),
    ({"allowed_symbols": SYMBOLS}, [(".allowed_symbols", LIST)]),
    ({"allowed_symbols": ["A", 1]}, [(".allowed_symbols[1]", SYMBOL)]),
    ({"allowed_symbols": ["A ", "B"]}, [(".allowed_symbols[0]", SYMBOL)]),
    (
        {"x": 1, "max_position": [], "max_open_orders": -1},
        [
            ("", NAMES),
            (".max_position", NOT_NEGATIVE),
            (".max_open_orders", NOT_NEGATIVE),
        ],
    ),
]


async def test_limits_are_taken_within_their_rules(client: Client):
    await create(client)
    for limits in GOOD:
        updated = await update(client, ["risk_limits"], risk_limits=limits)
        assert updated.risk_limits == sent(updated).risk_limits
        assert (await get(client)).risk_limits == updated.risk_limits
        assert set(updated.risk_limits) == set(limits)


async def test_limits_beyond_their_rules_are_refused(client: Client):
    created = await create(client)
    for limits, expected in BAD:
        at = [(f"strategy.risk_limits{field}", rule) for field, rule in expected]
        new = create(client, strategy_id="t", risk_limits=limits)
        assert await violations(new) == at, limits
        changed = update(client, ["risk_limits"], risk_limits=limits)
        assert await violations(changed) == at, limits
    assert await get(client) == created


@one_or_two_databases
async def test_a_limit_holds_from_the_next_order_on(client: Client):
    async def is_refused(quantity: float) -> bool:
        try:
            await submit(client, quantity=quantity)
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            return True
        return False

    await create(client, risk_limits={"max_order_quantity": 10})
    assert (await is_refused(10), await is_refused(11)) == (False, True)
    await update(client, ["risk_limits"], risk_limits={"max_order_quantity": 11})
    assert (await is_refused(11), await is_refused(12)) == (False, True)
    await update(client, ["risk_limits"])
    assert not await is_refused(12)
    await update(client, ["risk_limits"], risk_limits={"max_order_quantity": 0})
    assert await is_refused(1)
    await delete(client)
    assert not await is_refused(1)


@pytest.mark.parametrize("limit", ["allowed_symbols", "max_order_quantity"])
async def test_a_refusal_names_the_limit(client: Client, limit: str):
    limits: Any = {"allowed_symbols": ["B"], "max_order_quantity": 1}
    await create(client, risk_limits={limit: limits[limit]})
    _, reason, metadata = await refused(submit(client))
    assert (reason, metadata["limit"]) == ("RISK_LIMIT", limit)


@pytest.mark.parametrize("json", ["[1]", "5", "null", '["max_position"]'])
async def test_limits_that_are_no_object_refuse_every_order_of_their_strategy(
    client: Client, reference_dsn: str, json: str
):
    await create(client)
    await fetch(
        reference_dsn, "UPDATE strategies SET risk_limits = $1::text::jsonb", json
    )
    mine, _ = await asyncio.gather(
        refused(submit(client)), submit(client, strategy_id="other")
    )
    assert mine[1] == "RISK_LIMIT"
