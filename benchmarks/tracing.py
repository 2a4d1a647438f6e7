"""What tracing costs a server, in its CPU time: sampled at 1 %, and all of it.

Three servers, which differ in nothing but the variables of OpenTelemetry, take turns in
short rounds. The spans go to a collector in another process, which throws them away.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from statistics import median
from time import clock_gettime
from typing import Any, NamedTuple

import grpc

from benchmarks import streams
from benchmarks.child import Parent
from benchmarks.harness import Bench, Figure, Process
from benchmarks.orders import new_order
from benchmarks.tape import Tape
from quantplane import Client
from quantplane import v1 as pb

ROUNDS = 24
CALLS = 200  # a round: of one in a hundred, there are two
QUOTES = 10_000  # a round
READERS = 4
TAKEN = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
SAMPLED = {"off": None, "one": 0.01, "all": 1.0}


class Served(NamedTuple):
    """A server, and who keeps it busy."""

    server: Process
    client: Process


async def of_a_call(bench: Bench) -> Figure:
    """Compare calls: the cheapest, and SubmitOrder."""

    async def client(stack: AsyncExitStack, target: str) -> Process:
        return await stack.enter_async_context(bench.child(call, target=target))

    async def cheap(served: Served) -> float:
        return await _cpu_s(served, kind="cheap") / CALLS

    async def submit(served: Served) -> float:
        return await _cpu_s(served, kind="submit") / CALLS

    return await _compare(bench, client, submit, cheap)


async def of_a_quote(bench: Bench) -> Figure:
    """Compare quotes, from their feed to several readers."""

    async def client(stack: AsyncExitStack, target: str) -> Process:
        tape = Tape(QUOTES).json()
        made = bench.child(publish_and_read, target=target, tape=tape)
        return await stack.enter_async_context(made)

    async def quotes(served: Served) -> float:
        return await _cpu_s(served) / (QUOTES * READERS)

    return await _compare(bench, client, quotes)


async def _compare(
    bench: Bench,
    client: Callable[[AsyncExitStack, str], Awaitable[Process]],
    *measures: Callable[[Served], Awaitable[float]],
) -> Figure:
    """Return the first measure's figure; the others' ratios are beside it."""
    samples: dict[str, list[list[float]]] = {name: [] for name in SAMPLED}
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(bench.child(take))
        endpoint = (await sink.hear())["endpoint"]
        served = {}
        for name, share in SAMPLED.items():
            server = bench.server_without_recorder(
                variables=_variables(endpoint, share)
            )
            target, process = await stack.enter_async_context(server)
            made = await client(stack, target)
            served[name] = Served(process, made)
            await made.hear()
            await measures[0](served[name])  # warm
        for number in range(ROUNDS):
            bench.note(f"round {number + 1} of {ROUNDS}")
            for name in sorted(SAMPLED, reverse=number % 2 == 1):
                taken = [await measure(served[name]) * 1e6 for measure in measures]
                samples[name].append(taken)
    extra: dict[str, float] = {}
    for number, measure in enumerate(measures):
        for name in ("one", "all"):
            ratio = _ratio(samples, name, number)
            extra[f"{measure.__name__}_{name}_ratio"] = round(ratio, 4)
    baseline = median(first for first, *_ in samples["off"])
    return Figure(baseline * _ratio(samples, "one", 0), "us", baseline, extra)


def _ratio(samples: dict[str, list[list[float]]], name: str, number: int) -> float:
    """Return what a share costs, as the median of rounds: each beside the untraced.

    What slows the machine down for longer than a round is then in both.
    """
    rounds = zip(samples[name], samples["off"], strict=True)
    return median(taken[number] / off[number] for taken, off in rounds)


def _variables(endpoint: str, share: float | None) -> dict[str, str]:
    if share is None:
        return {"OTEL_SDK_DISABLED": "true"}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(share),
    }


async def _cpu_s(served: Served, **told: Any) -> float:
    """Have the client do a round; return the CPU time that its server needed."""
    # The clock that clock_getcpuclockid gives: times() would be too coarse.
    clock = ~served.server.pid << 3 | 2
    before = clock_gettime(clock)
    served.client.say(**told)
    await served.client.hear()
    return clock_gettime(clock) - before


# --- Children -----------------------------------------------------------------------


async def take(parent: Parent) -> None:
    """Be a collector that keeps nothing."""

    async def taken(request: bytes, context: Any) -> bytes:
        return b""

    service, _, method = TAKEN.strip("/").partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(taken)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parent.say(endpoint=f"http://127.0.0.1:{port}")
    await asyncio.Event().wait()


async def call(parent: Parent, target: str) -> None:
    """Make calls of a kind one by one, whenever told to."""
    async with Client(target) as client:
        parent.say(ready=True)
        while told := await parent.hear():
            for _ in range(CALLS):
                if told["kind"] == "submit":
                    order = pb.SubmitOrderRequest(order=new_order())
                    await client.order.SubmitOrder(order)
                else:
                    lifecycle = pb.GetOrderLifecycleRequest()
                    await client.order.GetOrderLifecycle(lifecycle)
            parent.say(done=True)


async def publish_and_read(parent: Parent, target: str, tape: dict[str, Any]) -> None:
    """Publish a tape, whenever told to, until readers have it all."""
    batches = list(Tape(**tape).batches())
    request = bytes.fromhex(streams.lossless(Tape(**tape).names))
    opened = streams.channels(target)
    calls = [
        channel.unary_stream(streams.SUBSCRIBE)(request, metadata=streams.shown())
        for channel in opened[:READERS]
    ]
    await asyncio.gather(*(call.read() for call in calls))
    async with Client(target) as client, client.publish_quotes() as feed:
        await feed.send([])
        parent.say(ready=True)
        while True:
            await parent.hear()
            reading = [streams.Streams(Tape(**tape)).read(call) for call in calls]
            readers = asyncio.gather(*reading)
            for batch in batches:
                await feed.send(batch)
                await feed.flush()  # so that batches do not share their costs
            await readers
            parent.say(done=True)
