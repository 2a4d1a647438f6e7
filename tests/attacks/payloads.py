"""Hostile texts, and every place of a request that a text can be written to."""

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

TEXTS = {
    "code": '\' OR 1=1; DROP TABLE users; -- {1,"2"} %s%n{0.__class__}',
    "controls": 'x"}\r\nE root: forged {"a": "b"}\x1b]0;title\x07\x1b[2J\x9b2J',
    "invisible": "\u202edesrever\u2028\ufeff\ufffe\ufdd0\U0010ffff",
    "NUL": "a\0b",
    "long": "x" * 100_000,
}

Place = tuple[FieldDescriptor, ...]


def places(kind: Descriptor, above: Place = ()) -> Iterator[Place]:
    """Yield the way to each field of text or bytes, at any depth."""
    for field in kind.fields:
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            yield (*above, field)
        elif field.message_type and field.message_type not in _types(above):
            yield from places(field.message_type, (*above, field))


def write(message: Any, place: Sequence[FieldDescriptor], text: str) -> None:
    """Write a text there; what is repeated gets one more, or has its first changed."""
    field, *rest = place
    value = getattr(message, field.name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, *_ = rest
        if key.name == "key":
            value[text].bool_value = True
        else:
            write(value["key"], rest[1:], text)
    elif rest and isinstance(value, Message):
        write(value, rest, text)
    elif rest:
        write(value[0] if value else value.add(), rest, text)
    elif field.is_repeated:
        value.append(text)
    else:
        is_bytes = field.type == FieldDescriptor.TYPE_BYTES
        setattr(message, field.name, text.encode() if is_bytes else text)


def called(place: Place) -> str:
    return ".".join(field.name for field in place)


def obeyed(text: str) -> set[str]:
    """Return the characters of a text that a terminal or a log may obey."""
    return {each for each in text if not each.isprintable()}


def _types(place: Place) -> set[Descriptor | None]:
    return {field.message_type for field in place}
