"""Processes of this program: restarted when they die, gone when their parent is."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from quantplane.credentials import VARIABLE as API_KEY
from quantplane_server.config import Settings

logger = logging.getLogger(__name__)

RESTART_S = 0.5
STOP_S = 15.0  # beyond the grace, for what a child closes after its calls

READY = "quantplane ready on "  # the line a process prints once it serves

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_children: set[asyncio.subprocess.Process] = set()  # that run


def told_to_stop(is_child: bool) -> asyncio.Event:
    """Return what is set when this process is told to stop.

    A signal tells it; a second one ends it at once, and its children. A child is told
    by the end of its standard input alone, so that a signal to all processes leaves the
    order of stopping to the parent.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def at_signal(number: signal.Signals) -> None:
        if stopped.is_set():
            _end_at_once(number)
        stopped.set()

    def at_eof() -> None:
        loop.remove_reader(sys.stdin)
        stopped.set()

    for number in SIGNALS:
        if is_child:
            signal.signal(number, signal.SIG_IGN)
        else:
            loop.add_signal_handler(number, at_signal, number)
    if is_child:
        loop.add_reader(sys.stdin, at_eof)
    return stopped


def _end_at_once(number: signal.Signals) -> None:
    """Take nothing along: what others rely on outlives a process that is killed."""
    logger.warning("%s again: ending at once", number.name)
    for process in _children:
        process.kill()
    os._exit(128 + number)


class Child:
    """Runs `python -m quantplane_server ARGS`, whose standard input is a lifeline.

    The child stops when its standard input ends, which the kernel sees to however
    this process goes. It has a session of its own, so that Ctrl-C reaches only the
    parent and the order of stopping is the parent's.

    A child that is a client has a key of its own, and never the one of this process.
    It is told in the environment: arguments are for everybody to read.
    """

    def __init__(
        self, *args: str, settings: Settings, api_key: str | None = None
    ) -> None:
        self._args = args
        self._environment = {**os.environ, **settings.environment()}
        self._environment.pop(API_KEY, None)
        if api_key:
            self._environment[API_KEY] = api_key
        self._stop_s = settings.grace_s + STOP_S
        self._is_ready = asyncio.Event()
        self._failure: RuntimeError | None = None

    async def ready(self) -> None:
        """Return once it has said that it is. Raises RuntimeError if it ends before."""
        await self._is_ready.wait()
        if self._failure:
            raise self._failure

    async def keep(self) -> None:
        """Run it, again if it ends, until cancelled; not again if it was never ready.

        When this is cancelled, it is told to stop, and this returns once it has.
        """
        name = " ".join(self._args)
        while True:
            try:
                end = f"ended with exit code {await self._run_once()}"
            except OSError as error:
                end = f"can't be started: {error}"
            if not self._is_ready.is_set():
                self._failure = RuntimeError(f"`{name}` {end}")
                self._is_ready.set()
                return
            logger.error("`%s` %s; restarting it", name, end)
            await asyncio.sleep(RESTART_S)

    async def _run_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quantplane_server", *self._args, "--until-eof"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=self._environment,
        )
        assert process.stdin and process.stdout
        _children.add(process)
        try:
            async for line in process.stdout:
                if line.startswith(READY.encode()):
                    self._is_ready.set()
            return await process.wait()
        finally:
            process.stdin.close()
            if not self._is_ready.is_set() and process.returncode is None:
                process.kill()  # it has begun nothing that it could finish
            try:
                async with asyncio.timeout(self._stop_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
            _children.discard(process)


@asynccontextmanager
async def running(*children: Child) -> AsyncIterator[None]:
    """Keep processes running while the block runs; at its end they stop together."""
    keeping = [asyncio.create_task(child.keep()) for child in children]
    try:
        yield
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
