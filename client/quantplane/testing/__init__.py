"""A server and its faults as pytest fixtures, for the tests of a strategy.

Name it in your conftest.py: `pytest_plugins = ["quantplane.testing"]`. The server
needs `pip install "quantplane-server[embedded]"`; see docs/testing.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from importlib.metadata import entry_points
from secrets import token_urlsafe
from typing import TypeVar

import pytest
import pytest_asyncio

from quantplane import Client
from quantplane.credentials import VARIABLE
from quantplane.sync import Loop
from quantplane.testing.faults import FaultInjector

__all__ = ["FaultInjector"]

Entered = TypeVar("Entered")
ServerFactory = Callable[[], AbstractAsyncContextManager[str]]
API_KEY = f"qp_{token_urlsafe(32)}"  # of every client of the test's servers

MISSING = (
    "there is no quantplane server to test against:"
    ' run `pip install "quantplane-server[embedded]"`'
)


@pytest.fixture(scope="session")
def _loop() -> Iterator[Loop]:
    """Servers run in a thread of their own, so tests may block or not."""
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def _new_server(_loop: Loop) -> Iterator[ServerFactory]:
    found = entry_points(group="quantplane.testing", name="server")
    if not found:
        pytest.fail(MISSING, pytrace=False)
    with _entered(_loop, next(iter(found)).load()(API_KEY)) as new_server:
        yield new_server


@pytest.fixture
def quantplane_server(_loop: Loop, _new_server: ServerFactory) -> Iterator[str]:
    """The target of a server that has nothing in it; gone after the test.

    Meanwhile QUANTPLANE_API_KEY is a key with which clients may do everything.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, API_KEY)
        with _entered(_loop, _new_server()) as target:
            yield target


@pytest_asyncio.fixture
async def quantplane_client(quantplane_server: str) -> AsyncIterator[Client]:
    async with Client(quantplane_server) as client:
        yield client


@pytest.fixture
def faults(quantplane_server: str) -> Iterator[FaultInjector]:
    """A proxy in front of the server; its target is `faults.target`."""
    with FaultInjector(quantplane_server) as injector:
        yield injector


@pytest_asyncio.fixture
async def faulty_client(faults: FaultInjector) -> AsyncIterator[Client]:
    """A client whose calls pass through `faults`."""
    async with Client(faults.target) as client:
        yield client


@contextmanager
def _entered(
    loop: Loop, manager: AbstractAsyncContextManager[Entered]
) -> Iterator[Entered]:
    entered = loop.run(manager.__aenter__())
    try:
        yield entered
    finally:
        loop.run(manager.__aexit__(None, None, None))
