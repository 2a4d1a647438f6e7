"""Helpers: a database with rows in every table, and what can be told of one."""

import asyncio
import json
import math
import os
import re
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import asyncpg
from alembic.util import load_python_file
from sqlalchemy import Column, Table

from quantplane_server import backup as backups
from quantplane_server.db import EDITION, Edition
from quantplane_server.embedded.binaries import postgres_bin

COMMAND = Path(sys.executable).with_name("quantplane-server")
MIGRATIONS = Path(__file__).parents[2] / "migrations"
PARTS = load_python_file(str(MIGRATIONS), "tables.py").PARTS
TABLES: list[Table] = [t for part in PARTS.values() for t in part.sorted_tables]
KEYS = ("signal_keys", "order_keys", "execution_keys")  # or triggers fill them
TABLES.sort(key=lambda table: table.name not in KEYS)

ROWS = 40
BEGIN = datetime(2026, 1, 1, 3, 7, 0, 123456, UTC)
STEP = timedelta(hours=13)  # through four chunks of a week
COMPRESSED_UNTIL = BEGIN + timedelta(days=12)

TEXTS = ["plain", "", 'it\'s "quoted"', "tab\tline\nback\\slash", "\\N", "Ünï💹"]

# Values by type, a different one for each row where they may be keys.
VALUES: dict[str, Callable[[str, int], Any]] = {
    "TIMESTAMP": lambda name, i: BEGIN + i * STEP,
    "Date": lambda name, i: date(2030, 1, 1) + timedelta(days=i),
    "Interval": lambda name, i: timedelta(days=i, seconds=1),
    "Text": lambda name, i: f"{name} {i} {TEXTS[i % len(TEXTS)]}",
    "Double": lambda name, i: (i + 1) / 3,
    "Numeric": lambda name, i: Decimal(i + 1) / 1000,
    "SmallInteger": lambda name, i: i,
    "Integer": lambda name, i: 1000 + i,
    "BigInteger": lambda name, i: 2**40 + i,
    "Boolean": lambda name, i: True,
    "UUID": lambda name, i: uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {i}"),
    "JSONB": lambda name, i: json.dumps({name: [i, None, 1 / 3]}),
    "LargeBinary": lambda name, i: bytes(range(256)) + name.encode() + bytes([i]),
    "INET": lambda name, i: f"10.0.0.{i}",
    "ARRAY": lambda name, i: [name, str(i), TEXTS[i % len(TEXTS)]],
}

# Values for columns that have rules, by table.
RULED: dict[str, dict[str, Callable[[int], Any]]] = {
    "market_data": {
        "symbol": lambda i: f"S{i % 3}",
        "vwap": lambda i: math.nan if i == 7 else -0.0,
        "volume": lambda i: i,
    },
    "options_chains": {"option_type": lambda i: ["call", "put"][i % 2]},
    "heston_parameters": {"rho": lambda i: -0.5},
    "sabr_parameters": {"rho": lambda i: -0.5, "beta": lambda i: 0.5},
    "ou_parameters": {"half_life": lambda i: math.log(2) / ((i + 1) / 3)},
    "signals": {
        "signal_type": lambda i: "LONG",
        "strength": lambda i: 1 / (i + 1),
        "confidence": lambda i: 1 / (i + 1),
        "status": lambda i: "active",
    },
    "orders": {
        "side": lambda i: "buy",
        "order_type": lambda i: "limit",
        "time_in_force": lambda i: "gtc",
        "status": lambda i: "open",
        "pending_request": lambda i: "cancel",
    },
    "executions": {"side": lambda i: "sell"},
}


async def populate(dsn: str) -> None:
    """Fill every table; on Community, compress and aggregate a part."""
    async with connected(dsn) as connection:
        edition = Edition(await connection.fetchval(EDITION))
        for table in TABLES:
            if table.name == "identity_version":
                continue  # it has its one row
            if edition in table.info.get("editions", Edition):
                columns = list(table.columns)
                await connection.copy_records_to_table(
                    table.name,
                    columns=[column.name for column in columns],
                    records=[row(table.name, columns, i) for i in range(ROWS)],
                )
        if edition is Edition.COMMUNITY:
            await compress_and_aggregate(connection)
        await connection.execute("ANALYZE")


def row(table: str, columns: list[Column[Any]], i: int) -> list[Any]:
    return [value(table, column, i) for column in columns]


def value(table: str, column: Column[Any], i: int) -> Any:
    if column.nullable and i % 5 == 4:
        return None
    if rule := RULED.get(table, {}).get(column.name):
        return rule(i)
    return VALUES[type(column.type).__name__](column.name, i)


