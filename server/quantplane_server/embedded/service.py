import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from . import folder, guardian
from .account import Account, nobody
from .errors import EmbeddedError

logger = logging.getLogger(__name__)

START_S = 30.0  # without an answer
RECOVERY_S = 600.0  # while it answers that it still reads its log
POLL_S = 0.01


@dataclass
class Launch:
    command: list[str]
    account: Account = field(default_factory=Account)


class Service:
    """One service in a data folder, or in a folder of its own that goes with it.

    In the data folder it has a folder, a log and a lock that carry its name. Its
    address does not change until `close`. Not bound to an event loop.
    """

    title: ClassVar[str]
    name: ClassVar[str]
    stop_signal: ClassVar[int]

    def __init__(self, data_dir: Path | None = None) -> None:
        self._given = data_dir.resolve() if data_dir else None
        self._scratch: Path | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def ephemeral(self) -> bool:
        return self._given is None

    @property
    def data_dir(self) -> Path:
        return self._given or self.scratch

    @property
    def scratch(self) -> Path:
        if self._scratch is None:
            self._scratch = folder.scratch()
        return self._scratch

    @property
    def log(self) -> Path:
        return self.data_dir / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self._guardian is not None and self._guardian.poll() is None

    @property
    def pid(self) -> int:
        """The service's own process. Raises `EmbeddedError` unless it runs."""
        if not self.running:
            raise EmbeddedError(f"{self.title} is not running")
        return self._pid

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start, also after `stop` or `kill`, and return when it takes commands."""
        if self.running:
            return
        began = time.monotonic()
        try:
            await self._start()
        except OSError as error:
            raise EmbeddedError(
                f"cannot use the data folder {self.data_dir}: {error}"
            ) from error
        logger.info("%s is ready (%.2f s)", self.title, time.monotonic() - began)

    async def stop(self) -> None:
        """Stop with everything written, or by force after `guardian.STOP_S`."""
        await self._end(b"s")

    async def kill(self) -> None:
        """Send SIGKILL, as the kernel would when memory is short."""
        await self._end(b"k")

    async def close(self) -> None:
        """Stop, and remove what was only there for the time of running."""
        try:
            await self.stop()
        finally:
            if self._scratch is not None:
                folder.remove(self._scratch)
                self._scratch = None

    @property
    def address(self) -> str:
        raise NotImplementedError

    async def _prepare(self, lock: int) -> Launch:
        """Make the folder ready. Nobody else uses it while `lock` is open."""
        raise NotImplementedError

    async def _answers(self) -> bool:
        """Whether it takes commands; False is "soon". Raises OSError if silent."""
        raise NotImplementedError

    async def _start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._check_owner(self.data_dir / self.name)
        lock = await folder.lock(self.data_dir / f"{self.name}.lock")
        try:
            launch = await self._prepare(lock)
            folder.claim(lock, self.address)
            self._guardian = self._spawn(launch, lock)
        except BaseException:
            os.close(lock)
            raise
        try:
            await self._until_ready(self._guardian, lock)
        except BaseException:
            await self.kill()
            raise
        finally:
            os.close(lock)

    def _check_owner(self, path: Path) -> None:
        ours = {os.geteuid()}
        if os.geteuid() == 0:
            ours.add(nobody()[0])
        if path.exists() and path.stat().st_uid not in ours:
            raise EmbeddedError(
                f"the data folder {self.data_dir} belongs to user {path.owner()};"
                " start as that user or choose another with --data-dir"
            )

    def _spawn(self, launch: Launch, lock: int) -> subprocess.Popen[bytes]:
        plan: guardian.Plan = {
            "command": [*launch.account.prefix, *launch.command],
            "uid": launch.account.uid,
            "gid": launch.account.gid,
            "stop_signal": self.stop_signal,
            "log": str(self.log),
            "lock": lock,
            "scratch": str(self.scratch),
        }
        # The server's own PG* settings are for other servers than this one.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        with open(self.log, "ab", opener=folder.private) as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, json.dumps(plan)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                pass_fds=[lock],
                # Ctrl-C in a terminal reaches the server's group; this is another.
                start_new_session=True,
            )

    async def _until_ready(self, process: subprocess.Popen[bytes], lock: int) -> None:
        began = heard = time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(OSError):
                self._pid = guardian.recorded(lock).get("service", 0)
                if await self._answers() and self._pid:
                    return
                heard = time.monotonic()
            if time.monotonic() > min(heard + START_S, began + RECOVERY_S):
                break
            await asyncio.sleep(POLL_S)
        raise self._failure("did not start", self.log.read_text(errors="replace"))

    def _failure(self, what: str, output: str) -> EmbeddedError:
        last = "\n".join(output.splitlines()[-8:])
        return EmbeddedError(f"{self.title} {what}; it said last:\n{last}")

    async def _end(self, command: bytes) -> None:
        process = self._guardian
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(command)
        late = time.monotonic() + guardian.STOP_S + 5
        while process.poll() is None:
            if time.monotonic() > late:
                process.kill()
            await asyncio.sleep(POLL_S)
        process.stdin.close()
        self._guardian = None
        logger.info("%s is down", self.title)
