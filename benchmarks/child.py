"""A process of a benchmark: `python -m benchmarks.child MODULE:FUNCTION ARGUMENTS`.

It runs one coroutine function, which is handed its parent and the arguments (JSON).
The two talk in lines of JSON by standard input and output. The process ends when its
standard input does, however its parent went.
"""

import asyncio
import json
import os
import sys
from importlib import import_module
from typing import Any

import uvloop


class Parent:
    """The benchmark that started this process."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def listen(self) -> None:
        """Take what the parent says; end the process with it."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        async for line in reader:
            self._lines.put_nowait(json.loads(line))
        os._exit(0)

    async def hear(self) -> dict[str, Any]:
        """Return the next thing that the parent says."""
        return await self._lines.get()

    def say(self, **fields: Any) -> None:
        print(json.dumps(fields), flush=True)


async def main(name: str, arguments: str) -> None:
    module, _, function = name.partition(":")
    parent = Parent()
    listening = asyncio.create_task(parent.listen())
    await getattr(import_module(module), function)(parent, **json.loads(arguments))
    await listening  # what was opened stays open until the parent is done


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
