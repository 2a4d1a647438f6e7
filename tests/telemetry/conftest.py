"""Traced servers for tests."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from tests.telemetry.receiver import Receiver, receiving
from tests.telemetry.tracing import strategy, traced

SECOND = 0.2  # stands for the seconds between two spans of a stream


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    """A collector of what this process does as a server."""
    async with receiving() as receiver, traced(monkeypatch, receiver.endpoint):
        yield receiver


@pytest.fixture
async def target(receiver: Receiver, settings: Settings) -> AsyncIterator[str]:
    """A traced server."""
    settings = settings.model_copy(update={"trace_stream_s": SECOND})
    async with recording(settings), serving(settings) as target:
        yield target


@pytest.fixture
async def client(target: str) -> AsyncIterator[Client]:
    """A client of it; its own calls are traced with `tracer`."""
    async with Client(target) as client:
        yield client


@pytest.fixture
async def tracer(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> AsyncIterator[Any]:
    """The tracer of an application, which the client uses too."""
    async with strategy(monkeypatch, receiver) as tracer:
        yield tracer
