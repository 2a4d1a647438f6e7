"""What it costs a call that the server looks who makes it, in milliseconds."""

from statistics import median, quantiles
from time import perf_counter

import grpc

from benchmarks import streams
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Sample
from quantplane import v1 as pb
from quantplane.client import OPTIONS

CALLS = 4_000
WARM_UP = 500  # that are not counted
# It asks neither the database nor the bus: nothing hides what is compared.
METHOD = f"/{pb.Quote.DESCRIPTOR.file.package}.OrderService/GetOrderLifecycle"


async def vs_none(bench: Bench) -> Figure:
    """Compare a call with an API key and the same one where nobody is asked for any."""
    async with (
        bench.server_without_recorder() as (asks, _),
        bench.server_without_recorder(auth=False) as (does_not_ask, _),
    ):
        return await bench.in_turns(
            "ms",
            lambda: _timed(bench, asks, shown=True),
            lambda: _timed(bench, does_not_ask, shown=False),
        )


async def _timed(bench: Bench, target: str, shown: bool) -> Sample:
    async with bench.child(call, target=target, shown=shown) as child:
        ms = (await child.hear())["ms"]
    return {"value": median(ms), "p99": quantiles(ms, n=100)[98]}


async def call(parent: Parent, target: str, shown: bool) -> None:
    """Call one by one; say how many ms each took."""
    metadata = streams.shown() if shown else None
    ms = []
    async with grpc.aio.insecure_channel(target, OPTIONS) as channel:
        method = channel.unary_unary(METHOD)
        for _ in range(CALLS + WARM_UP):
            began = perf_counter()
            await method(b"", metadata=metadata)
            ms.append((perf_counter() - began) * 1e3)
    parent.say(ms=ms[WARM_UP:])
