"""Alembic's environment: how a migration reaches its databases.

The schema has two parts, time series and reference data, which may live in two
databases or in one. Each has its own record of its revision, and every migration
is told which part it works on. The databases are those that
`quantplane_server.migrate` names, or QUANTPLANE_POSTGRES_DSN and, if there is one,
QUANTPLANE_REFERENCE_DSN when `alembic` is called by hand.
"""

import asyncio
import os
from logging.config import fileConfig
from pathlib import Path
from typing import Any

import asyncpg
from alembic import context
from alembic.operations.ops import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError, load_python_file
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from quantplane_server.db import EDITION, VERSION_TABLES, Edition
from quantplane_server.migrate import LOCK

PARTS: dict[str, MetaData] = load_python_file(
    str(Path(__file__).parent), "tables.py"
).PARTS


def dsns() -> dict[str, str]:
    """Return the DSN of each part."""
    given: dict[str, str] | None = context.config.attributes.get("dsns")
    if given:
        return given
    timeseries = os.environ.get("QUANTPLANE_POSTGRES_DSN")
    if not timeseries:
        raise CommandError("set QUANTPLANE_POSTGRES_DSN to the database to migrate")
    reference = os.environ.get("QUANTPLANE_REFERENCE_DSN") or timeseries
    return {"timeseries": timeseries, "reference": reference}


async def connect(dsn: str) -> asyncpg.Connection:
    # asyncpg reads the DSN itself, because SQLAlchemy's URLs know only some of
    # the forms that the server accepts (sockets, several hosts, passfile).
    return await asyncpg.connect(
        dsn.replace("postgresql+asyncpg://", "postgresql://", 1),
        server_settings={"timezone": "UTC", "application_name": "quantplane migrate"},
    )


async def migrate() -> None:
    for part, dsn in dsns().items():
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda dsn=dsn: connect(dsn),
            poolclass=NullPool,
        )
        async with engine.connect() as connection:
            await connection.run_sync(migrate_alone, part)
        await engine.dispose()


def migrate_alone(connection: Connection, part: str) -> None:
    """Run the command while no other process migrates the same database.

    The lock belongs to the session: it outlives the transaction of each
    migration, and PostgreSQL releases it if this process dies.
    """
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    edition = Edition(connection.scalar(text(EDITION)))
    connection.commit()

    def is_compared(object: Any, name: str | None, type: str, *_: object) -> bool:
        if type != "table":
            return True
        return is_of(part, name) and edition in object.info.get("editions", Edition)

    context.configure(
        connection=connection,
        target_metadata=PARTS[part],
        version_table=VERSION_TABLES[part],
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=True,
        include_object=is_compared,
        upgrade_token=f"{part}_upgrades",
        downgrade_token=f"{part}_downgrades",
        process_revision_directives=number,
    )
    with context.begin_transaction():
        context.run_migrations(part=part)


def is_of(part: str, table: str | None) -> bool:
    """Tell whether a table belongs to a part.

    In a database that holds both, unknown tables count with the time series.
    """
    if table in VERSION_TABLES.values():
        return False
    for name, metadata in PARTS.items():
        if table in metadata.tables:
            return name == part
    return part == "timeseries" or len(set(dsns().values())) > 1


def number(_: MigrationContext, __: object, directives: list[MigrationScript]) -> None:
    """Name a new revision by the next number, so that their files sort."""
    revisions = ScriptDirectory.from_config(context.config).walk_revisions()
    directives[0].rev_id = f"{len(list(revisions)) + 1:04}"


if context.config.config_file_name:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    raise CommandError("migrations look at the database, so --sql cannot write them")
asyncio.run(migrate())
