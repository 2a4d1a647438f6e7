"""Bars as columns, straight from the database's bytes to the wire's.

A packed repeated field of fixed width is its values' little-endian bytes behind a tag
and a length, so a column is written without touching its values one by one.
"""

from typing import Any

import numpy as np

from quantplane import v1 as pb
from quantplane_server.fanout import varint

Rows = np.ndarray[Any, np.dtype[np.void]]

_FIELDS = [
    (field.number, field.name)
    for field in pb.BarColumns.DESCRIPTOR.fields
    if field.name != "symbol"
]


def bar_columns(symbol: str, rows: Rows) -> bytes:
    """Return a serialised BarColumns; a column without any value is left out."""
    parts = [pb.BarColumns(symbol=symbol).SerializeToString()]
    for number, name in _FIELDS:
        column = rows[name]
        if _has_values(column):
            data = column.astype(column.dtype.newbyteorder("<")).tobytes()
            parts += [bytes((number << 3 | 2,)), varint(len(data)), data]
    return b"".join(parts)


def _has_values(column: np.ndarray[Any, Any]) -> bool:
    if column.dtype.kind == "f":
        return not bool(np.isnan(column).all())
    return bool((column != -1).any())
