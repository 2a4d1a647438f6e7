"""What a database holds, in a form that can be compared with another's."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable

from quantplane_server.db import EDITION, VERSION_TABLES, Connection, Edition

from .manifest import Part, Table
from .session import undone

# Object ids below are PostgreSQL's own.
FIRST_OID = 16384

# Tables, views and the like of users: none of an extension, and no chunks.
RELATIONS = f"""
    SELECT c.oid, c.oid::regclass::text AS name, c.relkind AS kind, c.relispartition
      FROM pg_class AS c
      JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid >= {FIRST_OID} AND n.nspname !~ '^(_timescaledb_|pg_)'
       AND NOT EXISTS (SELECT FROM pg_depend AS d
                        WHERE d.classid = 'pg_class'::regclass
                          AND d.objid = c.oid AND d.deptype = 'e')
"""

TABLES = f"""
    SELECT name FROM ({RELATIONS}) AS own
     WHERE kind IN ('r', 'p') AND NOT relispartition
     ORDER BY name COLLATE "C"
"""

# A row counts by its text, which is exact under the session's settings. A sum needs
# no order, and unlike an exclusive or it tells one row from three of the same.
CONTENT = """
    SELECT count(*), coalesce(sum(hashtextextended("every row"::text, 0)), 0)::text
      FROM {table} AS "every row"
"""

# What an aggregate computes from newer rows may differ in the last bit of a sum, so
# its rows are counted as a query sees them, and those that are stored are summed.
AGGREGATES = """
    SELECT format('%I.%I', view_schema, view_name)::regclass::text AS name,
           format('%I.%I', materialization_hypertable_schema,
                  materialization_hypertable_name) AS stored
      FROM timescaledb_information.continuous_aggregates
     ORDER BY 1
"""

# Expressions are left out where a server may write the same one in another way.
CATALOG = f"""
    WITH own AS MATERIALIZED ({RELATIONS}),
    chunks AS MATERIALIZED (
        SELECT c.oid, c.oid::regclass::text AS name
          FROM pg_class AS c
          JOIN pg_namespace AS n ON n.oid = c.relnamespace
         WHERE n.nspname = '_timescaledb_internal' AND c.relkind = 'r'
    )
    SELECT 'columns' AS kind,
           format('%s.%s %s%s%s', name, attname, format_type(atttypid, atttypmod),
                  CASE WHEN attnotnull THEN ' not null' END,
                  ' default ' || pg_get_expr(adbin, adrelid)) AS line
      FROM own
      JOIN pg_attribute ON attrelid = own.oid AND attnum > 0 AND NOT attisdropped
      LEFT JOIN pg_attrdef ON adrelid = own.oid AND adnum = attnum
     WHERE own.kind IN ('r', 'p', 'v', 'm', 'f')
     UNION ALL
    SELECT 'constraints',
           format('%s on %s: %s', conname, name,
                  CASE contype WHEN 'c' THEN 'CHECK'
                               ELSE pg_get_constraintdef(c.oid) END)
      FROM own JOIN pg_constraint AS c ON conrelid = own.oid
     WHERE contype IN ('p', 'u', 'f', 'c', 'x')
     UNION ALL
    SELECT 'indexes', split_part(pg_get_indexdef(indexrelid), ' WHERE ', 1)
      FROM own JOIN pg_index ON indrelid = own.oid
     UNION ALL
    SELECT 'triggers', format('%s on %s: %s', tgname, name, tgfoid::regproc)
      FROM own JOIN pg_trigger ON tgrelid = own.oid
     WHERE NOT tgisinternal
     UNION ALL
    SELECT 'views', name FROM own WHERE own.kind IN ('v', 'm')
     UNION ALL
    SELECT 'routines', p.oid::regprocedure::text
      FROM pg_proc AS p
     WHERE p.oid >= {FIRST_OID}
       AND NOT EXISTS (SELECT FROM pg_depend AS d
                        WHERE d.classid = 'pg_proc'::regclass
                          AND d.objid = p.oid AND d.deptype = 'e')
     UNION ALL
    SELECT 'chunk constraints',
           format('%s: %s', count(*), md5(string_agg(
               format('%s %s %s', name, conname, contype), ','
               ORDER BY name COLLATE "C", conname COLLATE "C")))
      FROM chunks JOIN pg_constraint ON conrelid = chunks.oid
     WHERE contype IN ('p', 'u', 'f', 'c', 'x')
    HAVING count(*) > 0
     UNION ALL
    SELECT 'chunk indexes',
           format('%s: %s', count(*), md5(string_agg(
               indexrelid::regclass::text, ',' ORDER BY
               indexrelid::regclass::text COLLATE "C")))
      FROM chunks JOIN pg_index ON indrelid = chunks.oid
    HAVING count(*) > 0
     ORDER BY kind, line
