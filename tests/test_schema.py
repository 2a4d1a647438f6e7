"""The database against the document that specifies it, whose SQL is run for this."""

import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from quantplane_server import constraints
from quantplane_server.constraints import RULES
from quantplane_server.db import Database, Edition
from tests.conftest import both_editions
from tests.postgres import database

ROOT = Path(__file__).parents[1]
SPECIFICATION = ROOT.parent / "shared" / "SCHEMA.md"
DOCUMENT = ROOT / "docs" / "schema.md"

# What differs from the specification, all of it; docs/schema.md gives the reasons.
MORE_COLUMNS = {
    "signals": ["trace_id"],
    "orders": [
        *("client_order_id", "version", "pending_request", "outcome_unknown"),
        *("reject_code", "overfill_quantity", "triggered_at", "trace_id"),
        *("submitted_at", "pending_version", "pending_quantity", "pending_price"),
        "pending_stop_price",
    ],
    "executions": [
        *("strategy_id", "ref_execution_id", "late", "position_number"),
        *("position_quantity", "realized_pnl"),
    ],
    "positions": ["n_executions"],
    "audit_logs": ["trace_id", "key_id"],
}
FOREIGN = "FOREIGN KEY"
OTHER_CONSTRAINTS = {
    "signals_pkey": "PRIMARY KEY (signal_id, time)",
    "orders_pkey": "PRIMARY KEY (order_id, created_at)",
    "executions_pkey": "PRIMARY KEY (execution_id, time)",
    "orders_signal_id_fkey": f"{FOREIGN} (signal_id) REFERENCES signal_keys(signal_id)",
    "executions_order_id_fkey": f"{FOREIGN} (order_id) REFERENCES order_keys(order_id)",
}
MORE_INDEXES = {"idx_orders_signal"}
MORE_CONSTRAINTS = set(RULES) - {"valid_strength", "valid_confidence"}
MORE_TABLES = {
    *("alembic_version", "alembic_version_reference", "server_keys"),
    *("bus_positions", "pending_days", "aggregated_days", "option_chain_times"),
    *("signal_keys", "order_keys", "execution_keys", "event_log", "log_head"),
    "strategy_positions",
    *("retention_policies", "maintenance_runs", "api_keys", "audit_positions"),
    *("sessions", "signing_keys", "login_failures", "identity_version"),
}

HYPERTABLES = {
    **dict.fromkeys(("market_data", "options_chains", "signals", "executions"), "time"),
    **dict.fromkeys(("heston_parameters", "sabr_parameters"), "time"),
    **dict.fromkeys(("ou_parameters", "portfolio_snapshots"), "time"),
    "orders": "created_at",
}
RETENTION = {
    **dict.fromkeys(("market_data", "options_chains", "signals"), "5 years"),
    "portfolio_snapshots": "10 years",
}
DAILY = "day symbol open high low close volume avg_price".split()

pytestmark = both_editions


class Catalog(NamedTuple):
    """What a database consists of; each by name."""

    tables: dict[str, list[tuple[Any, ...]]]  # name, type, nullable, default
    indexes: dict[str, str]
    constraints: dict[str, str]


@pytest.fixture
async def specified(postgres_dsn: str) -> AsyncIterator[Catalog]:
    """The catalog that the document's own statements make, on plain PostgreSQL."""
    if not SPECIFICATION.exists():
        pytest.skip("the specification is not here")
    async with database(postgres_dsn, migrated=False) as dsn:
        connection = await asyncpg.connect(dsn)
        for statement in statements():
            if re.match(r"CREATE (TABLE|INDEX)|INSERT", statement):
                await connection.execute(statement)
        yield await catalog(connection)
        await connection.close()


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn, server_settings={"timezone": "UTC"})
    yield connection
    await connection.close()


@pytest.fixture
async def edition_now(dsn: str) -> Edition:
    opened = await Database.open(dsn, pool_size=1)
    await opened.close()
    return opened.edition


