"""A signal's metadata: a Struct on the wire, JSONB in the database."""

import json
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

MAX_BYTES = 16 << 10
# A level takes up to three of protobuf's hundred, and what carries a signal takes some:
# what is deeper than that could be published, and then not be read.
MAX_DEPTH = 16

METADATA = (
    f"must be at most {MAX_BYTES >> 10} KiB as JSON and {MAX_DEPTH} levels deep, "
    "of finite numbers and of text without NUL"
)


def is_metadata(metadata: Struct) -> bool:
    """Tell whether JSONB can hold it, within the limits."""
    try:
        text = to_json(metadata)
    except ValueError:
        return False
    return len(text.encode()) <= MAX_BYTES


def to_json(metadata: Struct) -> str:
    """Return it as JSON. Raises ValueError for what JSONB or the wire can't hold."""
    value = _object(metadata, 1)
    separators = (",", ":")
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)


def from_json(text: str | None) -> Struct | None:
    """Return what the database has; None where a Struct can't hold it."""
    try:
        value = None if text is None else json.loads(text, parse_int=float)
        if not isinstance(value, dict) or _depth(value) > MAX_DEPTH:
            return None
    except RecursionError:
        return None
    metadata = Struct()
    metadata.update(value)
    return metadata


def _object(struct: Struct, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    return {_text(key): _value(v, depth) for key, v in struct.fields.items()}


def _value(value: Value, depth: int) -> Any:
    match value.WhichOneof("kind"):
        case "null_value":
            return None
        case "string_value":
            return _text(value.string_value)
        case "struct_value":
            return _object(value.struct_value, depth + 1)
        case "list_value":
            if depth == MAX_DEPTH:
                raise ValueError("too deep")
            return [_value(item, depth + 1) for item in value.list_value.values]
        case None:
            raise ValueError("a value of no kind")
        case kind:
            return getattr(value, kind)


def _text(text: str) -> str:
    if "\0" in text:
        raise ValueError("PostgreSQL keeps no NUL")
    return text


def _depth(value: Any) -> int:
    """Return how many levels of objects and lists there are."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max(map(_depth, value), default=0)
