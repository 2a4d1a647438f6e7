import asyncio
import re
import signal
from pathlib import Path
from urllib.parse import quote

import asyncpg

from . import folder
from .account import Account, unprivileged
from .binaries import postgres_bin
from .errors import EmbeddedError
from .guardian import recorded
from .service import Launch, Service

NAME = "quantplane"  # of the superuser and of the database

# Written into postgresql.conf of a new folder, where an operator may change them.
SETTINGS = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "synchronous_commit": "on",
    "wal_compression": "on",
    "max_wal_size": "1GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class Postgres(Service):
    title = "PostgreSQL"
    name = "postgres"
    stop_signal = signal.SIGINT  # ends sessions and writes a checkpoint

    def __init__(
        self, data_dir: Path | None = None, *, bin_dir: Path | None = None
    ) -> None:
        super().__init__(data_dir)
        self._bin = bin_dir

    @property
    def dsn(self) -> str:
        return self._dsn(NAME)

    @property
    def address(self) -> str:
        return self.dsn

    def _dsn(self, database: str) -> str:
        return f"postgresql://{NAME}@/{database}?host={quote(str(self._sockets))}"

    @property
    def _sockets(self) -> Path:
        return self.scratch / "s"

    async def _prepare(self, lock: int) -> Launch:
        work = asyncio.ensure_future(asyncio.to_thread(self._prepared, lock))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # a thread goes on, and it uses the lock
            raise

    def _prepared(self, lock: int) -> Launch:
        account, bin_dir = unprivileged(
            self._bin or postgres_bin(), [self.data_dir, self.scratch], self.scratch
        )
        data = self.data_dir / self.name
        if not (data / "PG_VERSION").exists():
            self._create(data, account, bin_dir, lock)
        self._check_version(data, account, bin_dir)
        folder.own(data, *account.owner)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        folder.own(self._sockets, *account.owner)
        _clear(data, recorded(lock).get("service", 0))
        return Launch([str(bin_dir / "postgres"), *self._options(data)], account)

    def _options(self, data: Path) -> list[str]:
        settings = {
            "listen_addresses": "",
            "port": "5432",  # only a part of the socket's name
            "unix_socket_directories": str(self._sockets),
            "unix_socket_permissions": "0700",
        }
        if self.ephemeral:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        return ["-D", str(data), *(f"--{k}={v}" for k, v in settings.items())]

    def _create(self, data: Path, account: Account, bin_dir: Path, lock: int) -> None:
        """Make the folder under another name, so that a half made one is never used."""
        new = data.with_name(data.name + ".new")
        folder.remove(new)
        new.mkdir(mode=0o700)
        folder.own(new, *account.owner)
        options = [f"--set={k}={v}" for k, v in SETTINGS.items()]
        if self.ephemeral:
            options.append("--no-sync")
        made = account.run(
            *(bin_dir / "initdb", "-D", new, "-U", NAME, "--auth=trust"),
            *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin"),
            *("--builtin-locale=C.UTF-8", "--no-instructions", *options),
            lock=lock,
        )
        if made.returncode:
            raise self._failure("cannot make its folder", made.stdout + made.stderr)
        folder.move(new, data)

    def _check_version(self, data: Path, account: Account, bin_dir: Path) -> None:
        theirs = (data / "PG_VERSION").read_text().strip()
        told = account.run(bin_dir / "postgres", "--version").stdout
        ours = re.search(r"\) (\d+)", told)
        if ours is None or ours[1] != theirs:
            raise EmbeddedError(
                f"the data folder {self.data_dir} was made by PostgreSQL {theirs} and"
                f" this is {told.strip() or 'unknown'}: restore a backup into"
                " another folder, chosen with --data-dir, with --upgrade"
            )

    async def _answers(self) -> bool:
        try:
            await self._connect_once(NAME)
        except asyncpg.InvalidCatalogNameError:
            await self._connect_once("postgres", f"CREATE DATABASE {NAME}")
        except asyncpg.CannotConnectNowError:
            return False
        except asyncpg.PostgresConnectionError as error:
            raise ConnectionError(str(error)) from error
        return True

    async def _connect_once(self, database: str, statement: str = "SELECT 1") -> None:
        connection = await asyncpg.connect(self._dsn(database), timeout=5)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def _clear(data: Path, last: int) -> None:
    """Remove the pid file of a service that was killed.

    Its number may belong to another process by now, which would keep PostgreSQL
    from starting. The lock tells that our last one is gone; any other pid may be
    of a server that was started by hand, and PostgreSQL decides about it itself.
    """
    pid_file = data / "postmaster.pid"
    if pid_file.exists() and pid_file.read_text().split("\n")[0] == str(last):
        pid_file.unlink()