def statements() -> list[str]:
    """Return the SQL statements of the document."""
    blocks = re.findall(r"```sql\n(.*?)```", SPECIFICATION.read_text(), re.DOTALL)
    sql = re.sub(r"--[^\n]*", "", "".join(blocks))
    return [part.strip() for part in sql.split(";") if part.strip()]


async def catalog(connection: asyncpg.Connection) -> Catalog:
    tables: dict[str, list[tuple[Any, ...]]] = {}
    for table, *column in await connection.fetch(
        """
        SELECT table_name::text, column_name::text, data_type::text, is_nullable::text,
               column_default::text
          FROM information_schema.columns JOIN information_schema.tables
               USING (table_schema, table_name)
         WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
         ORDER BY table_name, ordinal_position
        """
    ):
        tables.setdefault(table, []).append(tuple(column))
    indexes = await connection.fetch(
        "SELECT indexname::text, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    )
    checks = await connection.fetch(
        """
        SELECT conname::text, pg_get_constraintdef(oid) FROM pg_constraint
         WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
        """
    )
    return Catalog(tables, dict(indexes), dict(checks))


async def test_every_table_has_the_specified_columns_in_order(
    specified: Catalog, connection: asyncpg.Connection
):
    made = (await catalog(connection)).tables
    for table, columns in specified.tables.items():
        count = len(columns)
        assert made[table][:count] == columns, table
        more = [name for name, *_ in made[table][count:]]
        assert more == MORE_COLUMNS.get(table, []), table


async def test_there_are_no_tables_that_the_document_does_not_explain(
    specified: Catalog, connection: asyncpg.Connection, edition_now: Edition
):
    expected = specified.tables.keys() | MORE_TABLES
    if edition_now is Edition.COMMUNITY:
        expected -= {"aggregated_days"}
    assert (await catalog(connection)).tables.keys() == expected


async def test_every_index_is_as_specified(
    specified: Catalog, connection: asyncpg.Connection
):
    made = (await catalog(connection)).indexes
    for name, definition in specified.indexes.items():
        if name not in OTHER_CONSTRAINTS:
            assert made[name] == definition


async def test_specified_tables_have_no_other_indexes(
    specified: Catalog, connection: asyncpg.Connection
):
    made = (await catalog(connection)).indexes
    for name in made.keys() - MORE_INDEXES:
        definition = made[name]
        (table,) = re.findall(r" ON public\.(\w+) ", definition)
        assert table not in specified.tables or name in specified.indexes, name


async def test_every_constraint_is_as_specified_or_as_explained(
    specified: Catalog, connection: asyncpg.Connection
):
    made = (await catalog(connection)).constraints
    for name, definition in (specified.constraints | OTHER_CONSTRAINTS).items():
        definition = OTHER_CONSTRAINTS.get(name, definition)
        assert plain(made[name]) == plain(definition), name
    own = {f"{table}_{kind}" for table in MORE_TABLES for kind in ("pkey", "pkc")}
    unexplained = made.keys() - specified.constraints.keys() - MORE_CONSTRAINTS - own
    tables = ("api_keys", "execution_keys", "sessions")
    assert all(name.startswith(tables) for name in unexplained)


async def test_every_check_has_words_for_the_caller(connection: asyncpg.Connection):
    made = (await catalog(connection)).constraints
    checks = {name for name, text in made.items() if text.startswith("CHECK")}
    words = {name for name in RULES if name.startswith("valid")}
    assert checks == words
    assert set(RULES) - words <= made.keys()


async def test_the_permissions_are_those_of_the_document(
    specified: Catalog, postgres_dsn: str, connection: asyncpg.Connection
):
    async with database(postgres_dsn, migrated=False) as scratch:
        other = await asyncpg.connect(scratch)
        for statement in statements():
            if re.match(r"CREATE TABLE permissions|INSERT INTO permissions", statement):
                await other.execute(statement)
        query = """
            SELECT * FROM permissions WHERE role NOT IN ('strategy', 'feed', 'broker')
             ORDER BY permission_id
        """
        assert await connection.fetch(query) == await other.fetch(query)
        await other.close()


async def test_the_hypertables_are_those_of_the_document(
    connection: asyncpg.Connection, edition_now: Edition
):
    if SPECIFICATION.exists():
        text = " ".join(statements())
        assert dict(re.findall(r"create_hypertable\('(\w+)', '(\w+)'", text)) == (
            HYPERTABLES
        )
    if edition_now is Edition.PLAIN:
        return
    rows = await connection.fetch(
        """
        SELECT hypertable_name::text, column_name::text
          FROM timescaledb_information.dimensions WHERE hypertable_schema = 'public'
        """
    )
    assert dict(rows) == HYPERTABLES


async def test_rows_are_kept_as_long_as_specified(
    connection: asyncpg.Connection, edition_now: Edition
):
    if SPECIFICATION.exists():
        text = " ".join(statements())
        policy = r"add_retention_policy\('(\w+)', INTERVAL '([^']+)'\)"
        assert dict(re.findall(policy, text)) == RETENTION
    query = "SELECT table_name, drop_after::text FROM retention_policies"
    kept = dict(await connection.fetch(query))
    assert kept.pop("option_chain_times") == kept.get("options_chains", "5 years")
    assert kept.pop("event_log") == "30 days"
    if edition_now is Edition.COMMUNITY:
        assert not kept
        query = """
            SELECT hypertable_name::text, config->>'drop_after'
              FROM timescaledb_information.jobs WHERE proc_name = 'policy_retention'
        """
        kept = dict(await connection.fetch(query))
    assert kept == RETENTION


async def test_the_daily_bars_begin_with_the_specified_columns(
    connection: asyncpg.Connection,
):
    rows = await connection.fetch(
        """
        SELECT column_name::text FROM information_schema.columns
         WHERE table_name = 'market_data_daily' ORDER BY ordinal_position
        """
    )
    assert [name for (name,) in rows][: len(DAILY)] == DAILY


async def test_the_daily_bars_are_what_the_specified_query_gives(
    connection: asyncpg.Connection,
):
    await connection.execute(
        """
        INSERT INTO market_data (time, symbol, open, high, low, close, volume)
        SELECT '2024-03-01'::timestamptz + i * INTERVAL '7 minutes', 'S' || i % 3,
               nullif(i % 11, 0), i % 13, i % 7, i % 17, nullif(i % 5, 0)
          FROM generate_series(1, 2000) AS i;
        INSERT INTO pending_days (symbol, day)
        SELECT DISTINCT symbol, time_bucket('1 day', time) FROM market_data
        """
    )
    specified_query = """
        SELECT time_bucket('1 day', time) AS day, symbol, first(open, time) AS open,
               max(high) AS high, min(low) AS low, last(close, time) AS close,
               sum(volume) AS volume, avg(close) AS avg_price
          FROM market_data GROUP BY day, symbol ORDER BY day, symbol
    """
    daily = f"SELECT {', '.join(DAILY)} FROM market_data_daily ORDER BY day, symbol"
    assert await connection.fetch(daily) == await connection.fetch(specified_query)


async def test_the_community_edition_has_the_specified_policies(
    connection: asyncpg.Connection, edition_now: Edition
):
    if edition_now is not Edition.COMMUNITY:
        names = "SELECT proname FROM pg_proc WHERE proname = 'add_job'"
        assert edition_now is Edition.APACHE or not await connection.fetch(names)
        return
    rows = await connection.fetch(
        """
        SELECT proc_name::text, schedule_interval, config
          FROM timescaledb_information.jobs
         WHERE proc_name IN ('policy_compression',
                             'policy_refresh_continuous_aggregate')
         ORDER BY 1
        """
    )
    (_, _, compression), (_, every, refresh) = rows
    assert '"compress_after": "7 days"' in compression
    assert '"start_offset": "3 days"' in refresh
    assert '"end_offset": "01:00:00"' in refresh
    assert every.total_seconds() == 3600
    settings = await connection.fetch(
        """
        SELECT attname::text FROM timescaledb_information.compression_settings
         WHERE hypertable_name = 'market_data' AND segmentby_column_index IS NOT NULL
        """
    )
    assert settings == [("symbol",)]


def test_the_document_explains_every_deviation(edition: str):
    text = DOCUMENT.read_text()
    names = {*OTHER_CONSTRAINTS, *MORE_TABLES, *MORE_CONSTRAINTS, *MORE_INDEXES}
    names |= {column for columns in MORE_COLUMNS.values() for column in columns}
    names |= {"daily_bars", "market_data_daily"}
    assert not [name for name in names if f"`{name}`" not in text]


# --- Identity -----------------------------------------------------------------------

SIGNAL = """
    INSERT INTO signals (time, strategy_id, symbol, signal_type, strength, confidence)
    VALUES ('2024-03-01', 's', 'A', 'LONG', 0.5, 0.5) RETURNING signal_id
"""
ORDER = """
    INSERT INTO orders (signal_id, symbol, side, order_type, quantity)
    VALUES ($1, 'A', 'buy', 'market', 1) RETURNING order_id
"""
EXECUTION = """
    INSERT INTO executions (time, order_id, symbol, side, quantity, price,
                            broker_exec_id)
    VALUES ($2, $1, 'A', 'buy', 1, 10, 'x')
"""


async def test_inserts_as_the_document_has_them_make_their_keys(
    connection: asyncpg.Connection,
):
    signal = await connection.fetchval(SIGNAL)
    order = await connection.fetchval(ORDER, signal)
    assert await connection.fetchval("SELECT signal_id FROM signal_keys") == signal
    assert await connection.fetchval("SELECT order_id FROM order_keys") == order


@pytest.mark.parametrize("later", ["0 days", "100 days"])
async def test_an_id_stands_for_one_row_whatever_its_time(
    connection: asyncpg.Connection, later: str
):
    await connection.fetchval(SIGNAL)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(
            f"""
            INSERT INTO signals
            SELECT signal_id, time + INTERVAL '{later}', strategy_id, symbol,
                   signal_type, strength, confidence FROM signals
            """
        )


async def test_a_key_that_is_taken_is_refused_in_words_for_the_caller(
    connection: asyncpg.Connection,
):
    signal = await connection.fetchval(SIGNAL)
    with pytest.raises(asyncpg.UniqueViolationError) as raised:
        await connection.execute(
            """
            INSERT INTO signals (signal_id, time, strategy_id, symbol, signal_type,
                                 strength, confidence)
            VALUES ($1, '2025-03-01', 's', 'A', 'LONG', 0.5, 0.5)
            """,
            signal,
        )
    assert str(constraints.refusal(raised.value)) == "signal_id: must be given once"


async def test_a_reference_needs_the_row_it_names(connection: asyncpg.Connection):
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await connection.fetchval(ORDER, uuid.uuid4())


async def test_a_row_that_is_referenced_stays(connection: asyncpg.Connection):
    signal = await connection.fetchval(SIGNAL)
    await connection.fetchval(ORDER, signal)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await connection.execute("DELETE FROM signals")
    await connection.execute("DELETE FROM orders")
    await connection.execute("DELETE FROM signals")
    assert not await connection.fetch("SELECT FROM signal_keys")
    assert not await connection.fetch("SELECT FROM order_keys")


async def test_what_names_a_row_does_not_change(connection: asyncpg.Connection):
    await connection.fetchval(SIGNAL)
    with pytest.raises(asyncpg.PostgresError, match="name the row"):
        await connection.execute("UPDATE signals SET signal_id = gen_random_uuid()")
    await connection.execute("UPDATE signals SET status = 'executed'")


async def test_a_fill_counts_once_per_order(connection: asyncpg.Connection):
    order = await connection.fetchval(ORDER, None)
    times = await connection.fetchrow("SELECT now(), now() - INTERVAL '9 weeks'")
    await connection.execute(EXECUTION, order, times[0])
    with pytest.raises(asyncpg.UniqueViolationError) as raised:
        await connection.execute(EXECUTION, order, times[1])
    assert "broker_exec_id" in str(constraints.refusal(raised.value))


# --- Refused by constraint ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("strength = 1.01", "strength: must be 0 to 1"),
        ("strength = 'NaN'", "strength: must be 0 to 1"),
        ("confidence = -0.01", "confidence: must be 0 to 1"),
        ("status = 'done'", "status: must be ACTIVE, EXECUTED, EXPIRED or CANCELLED"),
    ],
)
async def test_a_constraint_speaks_to_the_caller(
    connection: asyncpg.Connection, changed: str, words: str
):
    await connection.fetchval(SIGNAL)
    with pytest.raises(asyncpg.CheckViolationError) as raised:
        await connection.execute(f"UPDATE signals SET {changed}")
    assert str(constraints.refusal(raised.value)) == words


