"""JSON that breaks what keeps it, wherever a request has JSON."""

import asyncio
from collections.abc import Iterator, Mapping
from math import inf, nan
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from quantplane import Client
from quantplane import v1 as pb
from tests import reference
from tests.attacks import good
from tests.attacks.payloads import Place, called
from tests.identity.callers import METHODS, Channel, Metadata, People, named

MIB = 1 << 20


def nested(levels: int) -> Value:
    value = Value(number_value=1)
    for _ in range(levels):
        value = Value(list_value=ListValue(values=[value]))
    return value


# What is refused, and with which reason; without one, by the transport.
HOSTILE: Mapping[str, tuple[Value, str]] = {
    "deep": (nested(40), "INVALID_FIELD"),
    "not a number": (Value(number_value=nan), "INVALID_FIELD"),
    "infinite": (Value(number_value=-inf), "INVALID_FIELD"),
    "of no kind": (Value(), "INVALID_FIELD"),
    "NUL": (Value(string_value="\0"), "INVALID_FIELD"),
    "1 MiB": (Value(string_value="x" * MIB), "INVALID_FIELD"),
    "many": (
        Value(list_value=ListValue(values=[Value(bool_value=True)] * 50_000)),
        "INVALID_FIELD",
    ),
    "5 MiB": (Value(string_value="x" * 5 * MIB), "RESOURCE_EXHAUSTED"),
}


def holders(kind: Descriptor, above: Place = ()) -> Iterator[Place]:
    """Yield the way to each field of JSON."""
    for field in kind.fields:
        if field.message_type in (Struct.DESCRIPTOR, Value.DESCRIPTOR):
            yield (*above, field)
        elif field.message_type:
            yield from holders(field.message_type, (*above, field))


HOLDERS = [(m, place) for m in METHODS for place in holders(m.input_type)]


def put(request: Any, place: Place, value: Value) -> None:
    """Write a value there, within an object where only objects may stand."""
    *above, last = place
    for field in above:
        request = getattr(request, field.name)
        request = request[0] if field.is_repeated else request
    if last.message_type is Struct.DESCRIPTOR:
        value = Value(struct_value=Struct(fields={"key": value}))
        value = value.struct_value
    getattr(request, last.name).CopyFrom(value)


def test_json_is_found_where_it_is_known_to_be():
    found = {f"{method.name} {called(place)}" for method, place in HOLDERS}
    assert found >= {
        "PublishSignals signals.metadata", "CreateStrategy strategy.risk_limits",
        "UpdateStrategy strategy.parameters", "UpdateConfiguration configuration.value",
    }  # fmt: skip


async def test_json_that_can_t_be_kept_is_refused_and_others_are_served_meanwhile(
    client: Client, calls: Channel, people: People, admin: Metadata
):
    requests = await good.requests(client)
    other = await people.key("viewer")
    for method, place in HOLDERS:
        told = []
        for value, _ in HOSTILE.values():
            request = type(requests[method.name])()
            request.CopyFrom(requests[method.name])
            good.renew(request, len(told))
            put(request, place, value)
            told.append(calls.answer(method, admin, request))
        served = calls.answer(named("ListSignals"), other)
        assert await asyncio.gather(served, *told) == [
            "OK", *(reason for _, reason in HOSTILE.values())
        ], (method.name, called(place))  # fmt: skip


async def test_of_a_key_that_comes_twice_the_last_value_counts(
    client: Client, calls: Channel, admin: Metadata
):
    """As of any field in protobuf; JSON itself has no say here."""
    new = pb.CreateStrategyRequest(
        strategy=reference.strategy(parameters={"a": 1}, risk_limits={})
    )
    again = pb.CreateStrategyRequest(strategy=pb.Strategy(parameters={"a": 2}))  # type: ignore[arg-type]
    data = new.SerializeToString() + again.SerializeToString()
    call = calls.opened.unary_unary(
        "/quantplane.v1.StrategyService/CreateStrategy",
        response_deserializer=pb.CreateStrategyResponse.FromString,
    )
    made: Any = await call(data, metadata=admin)
    assert dict(made.strategy.parameters) == {"a": 2}
    assert (await reference.get(client)).parameters == made.strategy.parameters
