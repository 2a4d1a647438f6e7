"""The streams of a process: how many there may be, and how they end when it stops."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from quantplane_server.errors import Draining, TooManyStreams


class Stream(Protocol):
    def drain(self) -> None:
        """End with a Goodbye."""


class Streams:
    """All streams that are being served, whatever their service."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: set[Stream] = set()
        self._draining = False

    @contextmanager
    def held(self, stream: Stream) -> Iterator[None]:
        """Serve a stream. Raises TooManyStreams, or Draining after `drain`."""
        if self._draining:
            raise Draining
        if len(self._held) >= self._limit:
            raise TooManyStreams(self._limit)
        self._held.add(stream)
        try:
            yield
        finally:
            self._held.remove(stream)

    def drain(self) -> None:
        """Take no new stream, and end those there are with a Goodbye."""
        self._draining = True
        for stream in self._held:
            stream.drain()
