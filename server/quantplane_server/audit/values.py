"""What was before and after, from JSONB to the wire."""

from google.protobuf.json_format import Parse, ParseError
from google.protobuf.struct_pb2 import Value

MAX_BYTES = 256 << 10  # of a value's JSON; on the wire it may take four times as much
# Two for each level of JSON: 29. Each takes three of the hundred that protobuf allows.
MAX_DEPTH = 60

NOT_SHOWN = "not shown: it is too large or too deep, or has a number beyond a double's"


def to_value(text: str | None) -> Value | None:
    """Return what JSON says; a text that says why not where a Value can't hold it."""
    if text is None:
        return None
    try:
        return Parse(text, Value(), max_recursion_depth=MAX_DEPTH)
    except ParseError:
        return Value(string_value=NOT_SHOWN)
