"""GetLatestHeston, GetLatestSabr and GetLatestOu, on both editions."""

import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest

from quantplane import Client
from quantplane_server.checks import LAST, to_us
from quantplane_server.models import queries
from tests.conftest import both_editions
from tests.models import (
    MODELS,
    SABR,
    at,
    heston,
    refused,
    sabr,
    violations,
)

WEEKS = 8
WEEK_H = 7 * 24


@both_editions
async def test_the_latest_are_told_in_the_order_of_the_request(client: Client):
    for model in MODELS:
        rows = [model.row(name, hour) for name in "ABC" for hour in (0, 200, 100)]
        await model.publish(client, [*rows, model.row("C", 300)])
        response = await model.latest(client, "C", "none", "A", "C", "nothing")
        assert list(response.parameters) == [model.row("C", 300), model.row("A", 200)]
        assert model.unknown(response) == ["none", "nothing"]


@both_editions
async def test_as_of_a_time_the_latest_at_or_before_it_is_told(client: Client):
    for model in MODELS:
        await model.publish(client, [model.row("A", hour) for hour in (100, 200)])
        for hour, expected in ((99.9, []), (100, [100]), (199.9, [100]), (500, [200])):
            response = await model.latest(client, "A", as_of=at(hour))
            assert list(response.parameters) == [model.row("A", h) for h in expected]
            assert model.unknown(response) == ([] if expected else ["A"])


@both_editions
async def test_a_surface_is_all_maturities_of_its_latest_time(client: Client):
    old = [sabr("A", 0, maturity) for maturity in (0.25, 0.5, 1, 2)]
    new = [sabr("A", 1, maturity) for maturity in (0.5, 1, 3)]
    other = [sabr("B", 0, 7)]
    await SABR.publish(client, [*reversed(new), *old, *other])
    response = await SABR.latest(client, "B", "A")
    assert list(response.parameters) == other + new
    response = await SABR.latest(client, "A", as_of=at(0.5))
    assert list(response.parameters) == old


async def test_an_answer_has_at_most_20_000_rows(client: Client):
    surface = [sabr("A", 0, 1 + number / 10_000) for number in range(20_001)]
    for start in range(0, 20_000, 2_000):
        await SABR.publish(client, surface[start : start + 2_000])
    response = await SABR.latest(client, "A")
    assert list(response.parameters) == surface[:20_000]
    await SABR.publish(client, surface[20_000:])
    expected = (grpc.StatusCode.RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE")
    assert await refused(SABR.latest(client, "A")) == expected


async def test_a_bad_request_is_refused(client: Client):
    for model in MODELS:
        names = f"{model.key}s"
        size = (names, "must be 1 to 1,000 symbols")
        assert await violations(model.latest(client)) == [size]
        assert await violations(model.latest(client, *map(str, range(1_001)))) == [size]
        far = {"as_of": {"seconds": 1 << 40}}
        assert [
            field for field, _ in await violations(model.latest(client, "A", **far))
        ] == ["as_of"]
        found = await violations(model.latest(client, "A", " B"))
        assert [field for field, _ in found] == [f"{names}[1]"]
        await model.latest(client, *map(str, range(1_000)))


# --- What the database does for it --------------------------------------------------


class Explained:
    """A connection that explains what is asked of it, and answers nothing."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self.scans: list[str] = []  # of tables or their chunks

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        explain = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) "
        plan = await self._connection.fetch(explain + query, *args)
        scan = re.compile(r"(Seq|Index|Heap).* Scan.* on ")
        self.scans = [line for (line,) in plan if scan.search(line)]
        return []


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """To a database with calibrations of many symbols over many weeks."""
    connection = await asyncpg.connect(dsn)
    for table, make in (queries.HESTON, heston), (queries.SABR, sabr):
        rows = [
            make(f"S{number}", day * 24 + number / 10)
            for number in range(100)
            for day in range(WEEKS * 7)
        ]
        await queries.store(connection, table, rows)
    await connection.execute("ANALYZE")
    yield connection
    await connection.close()


@both_editions
async def test_each_symbol_costs_one_probe_of_its_index(
    connection: asyncpg.Connection,
):
    explained: Any = Explained(connection)
    for table in queries.HESTON, queries.SABR:
        await queries.latest(explained, table, ["S1", "S2"], to_us(LAST), 10)
        executed = [scan for scan in explained.scans if "never executed" not in scan]
        assert len(executed) == 1  # of the table, or of its newest chunk
        assert f"idx_{table.kind}_symbol" in executed[0]


@both_editions
async def test_as_of_a_time_no_later_chunk_is_read(connection: asyncpg.Connection):
    explained: Any = Explained(connection)
    as_of = at(WEEKS * WEEK_H / 2)
    for table in queries.HESTON, queries.SABR:
        await queries.latest(explained, table, ["S1"], int(as_of.timestamp() * 1e6), 10)
        assert explained.scans
        assert all(f"idx_{table.kind}_symbol" in scan for scan in explained.scans)
        for chunk in re.findall(r" on (_hyper\w+)", "\n".join(explained.scans)):
            start = await connection.fetchval(
                "SELECT range_start FROM timescaledb_information.chunks"
                " WHERE chunk_name = $1",
                chunk,
            )
            assert start <= as_of