async def compress_and_aggregate(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "SELECT compress_chunk(c) FROM show_chunks('market_data',"
        f" older_than => '{COMPRESSED_UNTIL}'::timestamptz) AS c"
    )
    await connection.execute(
        f"CALL refresh_continuous_aggregate('market_data_daily', NULL,"
        f" '{COMPRESSED_UNTIL}')"
    )
    # Into a compressed chunk, and onto a day that is aggregated.
    await connection.execute(
        "INSERT INTO market_data (time, symbol, close) VALUES ($1, 'late', 1)",
        BEGIN + timedelta(minutes=1),
    )


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn, server_settings={"timezone": "UTC"})
    try:
        yield connection
    finally:
        with suppress(ConnectionError):  # its server was killed
            await connection.close()


# --- What a database holds, told without the product's own means -------------------

TIMESCALE_VIEWS = (
    *("hypertables", "dimensions", "chunks", "jobs", "continuous_aggregates"),
    *("compression_settings", "hypertable_compression_settings"),
)


# What is another in every dump: a key, and the number that PostgreSQL 17.12 gives each
# column's definition, which a pg_dump that does not know of it takes for a setting.
OWN = re.compile(r"\\(un)?restrict |ALTER TABLE .* SET \(pg_attver=\d+\);$")


async def definitions(dsn: str) -> list[str]:
    """Everything that is defined in it, as pg_dump writes it."""
    dump = await asyncio.create_subprocess_exec(
        *(postgres_bin() / "pg_dump", "--schema-only", "--dbname", dsn),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await dump.communicate()
    assert dump.returncode == 0, err.decode()
    return [line for line in out.decode().splitlines() if not OWN.match(line)]


async def rows(dsn: str, table: str) -> list[str]:
    async with connected(dsn) as connection:
        return [
            row[0]
            for row in await connection.fetch(
                f'SELECT t::text FROM {table} AS t ORDER BY t::text COLLATE "C"'
            )
        ]


async def holdings(dsn: str) -> dict[str, list[str]]:
    """The rows of every table, and what TimescaleDB says of itself."""
    async with connected(dsn) as connection:
        edition = Edition(await connection.fetchval(EDITION))
        found = await connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        )
    names = [row[0] for row in found]
    if edition is not Edition.PLAIN:
        names += [f"timescaledb_information.{view}" for view in TIMESCALE_VIEWS]
    if edition is Edition.COMMUNITY:
        names += ["market_data_daily", "_timescaledb_catalog.continuous_agg"]
        names += ["_timescaledb_catalog.continuous_aggs_watermark"]
    return {name: await rows(dsn, name) for name in names}


async def leftovers(dsn: str) -> list[str]:
    """What a database has that a new one has not."""
    catalogs = ("class", "proc", "type", "namespace", "operator", "collation")
    catalogs += ("ts_config", "event_trigger", "publication", "largeobject_metadata")
    queries = [
        f"""
        SELECT 'pg_{catalog} ' || o.oid FROM pg_{catalog} AS o
         WHERE o.oid >= 16384 AND NOT EXISTS (
               SELECT FROM pg_depend WHERE objid = o.oid AND deptype IN ('e', 'i'))
           AND NOT EXISTS (
               SELECT FROM pg_class WHERE oid = o.oid AND relkind IN ('i', 't'))
        """
        for catalog in catalogs
    ]
    queries += [
        "SELECT 'extension ' || extname FROM pg_extension WHERE extname <> 'plpgsql'",
        "SELECT 'settings ' || setconfig::text FROM pg_db_role_setting"
        " JOIN pg_database AS d ON d.oid = setdatabase"
        " WHERE datname = current_database()",
    ]
    async with connected(dsn) as connection:
        found = await connection.fetch(" UNION ALL ".join(queries))
    return [row[0] for row in found]


# --- Doing it ----------------------------------------------------------------------


async def backup(dsn: str | Mapping[str, str], path: Path, *tables: str) -> Path:
    dsns = {"timeseries": dsn} if isinstance(dsn, str) else dsn
    with backups.Progress() as progress:
        await backups.backup(dsns, path, tables, progress)
    return path


async def restore(path: Path, dsn: str | Mapping[str, str], **terms: bool) -> None:
    dsns = {"timeseries": dsn} if isinstance(dsn, str) else dsn
    with backups.Progress() as progress:
        await backups.restore(dsns, path, backups.Terms(**terms), progress)


async def run(*args: str | Path, **environment: str) -> tuple[int | None, str, str]:
    """Run the command; return its exit code and what it said."""
    process = await started(*args, **environment)
    out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()


async def started(
    *args: str | Path, limit: Callable[[], None] | None = None, **environment: str
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(COMMAND, *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
        preexec_fn=limit,
        start_new_session=True,  # a group of its own, as a shell makes
    )


def rewritten(
    path: Path, target: Path, change: Callable[[str, bytes], bytes | None]
) -> Path:
    """Copy a backup with other members, whose checksums are right."""
    with ZipFile(path) as old, ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def with_manifest(path: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """Copy a backup with another manifest."""

    def patch(name: str, data: bytes) -> bytes:
        if name != "manifest.json":
            return data
        manifest = json.loads(data)
        change(manifest)
        return json.dumps(manifest).encode()

    return rewritten(path, target, patch)
