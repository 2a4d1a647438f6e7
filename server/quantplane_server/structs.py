"""JSON of any shape: a Struct or a Value on the wire, JSONB in the database."""

import json
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

# A level takes up to three of protobuf's hundred, and what carries a message takes
# some: what is deeper than that could be stored, and then not be read.
MAX_DEPTH = 16


def rule(max_bytes: int) -> str:
    """Return what `is_json` checks, in words."""
    return (
        f"must be at most {max_bytes >> 10} KiB as JSON and {MAX_DEPTH} levels deep, "
        "of finite numbers and of text without NUL"
    )


def is_json(message: Struct | Value, max_bytes: int) -> bool:
    """Tell whether JSONB can hold it, within the limits."""
    try:
        return len(to_json(message).encode()) <= max_bytes
    except ValueError:
        return False


def to_json(message: Struct | Value) -> str:
    """Return it as JSON. Raises ValueError for what JSONB or the wire can't hold."""
    if isinstance(message, Struct):
        return _dumps(_object(message, 1))
    return _dumps(_value(message, 0))


def to_struct(text: str | None) -> Struct | None:
    """Return what the database has; None where a Struct can't hold it."""
    try:
        value = None if text is None else _loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    struct = Struct()
    struct.update(value)
    return struct


def to_value(text: str | None) -> Value | None:
    """Return what the database has; None where a Value can't hold it."""
    if text is None:
        return None
    holder = Struct()
    try:
        holder.update({"value": _loads(text)})
    except ValueError:
        return None
    return holder.fields["value"]


def bounded(text: str, max_bytes: int) -> str | None:
    """Return what the database has; None where callers could not have sent it."""
    try:
        return text if len(_dumps(_loads(text)).encode()) <= max_bytes else None
    except ValueError:
        return None


def _dumps(value: Any) -> str:
    separators = (",", ":")
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)


def _loads(text: str) -> Any:
    """Return JSON with numbers as doubles. Raises ValueError for what is too deep."""
    try:
        value = json.loads(text, parse_int=float)
        if _depth(value) <= MAX_DEPTH:
            return value
    except RecursionError:
        pass
    raise ValueError("too deep")


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
