"""Some tables instead of all: by COPY, in one transaction, into a migrated database."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from graphlib import TopologicalSorter

from quantplane_server.db import EDITION, Connection, Edition

from . import fingerprint
from .archive import Archive, Writer
from .errors import BackupError
from .manifest import Part, Table, copy_of
from .progress import Progress
from .session import session
from .target import refuse_unfinished

# What a table's rows need beside what they reference.
NEEDS = {
    "signals": "signal_keys",
    "orders": "order_keys",
    "executions": "execution_keys",
    "options_chains": "option_chain_times",
    "event_log": "log_head",
}

# What is computed from a table, and so needs no backup of its own.
COMPUTED = {
    "pending_days": "market_data",
    "aggregated_days": "market_data",
    "market_data_daily": "market_data",
    "daily_bars": "market_data",
}

# Marks the days as the recorder does, and in its order.
RECOMPUTE = {
    "market_data": """
        INSERT INTO pending_days (symbol, day)
        SELECT symbol, time_bucket('1 day', time) AS day FROM market_data
         GROUP BY symbol, day ORDER BY symbol COLLATE "C", day
            ON CONFLICT (symbol, day) DO UPDATE SET version = excluded.version
    """
}

REFERENCES = """
    SELECT conrelid::regclass::text AS child, confrelid::regclass::text AS parent
      FROM pg_constraint
      JOIN pg_class AS c ON c.oid = conrelid
     WHERE contype = 'f' AND conrelid <> confrelid
       AND c.relnamespace = 'public'::regnamespace
"""

COLUMNS = """
    SELECT attname FROM pg_attribute
     WHERE attrelid = $1::text::regclass AND attnum > 0
       AND NOT attisdropped AND attgenerated = ''
     ORDER BY attnum
"""

SEQUENCES = """
    SELECT quote_ident(attname) AS column,
           pg_get_serial_sequence($1, attname) AS sequence
      FROM pg_attribute
     WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped
       AND pg_get_serial_sequence($1, attname) IS NOT NULL
