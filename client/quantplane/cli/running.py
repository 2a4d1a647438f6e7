"""How every command runs: with a server that answers, and errors in words."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    import grpc

    from quantplane.client import Client

# What keeps a connection from being made is told in words of ours.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130  # exit codes
PROBE_S = 5.0


def run(
    target: str | None,
    work: Callable[["Client"], Awaitable[None]],
    known: bool = True,
) -> None:
    """Do `work` with a server that answers; end the process if that fails.

    `known`: as who has logged in there, if anybody has.
    """
    from quantplane.cli.login import resume
    from quantplane.client import Client

    async def connected() -> None:
        async with Client(target) as client:
            await _reach(client)
            if known:
                await resume(client)
            await work(client)

    with in_words(target):
        asyncio.run(connected())
        sys.stdout.flush()


def target_of(target: str | None) -> str:
    """Return where a command goes that says so, or not."""
    from quantplane.client import TARGET

    return target or TARGET


async def _reach(client: "Client") -> None:
    """Raise if no server answers, for a stream would wait for it for ever."""
    import grpc

    from quantplane import v1 as pb

    probe = pb.ListSymbolsRequest(page_size=1)
    try:
        await client.market_data.ListSymbols(
            probe, timeout=PROBE_S, wait_for_ready=False
        )
    except grpc.aio.AioRpcError as error:
        if _is_away(error):
            raise


def _is_away(error: "grpc.aio.AioRpcError") -> bool:
    """Tell an error without a server behind it."""
    import grpc

    from quantplane.errors import reason_of

    away = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return error.code() in away and not reason_of(error)


@contextmanager
def in_words(target: str | None) -> Iterator[None]:
    """Turn what people may meet into one sentence and an exit code."""
    import grpc

    from quantplane.credentials import CredentialProblem
    from quantplane.errors import describe, reason_of
    from quantplane.files import FileProblem
    from quantplane.state import StateProblem
    from quantplane.tls import TlsProblem, explain

    try:
        yield
    except (CredentialProblem, FileProblem, TlsProblem, StateProblem) as problem:
        fail(str(problem), UNUSABLE)
    except grpc.aio.AioRpcError as error:
        if _is_away(error):
            where = target_of(target)
            if why := explain(error):
                fail(f"there is no talking to {where}: {why}")
            fail(
                f"no server answers at {where}; "
                "start one with `quantplane-server up`, or set --target"
            )
        if reason_of(error) == "UNAUTHENTICATED":
            fail(f"UNAUTHENTICATED: {_unknown(target_of(target))}")
        fail(describe(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has what it wants. Python must not flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def _unknown(where: str) -> str:
    """Say what to do where a server does not know who calls."""
    from quantplane.credentials import VARIABLE

    if os.environ.get(VARIABLE):
        return f"the key in {VARIABLE} is not, or no longer, good at {where}"
    return f"{where} does not know you: `quantplane login`, or set {VARIABLE}"


@contextmanager
def hinting(**hints: str) -> Iterator[None]:
    """Add to a server's error what to do about it, by its reason."""
    import grpc

    from quantplane.errors import reason_of

    try:
        yield
    except grpc.aio.AioRpcError as error:
        if hint := hints.get(reason_of(error)):
            error.add_note(hint)
        raise


def fail(sentence: str, code: int = FAILED) -> NoReturn:
    say(f"quantplane: {sentence}")
    raise typer.Exit(code)


def say(line: str) -> None:
    from quantplane.tables import printable

    typer.echo(printable(line), err=True)