"""

TIMESCALE_CATALOG = """
    SELECT 'hypertables' AS kind,
           format('%s by %s, %s: %s chunks, %s compressed', hypertable_name,
                  column_name, coalesce(time_interval::text, num_partitions::text),
                  num_chunks,
                  (SELECT count(*) FROM timescaledb_information.chunks AS c
                    WHERE c.hypertable_schema = h.hypertable_schema
                      AND c.hypertable_name = h.hypertable_name AND c.is_compressed)
                 ) AS line
      FROM timescaledb_information.hypertables AS h
      JOIN timescaledb_information.dimensions
           USING (hypertable_schema, hypertable_name)
     UNION ALL
    SELECT 'compression',
           format('%s.%s, segment %s, order %s %s', hypertable_name, attname,
                  segmentby_column_index, orderby_column_index, orderby_asc)
      FROM timescaledb_information.compression_settings
     UNION ALL
    SELECT 'aggregates',
           format('%s%s', view_name,
                  CASE WHEN materialized_only THEN ', stored rows only' END)
      FROM timescaledb_information.continuous_aggregates
     UNION ALL
    SELECT 'policies',
           format('%s on %s: %s, every %s%s', proc_name, hypertable_name, config,
                  schedule_interval, CASE WHEN NOT scheduled THEN ', paused' END)
      FROM timescaledb_information.jobs
     WHERE job_id >= 1000  -- those below are TimescaleDB's own
     ORDER BY kind, line
"""

# The bootstrap superuser is in no dependency.
ROLES = f"""
    SELECT refobjid::regrole::text FROM pg_shdepend
     WHERE refclassid = 'pg_authid'::regclass
       AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
     UNION
    SELECT relowner::regrole::text
      FROM pg_class JOIN ({RELATIONS}) AS own USING (oid)
     ORDER BY 1
"""


JOB_OWNERS = """
    SELECT DISTINCT owner::text FROM timescaledb_information.jobs
     WHERE job_id >= 1000 ORDER BY 1
"""


async def describe(
    connection: Connection, tools_major: int, progress: Callable[[str], None]
) -> Part:
    """Describe the database, reading all of it; tells each table's name."""
    version = await extension_version(connection)
    return Part(
        revisions=await revisions(connection),
        server_major=connection.get_server_version().major,
        tools_major=tools_major,
        edition=Edition(await connection.fetchval(EDITION)),
        timescaledb=version,
        roles=[row[0] for row in await connection.fetch(ROLES)],
        job_owners=[row[0] for row in await connection.fetch(JOB_OWNERS)]
        if version
        else [],
        tables={
            name: table async for name, table in contents(connection, version, progress)
        },
        catalog=await catalog(connection, version),
    )


async def revisions(connection: Connection) -> dict[str, str]:
    """Return the revision of each part of the schema that is in this database."""
    found = {}
    for part, table in VERSION_TABLES.items():
        if await connection.fetchval("SELECT to_regclass($1)", table):
            revision = await connection.fetchval(f"SELECT version_num FROM {table}")
            if revision:
                found[part] = str(revision)
    return found


async def extension_version(connection: Connection) -> str | None:
    version: str | None = await connection.fetchval(
        "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
    )
    return version


async def contents(
    connection: Connection, timescaledb: str | None, progress: Callable[[str], None]
) -> AsyncIterator[tuple[str, Table]]:
    for row in await connection.fetch(TABLES):
        progress(row["name"])
        yield row["name"], await content(connection, row["name"])
    for row in await connection.fetch(AGGREGATES) if timescaledb else ():
        progress(row["name"])
        queried = await content(connection, row["name"])
        stored = await content(connection, row["stored"])
        yield row["name"], Table(rows=queried.rows, checksum=stored.checksum)


async def content(connection: Connection, table: str) -> Table:
    """Count and sum the rows of a table, whose name is as SQL writes it."""
    async with undone(connection):
        rows, checksum = await connection.fetchrow(CONTENT.format(table=table))
    return Table(rows=rows, checksum=checksum)


async def catalog(
    connection: Connection, timescaledb: str | None
) -> dict[str, list[str]]:
    lines = defaultdict(list)
    for row in await connection.fetch(CATALOG):
        lines[row["kind"]].append(row["line"])
    for row in await connection.fetch(TIMESCALE_CATALOG) if timescaledb else ():
        lines[row["kind"]].append(row["line"])
    return dict(lines)
