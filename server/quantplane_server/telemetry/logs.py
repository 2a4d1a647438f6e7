"""Log records as lines: JSON for machines, a short line for people.

A record within a call says by itself whose call it is, and its trace. Whatever a record
says stays on its line, and what looks like a secret is not told.
"""

import asyncio
import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal

from quantplane_server.principal import principal
from quantplane_server.streams import OUTLET
from quantplane_server.telemetry import tracing

calls = logging.getLogger("quantplane.calls")

LINES_PER_S = 10  # of the good calls of a method; what is left out is counted
ERRORS_PER_S = 50  # of the others
HEALTH = "grpc.health."

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

SECRET = re.compile(
    r"(?P<key>\bqp_)[\w-]{16,}"  # an API key
    r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"  # an access token
    r"|(?P<url>://[^\s:/@]*:)[^\s/@]+(?=@)"  # the password in a URL
    r"|(?P<scheme>\bbearer\s+)\S+",
    re.IGNORECASE,
)


def set_up(format: Format | None, level: Level) -> None:
    """Write records to the standard error; None: text on a terminal, else JSON.

    On a terminal the lines of calls would bury all others: they need the level debug.
    """
    as_text = (format or ("text" if sys.stderr.isatty() else "json")) == "text"
    handler = logging.StreamHandler()
    handler.setFormatter(TextLines() if as_text else JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    quiet = as_text and level != "debug"
    calls.setLevel(logging.WARNING if quiet else logging.NOTSET)


_caller: ContextVar[asyncio.Task[Any] | None] = ContextVar("caller", default=None)


def begin_call() -> None:
    """Have what this task logs from now on be of the call that it begins.

    Tasks that it begins in turn may be for others too, and outlive the call.
    """
    _caller.set(asyncio.current_task())


def _within_call() -> bool:
    task = _caller.get()
    return task is not None and task is asyncio.current_task()


class JsonLines(logging.Formatter):
    """One JSON object per line; nothing in it that is not ASCII or breaks the line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": masked(record.getMessage()),
            "pid": record.process,
        }
        fields.update(_circumstances(record))
        if record.exc_info:
            fields["exception"] = masked(self.formatException(record.exc_info))
        return json.dumps(fields, default=str)


class TextLines(logging.Formatter):
    """When, how bad, who says it, what; a traceback on the lines after it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone()
        clock = time.isoformat(timespec="milliseconds")[11:23]
        said = _printable(masked(record.getMessage()))
        line = f"{clock} {record.levelname[0]} {record.name}: {said}"
        if trace_id := _circumstances(record).get("trace_id"):
            line += f" trace_id={trace_id}"
        if record.exc_info:
            for part in masked(self.formatException(record.exc_info)).split("\n"):
                line += f"\n    {_printable(part)}"
        return line


def _circumstances(record: logging.LogRecord) -> dict[str, Any]:
    """Return whose call a record is of, in which trace, and what else it is given."""
    found: dict[str, Any] = {}
    own = tracing.ids()
    if own.span_id:
        found |= {"trace_id": own.trace_id, "span_id": own.span_id}
    if (outlet := OUTLET.get(None)) and _within_call():
        found |= {"method": outlet.method, "peer": outlet.peer}
        if known := principal():
            found |= {"principal": known.username, "key_id": known.key_id}
    return found | getattr(record, "fields", {})


def masked(text: str) -> str:
    """Return a text without what looks like a secret."""
    return SECRET.sub(_mask, text)


def _mask(found: re.Match[str]) -> str:
    kept = found["key"] or found["url"] or found["scheme"] or ""
    return f"{kept}***"


def _printable(text: str) -> str:
    """Return a text that no character takes off its line, or colours."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


# --- Calls --------------------------------------------------------------------------


class Share:
    """Lets so many lines a second pass, and counts the others."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._passed = 0
        self._left_out = 0
        self._until = 0.0

    def take(self) -> int | None:
        """Return how many did not pass before this one; None: it does not either."""
        now = monotonic()
        if now >= self._until:
            self._until, self._passed = now + 1, 0
        if self._passed >= self._per_s:
            self._left_out += 1
            return None
        self._passed += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class CallLines:
    """A line for each finished call; for streams, one at the begin too.

    Each is written in the context of its call, which says whose it is.
    """

    def __init__(self) -> None:
        self._shares: dict[tuple[str, str], Share] = {}  # by method and code

    def begun(self, method: str) -> None:
        """Tell that a stream begins."""
        if calls.isEnabledFor(logging.INFO):
            self._tell(method, "", "begins", {})

    def ended(self, method: str, code: str, duration_s: float, **more: Any) -> None:
        """Tell how a call ended, and after how long.

        That somebody asked again and was told that all is well is nothing to tell.
        """
        is_news = code != "OK" or not method.startswith(HEALTH)
        if is_news and calls.isEnabledFor(logging.INFO):
            said = f"{code} in {duration_s * 1e3:,.1f} ms"
            fields = {"code": code, "duration_ms": round(duration_s * 1e3, 3), **more}
            self._tell(method, code, said, fields)

    def _tell(self, method: str, code: str, said: str, fields: dict[str, Any]) -> None:
        share = self._shares.get((method, code))
        if share is None:
            per_s = LINES_PER_S if code in ("", "OK") else ERRORS_PER_S
            share = self._shares[method, code] = Share(per_s)
        if (left_out := share.take()) is None:
            return
        if left_out:
            said += f" ({left_out:,} more before it)"
            fields["left_out"] = left_out
        name = method.rpartition("/")[2]
        calls.info("%s %s", name, said, extra={"fields": fields})
