"""Short ways to run the command and to read what it prints."""

import asyncio
import signal

from typer.testing import CliRunner

from quantplane.cli import app

WAIT_S = 30


async def invoke(target, *arguments, stdin=None):
    """Run the command in this process, which is quicker than a new one."""
    runner = CliRunner(env={"QUANTPLANE_TARGET": target})
    words = [str(argument) for argument in arguments]
    result = await asyncio.to_thread(runner.invoke, app, words, stdin)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


async def lines_of(process, count):
    async with asyncio.timeout(WAIT_S):
        return [(await process.stdout.readline()).decode() for _ in range(count)]


async def interrupt(process):
    """End the command by Ctrl-C; return what it printed on the way."""
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 130
    return out.decode(), err.decode()
