"""Bring a database's schema to the revision this server was written for."""

import asyncio
import threading
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from .db import Database

# The advisory lock held while a database is migrated: any number, always the same.
LOCK = 0x7175616E74706C61


class SchemaOutdated(Exception):
    """The database's schema is not the one this server was written for."""

    def __init__(self, part: str, found: str | None, needed: str) -> None:
        super().__init__(
            f"the {part} schema is at {found or 'nothing'}, this server needs "
            f"{needed}: run `quantplane-server migrate`"
        )


class RestoreUnfinished(RuntimeError):
    """A backup is being restored into the database, or was so not to the end."""

    def __init__(self) -> None:
        super().__init__(
            "the database holds a part of a backup, since a restore runs or was cut"
            " off: run `quantplane-server restore` again, which empties it first"
        )


async def upgrade(dsn: str, reference_dsn: str | None = None) -> str:
    """Apply what is missing and return the revision reached.

    Without a DSN of their own, the reference data live with the time series. Servers
    that start together may all call this: one works, the others wait.
    """
    dsns = {"timeseries": dsn, "reference": reference_dsn or dsn}
    # Alembic's environment runs an event loop of its own, so it gets a thread.
    await asyncio.to_thread(_upgrade, _config(dsns))
    return head_revision()


@cache
def head_revision() -> str:
    """The revision this server needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def knows(revision: str) -> bool:
    """Whether this server has a migration of that name."""
    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return revision in {script.revision for script in scripts}


async def check_current(database: Database, part: str) -> None:
    """Raise SchemaOutdated unless this part is as this server needs it.

    Raises RestoreUnfinished where the rows may not be whole.
    """
    if await database.is_partial():
        raise RestoreUnfinished
    found, needed = await database.schema_revision(part), head_revision()
    if found != needed:
        raise SchemaOutdated(part, found, needed)


# Alembic keeps the running command in module globals: one at a time per process.
_alembic = threading.Lock()


def _upgrade(config: Config) -> None:
    with _alembic:
        command.upgrade(config, "head")


def _config(dsns: dict[str, str] | None = None) -> Config:
    # Without an ini file env.py leaves the process's logging alone.
    config = Config(attributes={"dsns": dsns})
    config.set_main_option("path_separator", "os")
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    return config


def _scripts() -> Path:
    installed = Path(__file__).parent / "migrations"
    return installed if installed.exists() else Path(__file__).parents[2] / "migrations"
