"""Alembic's environment: how a migration reaches its database.

The database is the one `quantplane_server.migrate` names, or that of
QUANTPLANE_POSTGRES_DSN when `alembic` is called by hand.
"""

import asyncio
import os
from logging.config import fileConfig
from pathlib import Path

import asyncpg
from alembic import context
from alembic.operations.ops import MigrationScript
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError, load_python_file
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from quantplane_server.migrate import LOCK


def dsn() -> str:
    dsn: str | None = context.config.attributes.get("dsn")
    dsn = dsn or os.environ.get("QUANTPLANE_POSTGRES_DSN")
    if not dsn:
        raise CommandError("set QUANTPLANE_POSTGRES_DSN to the database to migrate")
    return dsn.replace("postgresql+asyncpg://", "postgresql://", 1)


async def connect() -> asyncpg.Connection:
    # asyncpg reads the DSN itself, because SQLAlchemy's URLs know only some of
    # the forms that the server accepts (sockets, several hosts, passfile).
    return await asyncpg.connect(
        dsn(),
        server_settings={"timezone": "UTC", "application_name": "quantplane migrate"},
    )


async def migrate() -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=connect, poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.run_sync(migrate_alone)
    await engine.dispose()


def migrate_alone(connection: Connection) -> None:
    """Run the command while no other process migrates the same database.

    The lock belongs to the session: it outlives the transaction of each
    migration, and PostgreSQL releases it if this process dies.
    """
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    connection.commit()
    tables = load_python_file(str(Path(__file__).parent), "tables.py")
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=True,
        process_revision_directives=number,
    )
    with context.begin_transaction():
        context.run_migrations()


def number(_: MigrationContext, __: object, directives: list[MigrationScript]) -> None:
    """Name a new revision by the next number, so that their files sort."""
    revisions = ScriptDirectory.from_config(context.config).walk_revisions()
    directives[0].rev_id = f"{len(list(revisions)) + 1:04}"


if context.config.config_file_name:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)
if context.is_offline_mode():
    raise CommandError("migrations look at the database, so --sql cannot write them")
asyncio.run(migrate())
