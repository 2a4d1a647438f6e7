"""Where Prometheus reads a process's metrics, by way of OpenTelemetry.

It is answered in a thread of its own, also while the event loop hangs: so it reads only
numbers, and what must be looked at was looked at before, in the event loop.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import version

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from quantplane_server.tasks import end
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.metrics import (
    LOOP_DELAY,
    SPANS_DROPPED,
    Counter,
    Gauge,
    Histogram,
    Instrument,
    Labels,
    Level,
    Look,
    Reading,
    Record,
)

logger = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks
LOOK_AT_MOST_S = 4.0  # that a look may take
TICK_S = 0.1  # of the timer whose lateness is measured

Values = dict[Labels, float]
Read = Callable[[], Values]


@asynccontextmanager
async def endpoint(
    address: tuple[str, int], service: str, looks: Iterable[Look]
) -> AsyncIterator[None]:
    """Answer while the block runs. Raises RuntimeError where the port is taken."""
    seen, delay = Seen(looks), Delay()
    tasks = [asyncio.create_task(part.run()) for part in (seen, delay)]
    try:
        with ExitStack() as stack:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
            meter = stack.enter_context(_meter(service, registry))
            reads: dict[Instrument, Read] = {
                LOOP_DELAY: delay.take,
                SPANS_DROPPED: _spans_dropped,
            }
            for instrument in Instrument.all:
                if isinstance(instrument, Histogram):
                    record = _recorded(meter, instrument)
                    stack.enter_context(instrument.read_by(record))
                else:
                    read = reads.get(instrument) or _read(instrument, seen)
                    _observe(meter, instrument, read)
            stack.enter_context(_http(address, registry))
            yield
    finally:
        await end(*tasks)


class Seen:
    """What the gauges say: what was seen a moment ago."""

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = list(looks)
        self._values: dict[Gauge, Values] = {}

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look everywhere. What can't be seen is not there until it can."""
        values: dict[Gauge, Values] = {}
        for readings in await asyncio.gather(*map(_try, self._looks)):
            for gauge, value, *labels in readings:
                values.setdefault(gauge, {})[tuple(labels)] = value
        self._values = values

    def of(self, gauge: Gauge) -> Values:
        return self._values.get(gauge, {})


async def _try(look: Look) -> list[Reading]:
    try:
        async with asyncio.timeout(LOOK_AT_MOST_S):
            return [reading async for reading in look()]
    except Exception as error:
        logger.debug("not seen: %r", error)
        return []


class Delay:
    """How late the event loop calls who waits for it, at worst."""

    def __init__(self) -> None:
        self._longest_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            self._longest_s = max(self._longest_s, loop.time() - due)

    def take(self) -> Values:
        longest_s, self._longest_s = self._longest_s, 0.0
        return {(): longest_s}


def _spans_dropped() -> Values:
    return {(): tracing.dropped()}


def _read(instrument: Instrument, seen: Seen) -> Read:
    """Return what reads a gauge or a counter."""
    if isinstance(instrument, Gauge):
        return partial(seen.of, instrument)
    assert isinstance(instrument, Counter)
    return partial(dict, instrument.values)


@contextmanager
def _meter(service: str, registry: CollectorRegistry) -> Iterator[Meter]:
    named = {"service.name": service, "service.version": version("quantplane-server")}
    provider = MeterProvider(
        [PrometheusMetricReader(scope_info_enabled=False, registry=registry)],
        Resource.create(named),
        exemplar_filter=AlwaysOffExemplarFilter(),
        shutdown_on_exit=False,
    )
    try:
        yield provider.get_meter("quantplane")
    finally:
        provider.shutdown()


def _recorded(meter: Meter, histogram: Histogram) -> Record:
    """Return what takes the durations of a histogram."""
    made = meter.create_histogram(
        histogram.name,
        histogram.unit,
        histogram.help,
        explicit_bucket_boundaries_advisory=histogram.buckets,
    )
    return made.record


def _observe(meter: Meter, instrument: Instrument, read: Read) -> None:
    """Have an instrument read whenever the endpoint is."""
    create: Callable[..., object] = meter.create_observable_counter
    if isinstance(instrument, Gauge):
        create = meter.create_observable_gauge
    elif isinstance(instrument, Level):
        create = meter.create_observable_up_down_counter

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        for labels, value in read().items():
            named = dict(zip(instrument.labels, labels, strict=True))
            yield Observation(value, named)

    create(instrument.name, [observe], instrument.unit, instrument.help)


@contextmanager
def _http(address: tuple[str, int], registry: CollectorRegistry) -> Iterator[None]:
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise RuntimeError(f"can't serve metrics on {host}:{port}: {error}") from error
    logger.info("metrics on http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
