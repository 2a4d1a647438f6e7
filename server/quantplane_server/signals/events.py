"""The events of signals, as their log has them."""

from collections.abc import Iterable

from quantplane import v1 as pb
from quantplane_server.log import Event
from quantplane_server.origin import Origin

LOG = "signals"


def log_events(
    kind: "pb.SignalEventType.ValueType",
    signals: Iterable[pb.Signal],
    origin: Origin,
) -> list[Event]:
    """Return an event for each signal, which is as it is after it."""
    return [_event(kind, signal, origin) for signal in signals]


def _event(
    kind: "pb.SignalEventType.ValueType", signal: pb.Signal, origin: Origin
) -> Event:
    event = pb.SignalEvent(type=kind, signal=signal, trace_id=origin.trace_id)
    event.span_id, event.actor = origin.span_id, origin.actor
    event.time.GetCurrentTime()
    name = pb.SignalEventType.Name(kind).removeprefix("SIGNAL_EVENT_TYPE_")
    payload = event.SerializeToString()
    return Event(name, signal.signal_id, payload, origin.actor, origin.trace_id)
