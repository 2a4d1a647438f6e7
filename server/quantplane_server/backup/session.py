"""Sessions whose settings make values the same text on every server."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import asyncpg

from quantplane_server.db import UNAVAILABLE, Connection

from .errors import BackupError

PROGRAM = "quantplane pg_restore"  # or pg_dump: the name that their sessions have

PINNED = {
    "application_name": "quantplane backup",
    "search_path": "public",
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of its own, since it holds locks and snapshots for long."""
    connection = await asyncpg.connect(dsn, server_settings=PINNED)
    try:
        yield connection
    finally:
        connection.terminate()  # also when it is lost, or in a failed transaction


@contextmanager
def explained(who: str) -> Iterator[None]:
    """Make what `who`, a database, says a BackupError."""
    try:
        yield
    except (*UNAVAILABLE, asyncpg.InterfaceError) as error:
        raise BackupError(f"{who} can't be reached: {error}") from error
    except asyncpg.PostgresError as error:
        raise BackupError(f"{who} refused: {error}", error.hint or "") from error


@asynccontextmanager
async def undone(connection: Connection) -> AsyncIterator[None]:
    """Undo the block at its end, which also gives back the locks that it took."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


@contextmanager
def libpq(dsn: str) -> Iterator[str]:
    """Yield the URI for PostgreSQL's own programs, the password not in it.

    The arguments of a process are there for all to see, so the password goes into a
    file, which lasts as long as the block.
    """
    parts = urlsplit(dsn)
    user, at, hosts = parts.netloc.rpartition("@")
    user, _, password = user.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    password = options.pop("password", "") or unquote(password)
    options["application_name"] = PROGRAM
    with tempfile.TemporaryDirectory(prefix="quantplane-") as folder:
        if password:
            file = Path(folder, "pgpass")
            file.touch(0o600)
            escaped = password.replace("\\", "\\\\").replace(":", "\\:")
            file.write_text(f"*:*:*:*:{escaped}\n")
            options["passfile"] = str(file)
        query = urlencode(options, quote_via=quote)
        yield f"postgresql://{user}{at}{hosts}{parts.path}?{query}"
