"""What a process counts and measures, and where Prometheus reads it.

Every instrument stands here once: its name and labels as OpenTelemetry writes them, its
unit, what it says. To count is an addition, whether anybody reads it or not. What is
measured call by call costs more, so a histogram is off while there is no endpoint. What
can only be looked at is looked at now and then, again only where there is an endpoint.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import ClassVar

Labels = tuple[str, ...]  # values, in the order of the instrument's labels
Record = Callable[[float, dict[str, str]], None]


class Instrument:
    """What all of them have."""

    all: ClassVar["list[Instrument]"] = []

    def __init__(self, name: str, unit: str, help: str, *labels: str) -> None:
        self.name = name
        self.unit = unit
        self.help = help
        self.labels = labels
        self.all.append(self)


class Counter(Instrument):
    """What has happened in this process since it began."""

    def __init__(self, name: str, unit: str, help: str, *labels: str) -> None:
        super().__init__(name, unit, help, *labels)
        self.values: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, count: float = 1, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0) + count


class Level(Counter):
    """What is there now: it goes up and down."""

    def total(self) -> float:
        return sum(self.values.values())


class Gauge(Instrument):
    """What is looked at."""


class Histogram(Instrument):
    """How long things took, in seconds."""

    def __init__(
        self, name: str, help: str, buckets: Sequence[float], *labels: str
    ) -> None:
        super().__init__(name, "s", help, *labels)
        self.buckets = buckets
        self.on = False  # whether anybody reads it
        self._records: list[Record] = []

    def record(self, duration_s: float, *labels: str) -> None:
        attributes = dict(zip(self.labels, labels, strict=True))
        for record in self._records:
            record(duration_s, attributes)

    @contextmanager
    def read_by(self, record: Record) -> Iterator[None]:
        """Hand what is measured to `record` while the block runs."""
        self._records.append(record)
        self.on = True
        try:
            yield
        finally:
            self._records.remove(record)
            self.on = bool(self._records)


# --- Calls --------------------------------------------------------------------------

METHOD, CODE = "rpc.method", "rpc.response.status_code"
QUICK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

CALL_DURATION = Histogram(
    "rpc.server.call.duration",
    "How long calls took that are no streams.",
    QUICK_S,
    *(METHOD, CODE),
)
CALLS = Level(
    "quantplane.calls", "{call}", "Calls under way that are no streams.", METHOD
)
STREAMS = Level("quantplane.streams", "{stream}", "Streams under way.", METHOD)
STREAMS_ENDED = Counter(
    "quantplane.streams.ended", "{stream}", "Streams that ended.", METHOD, CODE
)
CALLS_REFUSED = Counter(
    "quantplane.calls.refused",
    "{call}",
    "Calls refused for who made them, or for how often.",
    "reason",
)
LOGINS_FAILED = Counter(
    "quantplane.logins.failed",
    "{try}",
    "Passwords that were wrong, at a login or a change of password.",
    "action",
)

# --- Quotes -------------------------------------------------------------------------

QUOTES_ACCEPTED = Counter(
    "quantplane.quotes.accepted", "{quote}", "Quotes of feeds that the bus has taken."
)
QUOTES_CONFLATED = Counter(
    "quantplane.quotes.conflated",
    "{quote}",
    "Quotes left out for readers that want the latest, or are too slow for all.",
)
QUOTES_DELIVERED = Counter(
    "quantplane.quotes.delivered", "By", "Quotes handed to streams, in bytes."
)
FEED_HOLDS = Counter(
    "quantplane.feeds.holds",
    "{round}",
    "Rounds of batches that were held back at first.",
    "reason",
)
FEEDS_HELD = Level(
    "quantplane.feeds.held", "{feed}", "Feeds that are held back now.", "reason"
)
SUBSCRIPTIONS = Gauge(
    "quantplane.subscriptions", "{stream}", "Streams by what they are doing.", "state"
)
SUBSCRIBER_LAG = Gauge(
    "quantplane.subscribers.lag", "s", "How far the slowest stream is behind."
)
SUBSCRIBER_PENDING = Gauge(
    "quantplane.subscribers.pending", "By", "What waits for the fullest stream."
)

# --- The bus and the recorder -------------------------------------------------------

BUS_UNRECORDED = Gauge(
    "quantplane.bus.unrecorded", "By", "What the bus holds and the database does not."
)
BUS_CAP = Gauge(
    "quantplane.bus.cap",
    "By",
    "How much unrecorded it may hold; beyond, feeds are held.",
)
RECORDER_LAG = Gauge(
    "quantplane.recorder.lag", "s", "How long the oldest unrecorded quote is there."
)
ROWS_RECORDED = Counter(
    "quantplane.recorder.rows", "{row}", "Quotes that were committed to the database."
)

# --- The logs and trading -----------------------------------------------------------

LOG_REVISION = Gauge(
    "quantplane.log.revision", "{entry}", "Where a log ends in the database.", "log"
)
TAIL_BEHIND = Gauge(
    "quantplane.log.tail.behind",
    "{entry}",
    "By how much the end of a log is ahead of what readers here are given.",
    "log",
)
AUDIT_BEHIND = Gauge(
    "quantplane.audit.behind",
    "{entry}",
    "Events of a log that the audit log lacks.",
    "log",
)
AUDIT_LAG = Gauge(
    "quantplane.audit.lag", "s", "How long it has lacked the oldest of them.", "log"
)
LOG_EVENTS = Counter(
    "quantplane.log.events",
    "{event}",
    "Events that this process appended to a log.",
    *("log", "type"),
)
ORDERS_REFUSED = Counter(
    "quantplane.orders.refused",
    "{order}",
    "New orders that were sound and are refused.",
    "reason",
)
EXECUTIONS = Counter(
    "quantplane.executions", "{execution}", "Executions booked, corrections too."
)

# --- What all stands on -------------------------------------------------------------

POOL, STATE = "db.client.connection.pool.name", "db.client.connection.state"

BACKEND_UP = Gauge(
    "quantplane.backend.up",
    "",
    "1 while what services stand on is well, else 0.",
    "backend",
)
CONNECTIONS = Gauge(
    "db.client.connection.count",
    "{connection}",
    "Connections to PostgreSQL.",
    *(POOL, STATE),
)
CONNECTIONS_MAX = Gauge(
    "db.client.connection.max", "{connection}", "How many a pool may have.", POOL
)
CONNECTIONS_AWAITED = Gauge(
    "db.client.connection.pending_requests",
    "{request}",
    "Who waits for a connection.",
    POOL,
)
CONNECTION_WAIT = Histogram(
    "db.client.connection.wait_time",
    "How long it took to get a connection.",
    QUICK_S,
    POOL,
)
DB_ERRORS = Counter(
    "quantplane.db.errors",
    "{error}",
    "Errors of PostgreSQL that ended the use of a connection.",
    "error.type",
)
SPANS_DROPPED = Counter(
    "quantplane.spans.dropped", "{span}", "Spans that could not be exported."
)
LOOP_DELAY = Gauge(
    "quantplane.event_loop.delay",
    "s",
    "The longest that a timer was late since it was read last.",
)

# --- Reading them -------------------------------------------------------------------

Reading = tuple[Gauge, float, *tuple[str, ...]]  # with the values of its labels
Look = Callable[[], AsyncIterator[Reading]]


@asynccontextmanager
async def exposed(
    address: tuple[str, int] | None, service: str, looks: Iterable[Look]
) -> AsyncIterator[None]:
    """Have Prometheus read this process's metrics while the block runs.

    Without an address nothing is measured, looked at or imported. Raises RuntimeError
    where it can't be had.
    """
    if address is None:
        yield
        return
    from quantplane_server.telemetry.endpoint import endpoint

    async with endpoint(address, service, looks):
        yield
