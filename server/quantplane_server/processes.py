"""Processes of this program: restarted when they die, gone when their parent is."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from quantplane.credentials import VARIABLE as API_KEY
from quantplane_server.config import Settings

logger = logging.getLogger(__name__)

RESTART_S = 0.5
STOP_S = 15.0

READY = "quantplane ready on "  # the line a process prints once it serves


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
        self._ready = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep it running while the block runs, from when it has said that it is ready.

        Raises RuntimeError if it ends before that.
        """
        watch = asyncio.create_task(self._watch())
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait((watch, ready), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            yield
        finally:
            ready.cancel()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _watch(self) -> None:
        while True:
            code = await self._run_once()
            name = " ".join(self._args)
            if not self._ready.is_set():
                raise RuntimeError(f"`{name}` ended with exit code {code}")
            logger.error("`%s` ended with exit code %s; restarting it", name, code)
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
        try:
            async for line in process.stdout:
                if line.startswith(READY.encode()):
                    self._ready.set()
            return await process.wait()
        finally:
            process.stdin.close()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
