"""Children at both ends of a stream: one that publishes a tape, one that reads it."""

import asyncio
import os
from time import perf_counter, process_time
from typing import Any

import grpc
from grpc.aio import Metadata

from benchmarks.child import Parent
from benchmarks.tape import Tape
from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import OPTIONS
from quantplane.credentials import VARIABLE

SERVICE = "/" + pb.StreamQuotesResponse.DESCRIPTOR.file.package + ".MarketDataService"
SUBSCRIBE = f"{SERVICE}/SubscribeQuotes"
STREAM = f"{SERVICE}/StreamQuotes"
CHANNELS = 4  # connections that a child's streams share


def channels(target: str) -> list[grpc.aio.Channel]:
    """Open connections of their own, not one that gRPC shares behind them."""
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    return [grpc.aio.insecure_channel(target, options) for _ in range(CHANNELS)]


def shown() -> Metadata:
    """Return what calls carry so that a server knows who calls."""
    return Metadata(("authorization", f"Bearer {os.environ[VARIABLE]}"))


def lossless(symbols: list[str]) -> str:
    """Return a request for every quote, in hex."""
    request = pb.SubscribeQuotesRequest(symbols=symbols, delivery=pb.DELIVERY_LOSSLESS)
    return request.SerializeToString().hex()


async def publish(
    parent: Parent, target: str, tape: dict[str, Any], one_by_one: bool = False
) -> None:
    """Publish a tape when told to; say when it began, was accepted, was durable.

    With `one_by_one`, each batch is accepted before the next is sent.
    """
    batches = list(Tape(**tape).batches())
    async with Client(target) as client, client.publish_quotes() as feed:
        await feed.send([])  # connected
        parent.say(ready=True)
        await parent.hear()
        began = perf_counter()
        for batch in batches:
            await feed.send(batch)
            if one_by_one:
                await feed.flush()
        await feed.flush()
        parent.say(began=began, accepted=perf_counter())
        await feed.durable()
        parent.say(durable=perf_counter())


async def read(
    parent: Parent, target: str, method: str, request: str, readers: int,
    tape: dict[str, Any],
) -> None:  # fmt: skip
    """Read a tape in many streams; say when all are open, and when all have it all.

    Messages stay bytes, only searched for marks, so that reading costs next to nothing.
    """
    streams = Streams(Tape(**tape))
    opened = channels(target)
    calls = [
        opened[i % CHANNELS].unary_stream(method)(
            bytes.fromhex(request), metadata=shown()
        )
        for i in range(readers)
    ]
    await asyncio.gather(*(call.read() for call in calls))
    parent.say(ready=True)
    before = process_time()
    await asyncio.gather(*map(streams.read, calls))
    parent.say(
        done=perf_counter(), messages=streams.messages, bytes=streams.bytes,
        cpu_s=process_time() - before,
    )  # fmt: skip


class Streams:
    """Counts what streams of a tape carry."""

    def __init__(self, tape: Tape) -> None:
        self._marker = tape.marker
        self._marks = tape.symbols
        self.messages = self.bytes = 0

    async def read(self, call: Any) -> None:
        """Read until every mark has come."""
        marks = 0
        while marks < self._marks:
            message = await call.read()
            assert message is not grpc.aio.EOF, "the server ended the stream"
            self.messages += 1
            self.bytes += len(message)
            marks += message.count(self._marker)
