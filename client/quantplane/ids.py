"""Ids that sort by the time they were made: UUIDv7 of RFC 9562."""

import secrets
import threading
import time
from uuid import UUID

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """Return a new UUIDv7; in one process, each sorts after those made before."""
    instant = _next_instant()
    number = instant >> 12 << 80 | 7 << 76 | (instant & 0xFFF) << 64
    return str(UUID(int=number | 0b10 << 62 | secrets.randbits(62)))


def _next_instant() -> int:
    """Return Unix time in 1/4096 ms, later than the last even if the clock is not."""
    global _last
    with _lock:
        _last = max(_last + 1, time.time_ns() * 4096 // 1_000_000)
        return _last
