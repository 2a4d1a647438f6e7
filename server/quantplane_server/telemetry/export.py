"""Spans on their way out: bounded, in a thread of their own, counted where lost.

Only imported where something is traced: what it needs is large.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from time import monotonic
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import get_current_span

logger = logging.getLogger(__name__)

NAME = "quantplane"
CLOSE_S = 3.0  # for what is left at the end
# They say the same for every batch, while the collector is away.
NOISY = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
)


class Export:
    """What makes spans and sends them."""

    def __init__(self, process: str) -> None:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._exporter = Exporter()
        self._queue = Queue(self._exporter)
        self.provider = TracerProvider(
            resource=_resource(process), shutdown_on_exit=False
        )
        self.provider.sampler = Linked(self.provider.sampler)
        self.provider.add_span_processor(self._queue)
        self.tracer = self.provider.get_tracer(NAME, version("quantplane-server"))

    @property
    def sent(self) -> int:
        return self._exporter.sent

    @property
    def dropped(self) -> int:
        return self._queue.dropped + self._exporter.failed

    async def close(self) -> None:
        """Send what is left; give up after CLOSE_S."""
        closing = asyncio.create_task(asyncio.to_thread(self._queue.shutdown))
        _, pending = await asyncio.wait([closing], timeout=CLOSE_S)
        if pending:
            self._exporter.shutdown()  # a try that waits for the next one is over
            await closing
        if self.dropped:
            logger.warning("%d spans were lost, %d sent", self.dropped, self.sent)


class Exporter(OTLPSpanExporter):
    """Counts what it sends, and says once that it can't."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = self.sent = self.failed = 0
        self._since_s = 0.0  # it can't, since

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS:
            self.sent += len(spans)
            if self._since_s:
                lasted_s = monotonic() - self._since_s
                logger.info("spans are sent again, after %.1f s", lasted_s)
                self._since_s = 0.0
        else:
            self.failed += len(spans)
            if not self._since_s:
                logger.warning("spans can't be sent to %s", self._endpoint)
                self._since_s = monotonic()
        return result


class Queue(BatchSpanProcessor):
    """Counts what is dropped because too much waits."""

    def __init__(self, exporter: Exporter) -> None:
        super().__init__(exporter)
        self.dropped = 0
        self._most: int = BatchSpanProcessor._default_max_queue_size()  # type: ignore[no-untyped-call]
        self._exporter = exporter
        self._ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        if span.context and span.context.trace_flags.sampled:
            self._ended += 1
            if self._ended - self.dropped - self._exporter.taken > self._most:
                self.dropped += 1  # the oldest of those that wait
        super().on_end(span)


class Linked(Sampler):
    """Samples what begins a trace and is linked to what is sampled; else as told.

    So the deliveries of a sampled stream are all there.
    """

    def __init__(self, told: Sampler) -> None:
        self._told = told

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: Any = None,
        attributes: Any = None,
        links: Any = None,
        trace_state: Any = None,
        **rest: Any,
    ) -> SamplingResult:
        if links and not get_current_span(parent_context).get_span_context().is_valid:
            if any(link.context.trace_flags.sampled for link in links):
                return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._told.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return f"Linked{{{self._told.get_description()}}}"


def _resource(process: str) -> Resource:
    """Return what spans say of this process; what the variables say comes first."""
    named = Resource.create(
        {
            "service.name": NAME if process == "serve" else f"{NAME}-{process}",
            "service.version": version("quantplane-server"),
            "process.pid": os.getpid(),
            "quantplane.process": process,
        }
    )
    return named.merge(OTELResourceDetector().detect())
