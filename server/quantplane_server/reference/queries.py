"""All SQL on strategies and configurations."""

import json
from collections.abc import Sequence
from typing import Any

from quantplane_server.db import Connection


async def risk_limits(
    conn: Connection, strategy_ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the limits of each strategy that has any."""
    rows = await conn.fetch(
        """
        SELECT strategy_id, risk_limits FROM strategies
         WHERE strategy_id = ANY ($1) AND risk_limits <> '{}'
        """,
        strategy_ids,
    )
    return {row["strategy_id"]: json.loads(row["risk_limits"]) for row in rows}


async def configured(conn: Connection, key: str) -> Any:
    """Return the value of a key, None if it is not set."""
    value = await conn.fetchval("SELECT value FROM configurations WHERE key = $1", key)
    return None if value is None else json.loads(value)
