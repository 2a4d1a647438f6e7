"""Passwords: from a terminal that does not show them, or a pipe; never an argument."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from quantplane.cli.running import UNUSABLE, fail

MAX_LINE = 4_096  # characters

StdinOption = Annotated[
    bool,
    typer.Option("--password-stdin", help="Read it from standard input, a line."),
]


def ask(prompt: str, from_stdin: bool, confirm: bool = False) -> str:
    """Return a password."""
    if from_stdin:
        return sys.stdin.readline(MAX_LINE).rstrip("\r\n")
    if not sys.stdin.isatty():
        fail("there is no terminal to ask for a password: --password-stdin", UNUSABLE)
    answer: str = typer.prompt(
        prompt, hide_input=True, err=True, confirmation_prompt=confirm
    )
    return answer


def ask_new(from_stdin: bool) -> str:
    return ask("New password", from_stdin, confirm=True)


@contextmanager
def judging(sentence: str) -> Iterator[None]:
    """Say so where the server does not take a password."""
    import grpc

    from quantplane.errors import reason_of

    try:
        yield
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "UNAUTHENTICATED":
            fail(f"UNAUTHENTICATED: {sentence}")
        raise
