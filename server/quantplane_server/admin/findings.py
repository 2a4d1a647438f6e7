"""What the doctor says: findings, and how they are told."""

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import AsyncIterator
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
DISK_WARN, DISK_FAIL_BYTES = 0.1, 1 << 30


class Mark(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    mark: Mark
    found: str
    mend: str = ""  # a command, a statement, a setting: what to do about it
    subject: str = ""


def ok(found: str) -> Finding:
    return Finding(Mark.OK, found)


def warn(found: str, mend: str) -> Finding:
    return Finding(Mark.WARN, found, mend)


def fail(found: str, mend: str) -> Finding:
    return Finding(Mark.FAIL, found, mend)


def skew(offset_s: float) -> Finding:
    """Judge how far another machine's clock is ahead of this one's."""
    ahead = "ahead of" if offset_s > 0 else "behind"
    found = f"{abs(offset_s):.3f} s {ahead} this machine's"
    mend = "let both machines set their clocks by NTP"
    if abs(offset_s) > SKEW_FAIL_S:
        return fail(found, mend)
    return warn(found, mend) if abs(offset_s) > SKEW_WARN_S else ok(found)


def disk(folder: str | None) -> Finding:
    """Judge the room where a folder of this machine is; None: of another machine."""
    try:
        usage = shutil.disk_usage(folder) if folder else None
    except OSError:
        usage = None
    if usage is None:
        return ok("free space unknown: not to be seen from here")
    found = f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB free at {folder}"
    mend = "make room, or shorten the retention"
    if usage.free < DISK_FAIL_BYTES:
        return fail(found, mend)
    return warn(found, mend) if usage.free < DISK_WARN * usage.total else ok(found)


# --- Telling ------------------------------------------------------------------------

STYLES = {Mark.OK: "green", Mark.WARN: "yellow", Mark.FAIL: "bold red"}
NARROWEST = 60  # characters


async def tell(findings: AsyncIterator[Finding]) -> bool:
    """Print findings as they come; return whether none of them is a failure."""
    console = Console(highlight=False, markup=False)
    marks = Counter[Mark]()
    async for finding in findings:
        console.print(_lines(finding, console), soft_wrap=True)
        marks[finding.mark] += 1
    told = f"{marks[Mark.FAIL]} to mend, {marks[Mark.WARN]} to look at"
    console.print(told if marks[Mark.FAIL] + marks[Mark.WARN] else "all is well")
    return not marks[Mark.FAIL]


def _lines(finding: Finding, console: Console) -> Text:
    """Return a finding, wrapped where it goes to a terminal, with its cure below."""
    start = f"{finding.mark:<6}{finding.subject:<24}"
    width = max(console.width, NARROWEST) if console.is_terminal else sys.maxsize
    wrap = partial(
        textwrap.wrap,
        width=width,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = wrap(finding.found, initial_indent=start)
    if finding.mend:
        lines += wrap(f"-> {finding.mend}", initial_indent=" " * len(start))
    text = Text("\n".join(lines))
    text.stylize(STYLES[finding.mark], 0, len(finding.mark))
    return text
