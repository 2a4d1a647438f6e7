"""How a server process is doing, as a screen, a line or JSON."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from quantplane import v1 as pb
from quantplane.tables.rows import coloured, fitted
from quantplane.tables.text import message_json, printable, word

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

DISPENSABLE = (
    *("key", "keys", "sent", "open", "entries", "unread", "from", "id", "pending"),
    "who",
)
FIGURES = (26, 26, 28, 26)  # characters of a name and its value, in each column
GAP = 3
KEY = 8  # characters of a key's id
COLOURS = {
    pb.SUBSCRIPTION_STATE_STALLED: "red",
    pb.SUBSCRIPTION_STATE_HELD: "red",
    pb.SUBSCRIPTION_STATE_CATCHING_UP: "yellow",
    pb.SUBSCRIPTION_STATE_HISTORY: "cyan",
    pb.SUBSCRIPTION_STATE_STARTING: "cyan",
}
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
TIMES = ((86_400, "d"), (3_600, "h"), (60, "min"))
WIDTH = 120  # characters of what is no table, at most
LATE_S = 1.0  # of recording, and it is pointed out


class Sample(NamedTuple):
    """What a process said at one time."""

    status: pb.GetServerStatusResponse
    subscriptions: Sequence[pb.Subscription]


class Change(NamedTuple):
    """Two samples, the second of which is the newer one; or one alone."""

    before: Sample | None
    now: Sample

    @property
    def span_s(self) -> float:
        """Between the two; 0 if they are not of one process."""
        if self.before is None:
            return 0.0
        then, status = self.before.status, self.now.status
        if _process(then) != _process(status):
            return 0.0
        between = status.server_time.ToNanoseconds() - then.server_time.ToNanoseconds()
        return between / 1e9

    def rate(self, name: str) -> float | None:
        """Return by how much a count of the status grows in a second, if known."""
        if self.before is None or self.span_s <= 0:
            return None
        grown = getattr(self.now.status, name) - getattr(self.before.status, name)
        return float(grown) / self.span_s

    def rates_of(self, stream: pb.Subscription) -> tuple[float | None, float | None]:
        """Return what a stream is sent in a second: responses, and their bytes."""
        if self.before is None or self.span_s <= 0:
            return None, None
        was = {each.id: each for each in self.before.subscriptions}.get(stream.id)
        responses = stream.responses - (was.responses if was else 0)
        size = stream.response_bytes - (was.response_bytes if was else 0)
        return responses / self.span_s, size / self.span_s


RATES = ("quotes_accepted", "quotes_conflated", "responses", "response_bytes")


def status_json(change: Change) -> str:
    """Return the newer sample, its rates and its streams as a JSON object in a line."""
    return json.dumps(
        {
            "status": json.loads(message_json(change.now.status)),
            "per_second": {name: change.rate(name) for name in RATES},
            "subscriptions": [
                json.loads(message_json(each)) for each in slowest(change.now)
            ],
        }
    )


def status_line(change: Change) -> str:
    """Return what matters most in a line."""
    status = change.now.status
    down = [each.name for each in status.backends if not each.up]
    slow = next(iter(slowest(change.now)), pb.Subscription())
    return (
        f"{status.server_id}  streams {status.streams:,}"
        f"  quotes in {_rate(change.rate('quotes_accepted'))}"
        f"  responses {_rate(change.rate('responses'))}"
        f"  slowest {_time(slow.lag.ToTimedelta().total_seconds())}"
        f"  recorder lag {_recorder_lag(status)}"
        f"  {'down: ' + ', '.join(down) if down else 'all up'}"
    )


def status_view(
    change: Change, target: str, room: int, lines: int | None = None, silent: str = ""
) -> "Group":
    """Return the newer sample in so many characters and, where given, lines.

    `silent` says why there is no newer one.
    """
    from rich.console import Group
    from rich.text import Text

    status, width = change.now.status, min(room, WIDTH)
    above = [
        _title(status, target, width, silent),
        *_figures(change, width),
        *_problems(status),
        _rule(status, width),
    ]
    streams = slowest(change.now)
    if lines is not None:
        streams = streams[: max(0, lines - len(above) - 3)]
    if not streams:
        return Group(*above, Text("no streams", "dim"))
    rows = [_row(change, stream) for stream in streams]
    return Group(*above, fitted(rows, room, DISPENSABLE))


def slowest(sample: Sample) -> list[pb.Subscription]:
    """Return the streams, those that are behind first."""
    return sorted(sample.subscriptions, key=_behind)


def _behind(stream: pb.Subscription) -> tuple[float, int, int, int]:
    lag_s = stream.lag.ToTimedelta().total_seconds()
    return -lag_s, -stream.pending_bytes, -stream.pending_entries, stream.id


def _process(status: pb.GetServerStatusResponse) -> tuple[str, int]:
    return status.server_id, status.start_time.ToNanoseconds()


# --- Above the streams --------------------------------------------------------


def _title(
    status: pb.GetServerStatusResponse, target: str, room: int, silent: str
) -> "Text":
    from rich.text import Text

    well = not silent and all(each.up for each in status.backends)
    title = Text.assemble(
        ("● ", "green" if well else "red"),
        ("quantplane", "bold"),
        (f"  {printable(target)}", "cyan"),
        f"  {printable(status.server_id)}",
        ("  draining" if status.draining else "", "yellow"),
        (f"  {printable(silent)}" if silent else "", "red"),
        no_wrap=True,
        overflow="ellipsis",
    )
    up_ns = status.server_time.ToNanoseconds() - status.start_time.ToNanoseconds()
    return title.append(f"up {_time(up_ns / 1e9)}".rjust(room - title.cell_len), "dim")


def _figures(change: Change, room: int) -> "Iterator[Text]":
    """Lay out the columns of figures side by side, as many as there is room for."""
    from rich.text import Text

    columns = _columns(change)
    abreast = len(columns)
    while abreast > 1 and sum(FIGURES[:abreast]) + GAP * (abreast - 1) > room:
        abreast //= 2
    for first in range(0, len(columns), abreast):
        shown = columns[first : first + abreast]
        for line in range(max(map(len, shown))):
            yield Text(" " * GAP).join(
                _figure(*column[line], FIGURES[first + number])
                if line < len(column)
                else Text(" " * FIGURES[first + number])
                for number, column in enumerate(shown)
            )


def _columns(change: Change) -> "list[list[tuple[str, str, str]]]":
    """Return (name, value, style) by column."""
    status = change.now.status
    conflated = change.rate("quotes_conflated")
    columns = [
        [
            ("quotes in", _rate(change.rate("quotes_accepted")), ""),
            ("conflated", _rate(conflated), "yellow" if conflated else ""),
            ("streams", f"{status.streams:,} of {status.max_streams:,}", ""),
        ],
        [
            ("responses", _rate(change.rate("responses")), ""),
            ("sent", _size(change.rate("response_bytes"), "/s"), ""),
            *((f"log {each.log}", f"{each.revision:,}", "") for each in status.logs),
        ],
        [
            ("recorder lag", _recorder_lag(status), _lateness(status)),
            ("unrecorded", _size(status.bus.unrecorded_bytes), ""),
            ("at most", _size(status.bus.max_unrecorded_bytes), "dim"),
        ],
        [],
    ]
    for pool in status.pools:
        used = f"{pool.in_use} of {pool.max_size}"
        full = "red" if pool.in_use >= pool.max_size else ""
        columns[-1].append((f"pool {pool.name}", used, full))
        waiting = "red" if pool.waiting else ""
        columns[-1].append(("waiting", f"{pool.waiting}", waiting))
    return columns


def _problems(status: pb.GetServerStatusResponse) -> "Iterator[Text]":
    from rich.text import Text

    line = Text("backends", "dim")
    for each in status.backends:
        line.append("  ● ", "green" if each.up else "red").append(each.name, "")
    yield line
    for each in status.backends:
        if not each.up:
            at_ns = status.server_time.ToNanoseconds()
            for_s = (at_ns - each.change_time.ToNanoseconds()) / 1e9
            text = f"{each.name}, for {_time(for_s)}: {each.problem}"
            yield Text(printable(text), "red", no_wrap=True, overflow="ellipsis")


def _rule(status: pb.GetServerStatusResponse, room: int) -> "Text":
    from rich.text import Text

    return Text(
        f"── {status.streams:,} streams, the slowest first ".ljust(room, "─"), "dim"
    )


def _figure(name: str, value: str, style: str, width: int) -> "Text":
    from rich.text import Text

    return Text.assemble((name, "dim"), (value.rjust(width - len(name)), style))


# --- The streams --------------------------------------------------------------


def _row(change: Change, stream: pb.Subscription) -> "dict[str, Any]":
    responses, size = change.rates_of(stream)
    lag_s = stream.lag.ToTimedelta().total_seconds()
    late = lag_s > LATE_S and stream.state != pb.SUBSCRIPTION_STATE_HISTORY
    return {
        "id": str(stream.id),
        "method": f"{stream.method.rpartition('/')[2]} {stream.feed}".rstrip(),
        "who": stream.username,
        "key": stream.key_id[:KEY],
        "from": unquote(stream.peer).partition(":")[2],
        "state": _state(stream),
        "keys": f"{stream.keys:,}",
        "lag": coloured(_time(lag_s), -late),
        "pending": _size(stream.pending_bytes),
        "entries": f"{stream.pending_entries:,}",
        "conflated": f"{stream.conflated_count:,}",
        "out": _rate(responses),
        "sent": _size(size, "/s"),
        "unread": _unread(stream),
        "open": _time(_open_s(change.now.status, stream)),
    }


def _state(stream: pb.Subscription) -> "Text":
    from rich.text import Text

    said = word(pb.SubscriptionState, stream.state)
    if stream.hold:
        said = f"{said} {word(pb.HoldReason, stream.hold)}"
    return Text(said, COLOURS.get(stream.state, "green"))


def _unread(stream: pb.Subscription) -> str:
    if not stream.max_unacknowledged:
        return ""
    unread = max(0, stream.responses - stream.acknowledged)
    return f"{unread}/{stream.max_unacknowledged}"


def _open_s(status: pb.GetServerStatusResponse, stream: pb.Subscription) -> float:
    now_ns = status.server_time.ToNanoseconds()
    return max(0.0, (now_ns - stream.start_time.ToNanoseconds()) / 1e9)


# --- Values -------------------------------------------------------------------


def _recorder_lag(status: pb.GetServerStatusResponse) -> str:
    if not status.HasField("bus"):
        return "-"
    return _time(status.bus.recorder_lag.ToTimedelta().total_seconds())


def _lateness(status: pb.GetServerStatusResponse) -> str:
    late = status.bus.recorder_lag.ToTimedelta().total_seconds() > LATE_S
    return "red" if late else ""


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}/s"


def _size(value: float | None, per: str = "") -> str:
    if value is None:
        return "-"
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:,.1f} {name}{per}"
    return f"{value:,.0f} B{per}"


def _time(seconds: float) -> str:
    for unit, name in TIMES:
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
