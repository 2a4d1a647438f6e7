"""What the audit log keeps of the events of orders and signals.

It is enough to read what happened once the event log is trimmed, and where the audit
log is in a database of its own: not the whole message.
"""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane_server.audit.queries import Entry, Event
from quantplane_server.checks import time_us, to_datetime
from quantplane_server.origin import Origin

# The fields that are kept of each message, where they are set.
KEPT: dict[type[Message], set[str]] = {
    pb.OrderEvent: {
        *("revision", "execution", "reversal", "previous_terms", "code", "text"),
        *("broker_time", "actor"),
    },
    pb.Order: {
        *("client_order_id", "strategy_id", "signal_id", "symbol", "side"),
        *("order_type", "quantity", "price", "stop_price", "time_in_force"),
        *("status", "filled_quantity", "avg_fill_price", "broker_order_id", "version"),
        *("pending_request", "pending_terms", "outcome_unknown", "overfill_quantity"),
    },
    pb.Execution: {
        *("execution_id", "time", "quantity", "price", "commission", "venue"),
        *("broker_exec_id", "ref_execution_id", "late"),
    },
    pb.Terms: {"quantity", "price", "stop_price"},
    pb.SignalEvent: {"revision", "actor"},
    pb.Signal: {
        *("time", "strategy_id", "symbol", "signal_type", "strength", "confidence"),
        *("target_price", "stop_loss", "expiration", "status"),
    },
}


def order_event(payload: bytes, revision: int) -> Event:
    event = pb.OrderEvent.FromString(payload)
    event.revision = revision
    return _event(event, "order", event.order.order_id, event.order)


def signal_event(payload: bytes, revision: int) -> Event:
    event = pb.SignalEvent.FromString(payload)
    event.revision = revision
    return _event(event, "signal", event.signal.signal_id, event.signal)


# What makes an entry of a payload and its revision, by the event log.
MAKE: Mapping[str, Callable[[bytes, int], Event]] = {
    "orders": order_event,
    "signals": signal_event,
}


def _event(event: Any, type: str, id: str, resource: Message) -> Event:
    action = _name(event.DESCRIPTOR.fields_by_name["type"].enum_type, event.type)
    new = _kept(event) | _kept(resource)
    time = to_datetime(time_us(event.time))
    origin = Origin(event.trace_id, actor=event.actor)
    return Event(time, origin, Entry(action, type, id, new=new))


def _kept(message: Message) -> dict[str, Any]:
    names = KEPT[type(message)]
    return {
        field.name: _value(field, value)
        for field, value in message.ListFields()
        if field.name in names
    }


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type:
        return _name(field.enum_type, value)
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    return _kept(value) if field.message_type else value


def _name(enum: EnumDescriptor, number: int) -> str:
    """Return the name of an enum's value, without its prefix."""
    if number not in enum.values_by_number:  # a newer server's
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(enum.values_by_number[number].name.removeprefix(prefix))
