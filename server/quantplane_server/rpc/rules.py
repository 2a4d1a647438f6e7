"""What the contract says of methods: who may call them, and about which strategies."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from google.protobuf.descriptor import (
    Descriptor,
    FieldDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane.descriptors import holds
from quantplane_server.errors import PermissionDenied

NAMES = ("strategy_id", "strategy_ids")  # of the fields that name strategies


class Rule(NamedTuple):
    """Who may call a method. Where nothing is said, nobody may."""

    permission: tuple[str, str] | None = None  # resource and action
    open_to_known: bool = False
    open_to_all: bool = False
    scope: "pb.StrategyScope.ValueType" = pb.STRATEGY_SCOPE_UNSPECIFIED
    is_stream: bool = False


CLOSED = Rule()

# Balancers and containers ask for health without a credential, and are told no more
# than what answers; reflection tells the contract, which is public.
OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")


def rules_of(services: Iterable[ServiceDescriptor]) -> dict[str, Rule]:
    """Return the rule of each method by its path."""
    return {
        f"/{service.full_name}/{method.name}": _rule(method)
        for service in services
        for method in service.methods
    }


def _rule(method: MethodDescriptor) -> Rule:
    is_stream = method.client_streaming or method.server_streaming
    if method.containing_service.full_name in OPEN_SERVICES:
        return Rule(open_to_all=True, is_stream=is_stream)
    said = method.GetOptions().Extensions
    needed = said[pb.permission]
    return Rule(
        (needed.resource, needed.action) if needed.resource else None,
        said[pb.open_to_known],
        said[pb.open_to_all],
        said[pb.strategy_scope],
        is_stream,
    )


def confine(request: Any, strategy_id: str) -> None:
    """Have a request be about one strategy, where it names none.

    Raises PermissionDenied where it names another one.
    """
    for field in _fields(request.DESCRIPTOR):
        value = getattr(request, field.name)
        if field.name in NAMES:
            _confine_field(request, field.name, value, strategy_id)
        elif not isinstance(value, Message):
            for part in value:
                confine(part, strategy_id)
        elif field.containing_oneof is None or request.HasField(field.name):
            confine(value, strategy_id)  # an omitted one may mean all, as a filter does


def _confine_field(request: Any, name: str, value: Any, strategy_id: str) -> None:
    one = isinstance(value, str)
    named = {value} - {""} if one else set(value)
    if named - {strategy_id}:
        raise bound_elsewhere(strategy_id)
    if not named and one:
        setattr(request, name, strategy_id)
    elif not named:
        value.append(strategy_id)


def bound_elsewhere(strategy_id: str) -> PermissionDenied:
    return PermissionDenied(
        f"the API key is bound to strategy {strategy_id!r}, and this is about another "
        "one, or about all",
        strategy_id=strategy_id,
    )


@cache
def _fields(descriptor: Descriptor) -> list[FieldDescriptor]:
    """Return the fields that name strategies, or can hold what does."""
    return [
        field
        for field in descriptor.fields
        if field.name in NAMES or names_strategies(field.message_type)
    ]


def names_strategies(descriptor: Descriptor | None) -> bool:
    """Tell whether a message of this type can name a strategy, at any depth."""
    return holds(descriptor, lambda field: field.name in NAMES)
