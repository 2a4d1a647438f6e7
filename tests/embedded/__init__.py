"""Helpers: a server process that can be killed, and what it leaves behind."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]

# Runs services, then writes the next number to both and says so, until stopped.
SERVER = """
import asyncio, itertools, json, signal, sys
from pathlib import Path
import asyncpg
from quantplane_server.embedded import services

async def main(folder):
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    async with services(Path(folder) if folder else None) as s:
        pids = [s.postgres.pid, s.valkey.pid]
        print(json.dumps([pids, s.postgres_dsn, s.redis_url]), flush=True)
        sql = await asyncpg.connect(s.postgres_dsn)
        await sql.execute("CREATE TABLE IF NOT EXISTS written (n int)")
        socket = s.redis_url.removeprefix("unix://")
        reader, writer = await asyncio.open_unix_connection(socket)
        left = 200  # to write after an interruption
        for n in itertools.count():
            left -= interrupted.is_set()
            await sql.execute("INSERT INTO written VALUES ($1)", n)
            writer.write(b"SET written %d\\r\\n" % n)
            assert await reader.readline() == b"+OK\\r\\n"
            print(n, flush=True)
            if not left:
                break
        await sql.close()
        writer.close()

asyncio.run(main(sys.argv[1]))
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    services: list[psutil.Process]
    guardians: list[psutil.Process]
    dsn: str
    url: str

    last: int = -1

    def acknowledged(self) -> int:
        self.last = int(self.process.stdout.readline())
        return self.last

    def last_acknowledged(self) -> int:
        """The last number that a server which is at its end has told."""
        told = self.process.stdout.read().split()
        return int(told[-1]) if told else self.last

    def folders(self) -> list[Path]:
        """The folders of the sockets, or of everything when ephemeral."""
        sockets = self.dsn.partition("host=")[2], self.url.removeprefix("unix://")
        return [Path(socket).parent for socket in sockets]

    def everything(self) -> list[psutil.Process]:
        inside = [p for s in self.services for p in s.children(recursive=True)]
        return [*self.services, *self.guardians, *inside]


@contextmanager
def server(
    folder: Path | None, user: int | None = None, python: str = sys.executable
) -> Iterator[Server]:
    paths = [str(REPOSITORY / "server"), *(p for p in sys.path if "-packages" in p)]
    process = subprocess.Popen(
        [python, "-c", SERVER, str(folder or "")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    with process:
        try:
            pids, dsn, url = json.loads(process.stdout.readline())
            services = [psutil.Process(pid) for pid in pids]
            guardians = [s.parent() for s in services]
            yield Server(process, services, guardians, dsn, url)
        finally:
            process.kill()


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all end within ten seconds; one that waits to be reaped has ended."""
    deadline = time.monotonic() + 10
    while any(_runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        with suppress(ConnectionError):  # its server was killed
            await connection.close()


async def valkey(url: str, command: str) -> str:
    """The first line that Valkey answers to an inline command, and a value's text."""
    path = url.removeprefix("unix://")
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"{command}\r\n".encode())
        line = (await reader.readline()).decode().strip()
        if line == "$-1":
            return ""
        return (await reader.readline()).decode().strip() if line[0] == "$" else line
    finally:
        writer.close()
        await writer.wait_closed()
