"""Pages of lists that are in order of time, the latest first, and then of ids.

A page token holds the place behind which the next page begins.
"""

from datetime import datetime
from struct import Struct
from typing import Any, TypeAlias
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane_server.checks import FIRST, LAST, time_given, time_us, to_datetime
from quantplane_server.tokens import Tokens, list_purpose

Place: TypeAlias = tuple[datetime, UUID]  # the time and the id of what is listed

# Of no row: behind a time with it begins what is before that time.
LAST_ID = UUID(int=(1 << 128) - 1)

_PACKED = Struct("!q16s")  # microseconds, and the id


def begin(tokens: Tokens, request: Any) -> tuple[datetime, Place]:
    """Return down to which time a list goes, and behind which place its page begins.

    Raises InvalidPageToken.
    """
    end = time_given(request, "end_time", LAST)
    return time_given(request, "start_time", FIRST), place(tokens, request, end)


def place(tokens: Tokens, request: Any, end: datetime = LAST) -> Place:
    """Return behind which place a page begins; the first one, at the end.

    Raises InvalidPageToken.
    """
    if not request.page_token:
        return end, LAST_ID
    payload = tokens.open_page(list_purpose(request), request.page_token)
    stamp_us, id = _PACKED.unpack(payload)
    return to_datetime(stamp_us), UUID(bytes=id)


def token_behind(tokens: Tokens, request: Any, time: Timestamp, id: str) -> str:
    """Return the token of the page behind the one that ends with this place."""
    payload = _PACKED.pack(time_us(time), UUID(id).bytes)
    return tokens.page_token(list_purpose(request), payload)
