"""Short ways to say what feeds publish and what readers get."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

from quantplane import v1 as pb

START_S = 1_700_000_000


def quote(symbol: str, number: int, **fields: Any) -> pb.Quote:
    """Return a quote that its bid tells from others, a microsecond after the last."""
    fields = {"bid": float(number), "ask": number + 0.5} | fields
    made = pb.Quote(symbol=symbol, **fields)
    made.time.FromNanoseconds(START_S * 10**9 + number * 1_000)
    return made


def quotes(symbol: str, numbers: Iterable[int]) -> list[pb.Quote]:
    return [quote(symbol, number) for number in numbers]


def numbers(received: Iterable[pb.Quote], symbol: str) -> list[int]:
    return [int(quote.bid) for quote in received if quote.symbol == symbol]


def kind(response: Any) -> str:
    """Return what a response is: "data", or the name of its event."""
    return response.event.WhichOneof("event") or "data"


async def until(responses: AsyncIterator[Any], wanted: str) -> Any:
    """Return the next response of a kind."""
    async for response in responses:
        if kind(response) == wanted:
            return response
    raise AssertionError(f"the stream ended before {wanted}")


async def read(responses: AsyncIterator[Any], count: int) -> list[pb.Quote]:
    """Return the next quotes, at least `count`, skipping events."""
    received: list[pb.Quote] = []
    while len(received) < count:
        received += (await until(responses, "data")).quotes
    return received


class Sender:
    """The request side of a raw StreamQuotes or PublishQuotes call."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.responses = aiter(call)

    async def send(self, *requests: Any) -> None:
        for request in requests:
            await self.call.write(request)

    async def next(self) -> Any:
        return await anext(self.responses)
