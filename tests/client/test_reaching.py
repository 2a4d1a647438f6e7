"""Whoever waits for a server that can't be reached says why."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest

from quantplane import Client
from quantplane import v1 as pb
from tests.faults import until

SAID = "the server can't be reached: "


@pytest.fixture
def nobody() -> Iterator[str]:
    """Return where nobody answers, and nobody else comes to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if SAID in text]


Work = Callable[[Client], Awaitable[None]]


async def watch(client: Client) -> None:
    request = pb.WatchOrdersRequest()
    await anext(aiter(client.follow(client.order.WatchOrders, request)))


async def publish(client: Client) -> None:
    async with client.publish_quotes("mine") as publisher:
        await publisher.send([])


@pytest.mark.parametrize(
    ("work", "who"), [(watch, "WatchOrders"), (publish, "feed mine")]
)
async def test_who_waits_says_why_its_server_can_not_be_reached(
    nobody: str, caplog: pytest.LogCaptureFixture, work: Work, who: str
):
    async with Client(nobody) as client:
        waiting = asyncio.create_task(work(client))
        await until(lambda: said(caplog), "why")
        waiting.cancel()
        await asyncio.wait([waiting])
    (text,) = said(caplog)
    assert text.startswith(f"{who}: {SAID}")
    assert "refused" in text.lower()
