"""What the contract says of messages."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor


def holds(
    descriptor: Descriptor | None, is_wanted: Callable[[FieldDescriptor], bool]
) -> bool:
    """Say whether a message of this type can hold a field like that, at any depth."""
    seen: set[Descriptor] = set()  # types may contain themselves
    ahead = [descriptor]
    while ahead:
        found = ahead.pop()
        if found is None or found in seen:
            continue
        if any(map(is_wanted, found.fields)):
            return True
        seen.add(found)
        ahead += [field.message_type for field in found.fields]
    return False
