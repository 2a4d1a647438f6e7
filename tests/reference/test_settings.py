"""What servers read from the table of configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantplane_server.db import Database
from quantplane_server.reference.settings import (
    INITIAL_CASH,
    SESSION_END,
    SETTINGS,
    SNAPSHOT_INTERVAL,
    Setting,
    configured,
)
from tests.orders.test_expiry import configure

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda each: each.key)
async def test_a_key_that_is_not_set_has_its_default(dsn: str, setting: Setting[Any]):
    db = await Database.open(dsn)
    assert await configured(db, setting) == setting.default
    await db.close()


async def test_a_value_is_read_each_time(dsn: str):
    db = await Database.open(dsn)
    for cash in (5, 7.5, -1):
        await configure(dsn, INITIAL_CASH.key, cash)
        assert await configured(db, INITIAL_CASH) == cash
    await db.close()


UNUSABLE = [
    (INITIAL_CASH, "5"),
    (INITIAL_CASH, None),
    (INITIAL_CASH, True),
    (SNAPSHOT_INTERVAL, 0),
    (SNAPSHOT_INTERVAL, 1e9),
    (SNAPSHOT_INTERVAL, [60]),
    (SESSION_END, 17),
    (SESSION_END, "17:00 Nowhere/Land"),
    (SESSION_END, "25:00 UTC"),
    (SESSION_END, "17:00+02:00 UTC"),
    (SESSION_END, "17:00 ../../etc/passwd"),
    (SESSION_END, {"time": "17:00"}),
]


@pytest.mark.parametrize(
    ("setting", "value"),
    UNUSABLE,
    ids=[f"{setting.key}={json.dumps(value)}" for setting, value in UNUSABLE],
)
async def test_a_value_that_can_t_be_used_is_as_if_not_set_and_is_logged(
    dsn: str, setting: Setting[Any], value: Any, caplog: pytest.LogCaptureFixture
):
    await configure(dsn, setting.key, value)
    db = await Database.open(dsn)
    assert await configured(db, setting) == setting.default
    await db.close()
    assert value is None or setting.key in caplog.text


def test_the_docs_have_a_row_for_each_setting():
    table = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert table == [
        f"| `{each.key}` | {each.type} | `{json.dumps(each.default)}`"
        f" | {each.description} |"
        for each in SETTINGS.values()
    ]
