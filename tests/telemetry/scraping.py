"""What Prometheus would read of servers under test."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from tests.market_data import Sender, quotes, until

PATIENCE_S = 20.0
TICK_S = 0.05


class Page:
    """The samples of one answer."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with a name and these labels; 0 of none."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self) -> dict[str, set[str]]:
        """Return the names of the samples, each with the names of its labels."""
        found: dict[str, set[str]] = {}
        for sample in self.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        return found


@dataclass(frozen=True)
class Measured:
    """Servers whose metrics can be read, and a client of them."""

    client: Client
    target: str
    settings: Settings
    ports: tuple[int, ...]

    async def page(self, number: int = 0) -> Page:
        """Return what a process says: 0 serves, 1 records."""
        return await asyncio.to_thread(page, self.ports[number])

    async def until(self, condition: Callable[[Page], object], number: int = 0) -> Page:
        """Return the first page that is like that."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(found := await self.page(number)):
                await asyncio.sleep(TICK_S)
        return found


def page(port: int) -> Page:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        return Page(answer.read().decode())


def free_ports() -> tuple[int, int]:
    """Return two ports that follow each other."""
    while True:
        with socket.socket() as one, socket.socket() as two, suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            two.bind(("127.0.0.1", port + 1))
            return port, port + 1


@asynccontextmanager
async def measured(
    settings: Settings, recorder: bool = True
) -> AsyncIterator[Measured]:
    ports = free_ports()
    listen = {"metrics_listen": f"127.0.0.1:{ports[0]}"}
    settings = settings.model_copy(update=listen)
    async with AsyncExitStack() as stack:
        if recorder:
            await stack.enter_async_context(recording(settings.process(1)))
        target = await stack.enter_async_context(serving(settings))
        client = await stack.enter_async_context(Client(target))
        yield Measured(client, target, settings, ports)


# --- Traffic ------------------------------------------------------------------------


async def feed(client: Client, name: str = "feed") -> Sender:
    sender = Sender(client.market_data.PublishQuotes())
    await sender.send(pb.PublishQuotesRequest(feed=name))
    await sender.next()
    return sender


async def publish(sender: Sender, number: int, symbol: str, count: int) -> None:
    numbers = range(number * 10_000, number * 10_000 + count)
    batch = pb.PublishQuotesRequest(batch=number, quotes=quotes(symbol, numbers))
    await sender.send(batch)


async def fill_up(sender: Sender, batches: int) -> None:
    for number in range(1, batches + 1):
        await publish(sender, number, "A", 1_000)


async def accepted(sender: Sender, number: int) -> None:
    async for response in sender.responses:
        if response.accepted_through >= number:
            return


async def reader(client: Client, **fields: object) -> AsyncIterator[object]:
    request = pb.SubscribeQuotesRequest(symbols=["A"], **fields)
    responses = aiter(client.market_data.SubscribeQuotes(request))
    await until(responses, "snapshot_complete")
    return responses
