"""What a message is about: the ids and symbols in it, and nothing else of it."""

from collections.abc import Iterator
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

NAMES = {
    "symbol": "symbol",
    "symbols": "symbol",
    "underlying": "symbol",
    "underlyings": "symbol",
    "order_id": "order_id",
    "order_ids": "order_id",
    "strategy_id": "strategy_id",
    "strategy_ids": "strategy_id",
    "signal_id": "signal_id",
    "signal_ids": "signal_id",
}
MOST = 10  # values of a name
MOST_MESSAGES = 100  # that are looked at
MOST_CHARACTERS = 128  # of a value

Names = dict[str, dict[str, None]]  # by name its values, in order, each once


def gather(message: Message, names: Names) -> None:
    """Add what a message names, at any depth, to `names`."""
    for number, part in enumerate(_parts(message)):
        if number == MOST_MESSAGES:
            return
        for field, name in _named(part.DESCRIPTOR):
            value = getattr(part, field)
            values = names.setdefault(name, {})
            for each in [value] if isinstance(value, str) else value[:MOST]:
                if each and len(values) < MOST:
                    values[each[:MOST_CHARACTERS]] = None


def attributes(names: Names) -> dict[str, str | list[str]]:
    """Return names as attributes: one value as `symbol`, several as `symbols`."""
    found: dict[str, str | list[str]] = {}
    for name, values in names.items():
        if len(values) == 1:
            found[f"quantplane.{name}"] = next(iter(values))
        elif values:
            found[f"quantplane.{name}s"] = list(values)
    return found


def _parts(message: Message) -> Iterator[Message]:
    """Yield a message and those in it that can name something."""
    yield message
    for field in _holders(message.DESCRIPTOR):
        value = getattr(message, field.name)
        if field.is_repeated:
            for part in value:
                yield from _parts(part)
        elif message.HasField(field.name):
            yield from _parts(value)


@cache
def _named(descriptor: Descriptor) -> list[tuple[str, str]]:
    """Return the fields that name something, and what."""
    return [
        (field.name, NAMES[field.name])
        for field in descriptor.fields
        if field.name in NAMES and field.type == FieldDescriptor.TYPE_STRING
    ]


@cache
def _holders(descriptor: Descriptor) -> list[FieldDescriptor]:
    """Return the fields with messages that name something, at any depth."""
    return [
        field
        for field in descriptor.fields
        if field.message_type
        and not field.message_type.GetOptions().map_entry
        and _names(field.message_type)
    ]


@cache
def _names(descriptor: Descriptor) -> bool:
    seen: set[Descriptor] = set()  # types may contain themselves
    ahead = [descriptor]
    while ahead:
        found = ahead.pop()
        if found in seen:
            continue
        if _named(found):
            return True
        seen.add(found)
        ahead += [field.message_type for field in found.fields if field.message_type]
    return False