# --- Plans --------------------------------------------------------------------------


async def test_the_usual_questions_are_answered_by_an_index(
    connection: asyncpg.Connection, edition_now: Edition
):
    await fill(connection)
    order = await connection.fetchrow("SELECT order_id, created_at FROM orders LIMIT 1")
    questions = {
        "SELECT * FROM signals WHERE status = 'active'": "idx_signals_active",
        "SELECT * FROM orders WHERE status IN ('pending', 'open')": "idx_orders_status",
        "SELECT * FROM orders WHERE strategy_id = 's1' ORDER BY created_at DESC"
        " LIMIT 5": "idx_orders_strategy",
    }
    for question, index in questions.items():
        plan = await explain(connection, question)
        assert index in plan and "Seq Scan" not in plan, plan
    by_id = "SELECT * FROM orders WHERE order_id = '{}' AND created_at = '{}'"
    plan = await explain(connection, by_id.format(*order))
    assert "orders_pkey" in plan and "Seq Scan" not in plan
    if edition_now is not Edition.PLAIN:
        assert len(set(re.findall(r"_hyper_\d+_\d+_chunk", plan))) == 1


async def fill(connection: asyncpg.Connection) -> None:
    """Put in signals and orders of some weeks, few of which are active or open."""
    await connection.execute(
        """
        INSERT INTO signals (time, strategy_id, symbol, signal_type, strength,
                             confidence, status)
        SELECT '2024-01-01'::timestamptz + i * INTERVAL '3 minutes', 's' || i % 50, 'A',
               'LONG', 1, 1, CASE WHEN i % 1000 = 0 THEN 'active' ELSE 'expired' END
          FROM generate_series(1, 12000) AS i;
        INSERT INTO orders (created_at, strategy_id, symbol, side, order_type,
                            quantity, status)
        SELECT '2024-01-01'::timestamptz + i * INTERVAL '3 minutes', 's' || i % 50, 'A',
               'buy', 'market', 1, CASE WHEN i % 1000 = 0 THEN 'open' ELSE 'filled' END
          FROM generate_series(1, 12000) AS i;
        ANALYZE signals; ANALYZE orders
        """
    )


async def explain(connection: asyncpg.Connection, query: str) -> str:
    return "\n".join(line for (line,) in await connection.fetch(f"EXPLAIN {query}"))


def plain(definition: str) -> str:
    """Return a definition without what only its spelling differs in."""
    return re.sub(r"[\s()\"]|::text|::double precision", "", definition).lower()
