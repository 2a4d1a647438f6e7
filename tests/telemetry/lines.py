"""What servers under test log, as the JSON lines that they would write."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantplane_server.telemetry.logs import JsonLines


class Lines:
    """What was logged as JSON."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.getvalue().splitlines()]

    def of(self, logger: str, **fields: Any) -> list[dict[str, Any]]:
        return [
            line
            for line in self.all()
            if line["logger"] == logger and fields.items() <= line.items()
        ]


@contextmanager
def lines_of() -> Iterator[Lines]:
    """Yield what this process logs meanwhile."""
    lines, root = Lines(), logging.getLogger()
    handler = logging.StreamHandler(lines.text)
    handler.setFormatter(JsonLines())
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