"""


@dataclass
class Selection:
    """Tables of one database."""

    tables: list[str]
    """Those first that others need."""
    carried: list[str]
    """Those that were not named."""


async def selected(
    sources: Mapping[str, tuple[Connection, str]], names: Sequence[str]
) -> dict[str, Selection]:
    """Find the tables, and what they need, in the databases that have them.

    Raises BackupError for what is no table.
    """
    tables = {
        # Without those whose names need quotes or a schema, which are not ours.
        database: [row[0] for row in found if row[0].isidentifier()]
        for database, (connection, _) in sources.items()
        if (found := await connection.fetch(fingerprint.TABLES))
    }
    _check_names(names, [table for found in tables.values() for table in found])
    selections = {}
    for database, (connection, _) in sources.items():
        named = [name for name in dict.fromkeys(names) if name in tables[database]]
        if named:
            selections[database] = await _with_needs(connection, named)
    return selections


def _check_names(names: Sequence[str], tables: list[str]) -> None:
    for name in names:
        if name in COMPUTED:
            raise BackupError(
                f"{name} is computed from the rows of {COMPUTED[name]}",
                f"give --table {COMPUTED[name]}, whose restore brings it along",
            )
        if name not in tables:
            offered = sorted(set(tables) - set(COMPUTED))
            raise BackupError(
                f"there is no table {name}", f"the tables are {', '.join(offered)}"
            )


async def _with_needs(connection: Connection, named: list[str]) -> Selection:
    graph: dict[str, set[str]] = {}
    for child, parent in await connection.fetch(REFERENCES):
        graph.setdefault(child, set()).add(parent)
    for child, parent in NEEDS.items():
        graph.setdefault(child, set()).add(parent)
    wanted = set(named)
    while more := {p for table in wanted for p in graph.get(table, ())} - wanted:
        wanted |= more
    order = [t for t in TopologicalSorter(graph).static_order() if t in wanted]
    order += [table for table in named if table not in order]
    return Selection(order, sorted(wanted - set(named)))


async def dump(
    connection: Connection, selection: Selection, writer: Writer, progress: Progress
) -> Part:
    tables = {}
    for table in selection.tables:
        progress.step(f"copying {table}")
        await _copy(connection, table, writer, progress)
        tables[table] = await fingerprint.content(connection, table)
    return Part(
        revisions=await fingerprint.revisions(connection),
        server_major=connection.get_server_version().major,
        tools_major=0,
        edition=Edition(await connection.fetchval(EDITION)),
        timescaledb=await fingerprint.extension_version(connection),
        roles=[],
        job_owners=[],
        tables=tables,
        carried=selection.carried,
    )


async def _copy(
    connection: Connection, table: str, writer: Writer, progress: Progress
) -> None:
    columns = ", ".join(f'"{name}"' for name in await _columns(connection, table))
    size = 0
    with writer.member(copy_of(table)) as write:

        async def output(data: bytes) -> None:
            nonlocal size
            write(data)
            size += len(data)
            progress.bytes(size)

        await connection.copy_from_query(
            f"SELECT {columns} FROM {table}", output=output, format="binary"
        )


async def load(archive: Archive, dsns: Mapping[str, str], progress: Progress) -> None:
    """Load the tables: all of them and equal to what was written, or none."""
    async with AsyncExitStack() as stack:
        loads = []
        for name, part in archive.manifest.databases.items():
            dsn = dsns.get(name, dsns["timeseries"])
            connection = await stack.enter_async_context(session(dsn))
            await stack.enter_async_context(connection.transaction())
            await _check(connection, part)
            loads.append((connection, part))
        for connection, part in loads:
            for table, wanted in part.tables.items():
                progress.step(f"loading {table}")
                if table in part.carried:
                    await _add_missing(connection, table, archive)
                else:
                    await _fill(connection, table, wanted, archive)
                await _advance_sequences(connection, table)
        # Leaving the block commits.


async def _check(connection: Connection, part: Part) -> None:
    await refuse_unfinished(connection)
    found = await fingerprint.revisions(connection)
    for name, revision in part.revisions.items():
        if not found or found.get(name, revision) != revision:
            raise BackupError(
                f"the backup's {name} schema is at {revision} and the target's at"
                f" {found.get(name, 'nothing')}",
                "run `quantplane-server migrate` if the target is older; else restore"
                " with the server that wrote the backup",
            )
    for table in part.tables:
        if not await connection.fetchval("SELECT to_regclass($1)", table):
            raise BackupError(f"the target has no table {table}")
        await connection.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
        if table not in part.carried and await connection.fetchval(
            f"SELECT EXISTS (SELECT FROM {table})"
        ):
            raise BackupError(
                f"the table {table} has rows, and a restore changes none",
                f"TRUNCATE {table}, or restore into another database",
            )


async def _fill(
    connection: Connection, table: str, wanted: Table, archive: Archive
) -> None:
    await _receive(connection, table, await _columns(connection, table), table, archive)
    if table in RECOMPUTE:
        await connection.execute(RECOMPUTE[table])
    if await fingerprint.content(connection, table) != wanted:
        raise BackupError(f"what was loaded is not what {table} was")


async def _add_missing(connection: Connection, table: str, archive: Archive) -> None:
    """Add the rows that are not there; those that are must be the same."""
    columns = await _columns(connection, table)
    names = ", ".join(f'"{column}"' for column in columns)
    await connection.execute(
        f"CREATE TEMP TABLE carried_rows (LIKE {table}) ON COMMIT DROP"
    )
    await _receive(connection, "carried_rows", columns, table, archive)
    await connection.execute(
        f"INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE"
        f" SELECT {names} FROM carried_rows ON CONFLICT DO NOTHING"
    )
    others = await connection.fetchval(
        f"SELECT count(*) FROM (SELECT {names} FROM carried_rows"
        f" EXCEPT SELECT {names} FROM {table}) AS others"
    )
    if others:
        raise BackupError(
            f"{table} has other values than the backup in {others} rows, which the"
            " tables to restore need"
        )
    await connection.execute("DROP TABLE carried_rows")


async def _receive(
    connection: Connection,
    into: str,
    columns: list[str],
    table: str,
    archive: Archive,
) -> None:
    rows = archive.read(copy_of(table))
    copying = asyncio.create_task(
        connection.copy_to_table(into, source=rows, columns=columns, format="binary")
    )
    # asyncpg would wait for ever for room to send more.
    connection.add_termination_listener(lambda _: copying.cancel())
    try:
        await copying
    except asyncio.CancelledError:
        if connection.is_closed():
            raise ConnectionResetError("the connection was lost") from None
        raise


async def _advance_sequences(connection: Connection, table: str) -> None:
    for column, sequence in await connection.fetch(SEQUENCES, table):
        await connection.execute(
            f"SELECT setval('{sequence}', max({column})) FROM {table}"
            f" HAVING max({column}) > (SELECT last_value FROM {sequence})"
        )


async def _columns(connection: Connection, table: str) -> list[str]:
    return [row[0] for row in await connection.fetch(COLUMNS, table)]
