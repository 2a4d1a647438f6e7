"""JSON values as text, and what differs between two of them."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from google.protobuf.json_format import MessageToJson
from google.protobuf.struct_pb2 import Struct, Value

ABSENT = object()  # where a value has no such key
NONE = "none"  # how that is said
VALUE_ROOM, PATH_ROOM = 40, 60  # characters of each that are shown in a list
MOST = 8  # differences that are shown of one change


def plain(value: Struct | Value) -> Any:
    """Return the JSON value that a message is, keys sorted, whole numbers as int."""
    text = MessageToJson(value, indent=None, sort_keys=True)
    return json.loads(text, parse_float=_number)


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def parse_value(text: str) -> Any:
    """Return the JSON value that a text is, or the text itself where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except ValueError:
        return text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")  # NaN and the like


def value_text(value: Any) -> str:
    """Return what `parse_value` reads as this value: text as it is, where it can."""
    if value is ABSENT:
        return NONE
    if isinstance(value, str) and _is_bare(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _is_bare(text: str) -> bool:
    try:
        return text not in ("", NONE) and parse_value(text) is text
    except RecursionError:  # as much as begins like JSON
        return False


def short(text: str, room: int = VALUE_ROOM) -> str:
    """Return the text, cut to so many characters."""
    return text if len(text) <= room else f"{text[: room - 3]}..."


def listed(texts: list[str]) -> str:
    """Return the first of the texts, and how many are left out."""
    more = [f"and {len(texts) - MOST:,} more"] if len(texts) > MOST else []
    return "; ".join(texts[:MOST] + more)


def differences(old: Any, new: Any) -> list[str]:
    """Return what became of a JSON value, as `limits.max_position: 100 -> 250`."""
    return list(_differences("", old, new))


def contents(value: Any) -> list[str]:
    """Return what a JSON value holds, as `limits.max_position: 100`."""
    return list(_contents("", value))


def _differences(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            was, is_ = old.get(key, ABSENT), new.get(key, ABSENT)
            yield from _differences(_joined(path, key), was, is_)
    elif value_text(old) != value_text(new):
        yield _said(path, _of_lists(old, new) or _of_values(old, new))


def _of_values(old: Any, new: Any) -> str:
    return f"{short(value_text(old))} -> {short(value_text(new))}"


def _of_lists(old: Any, new: Any) -> str:
    """Return `+SPY -TSLA`, or "" where that does not tell the difference."""
    if not (_are_texts(old) and _are_texts(new)):
        return ""
    added = [f"+{text}" for text in sorted(set(new) - set(old))]
    removed = [f"-{text}" for text in sorted(set(old) - set(new))]
    return short(" ".join(added + removed))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _contents(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _contents(_joined(path, key), inner)
    elif value != []:
        yield _said(path, short(value_text(value)))


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _said(path: str, text: str) -> str:
    return f"{short(path, PATH_ROOM)}: {text}" if path else text
