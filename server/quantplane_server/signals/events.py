"""The events of signals, as their log has them."""

from collections.abc import Iterable

from quantplane import v1 as pb
from quantplane_server.log import Event

LOG = "signals"


def log_events(
    kind: "pb.SignalEventType.ValueType",
    signals: Iterable[pb.Signal],
    trace_id: str = "",
    actor: str = "",
) -> list[Event]:
    """Return an event for each signal, which is as it is after it."""
    return [_event(kind, signal, trace_id, actor) for signal in signals]


def _event(
    kind: "pb.SignalEventType.ValueType", signal: pb.Signal, trace_id: str, actor: str
) -> Event:
    event = pb.SignalEvent(type=kind, signal=signal, trace_id=trace_id)
    event.time.GetCurrentTime()
    name = pb.SignalEventType.Name(kind).removeprefix("SIGNAL_EVENT_TYPE_")
    payload = event.SerializeToString()
    return Event(name, signal.signal_id, payload, actor, trace_id)
