"""Fills idempotency keys, so that a call which gRPC repeats is done once.

The contract marks a key with the option `idempotency_key`. Filled before the first
try, it is the same in every further one: gRPC's retries happen below.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import grpc
from google.protobuf.descriptor import (
    Descriptor,
    FieldDescriptor,
    ServiceDescriptor,
)
from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane.descriptors import holds
from quantplane.ids import new_id


class KeyedMethod(grpc.aio.UnaryUnaryMultiCallable):  # type: ignore[type-arg]
    """A method that gives each empty key of a request a new id.

    The caller's message stays as it is.
    """

    def __init__(self, method: Any) -> None:
        self._method = method

    def __call__(self, request: Any, **options: Any) -> Any:
        return self._method(with_keys(request), **options)


def fill_keys(stub: Any, service: ServiceDescriptor) -> None:
    """Have the methods of a stub fill the keys of their requests."""
    # An interceptor would do it too, and make every call of the channel slower.
    for method in service.methods:
        if any(_fields(method.input_type)):
            setattr(stub, method.name, KeyedMethod(getattr(stub, method.name)))


def with_keys(request: Any) -> Any:
    """Return a copy of `request` with every key filled; itself if its type has none."""
    if not any(_fields(request.DESCRIPTOR)):
        return request
    filled = type(request)()
    filled.CopyFrom(request)
    _fill(filled)
    return filled


class _Fields(NamedTuple):
    """What to look at in a message, by name."""

    keys: list[str]
    holders: list[str]  # of keys, at any depth


def _fill(message: Any) -> None:
    fields = _fields(message.DESCRIPTOR)
    for name in fields.keys:
        if not getattr(message, name):
            setattr(message, name, new_id())
    for field, value in message.ListFields():
        if field.name in fields.holders:
            for part in [value] if isinstance(value, Message) else value:
                _fill(part)


@cache
def _fields(descriptor: Descriptor) -> _Fields:
    fields = descriptor.fields
    return _Fields(
        keys=[field.name for field in fields if _is_key(field)],
        holders=[field.name for field in fields if holds(field.message_type, _is_key)],
    )


def _is_key(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[pb.idempotency_key])
