"""Files of this user's that nobody else may read: keys, and logins of the commands."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


class StateProblem(ValueError):
    """A file that others could have read, or that can't be had. The text names it."""


def folder() -> Path:
    """Return where programs keep their state: XDG_STATE_HOME, or ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "quantplane"


def usable() -> bool:
    """Say whether there is a place for files that only this user reads."""
    known = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~") != "~"
    return bool(known) and hasattr(os, "geteuid")


def read(name: str) -> str | None:
    """Return what a file holds; None if it is not there. Raises StateProblem."""
    if not usable():
        return None
    path = folder() / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StateProblem(f"{path} can't be read: {error.strerror}") from None
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        # Of what is open, not of what may be under the name by now.
        _check(path, os.fstat(descriptor))
        return file.read()


def write(name: str, text: str) -> None:
    """Write a file that only this user reads, whole or not at all.

    Raises StateProblem.
    """
    if not usable():
        raise StateProblem("there is no home for files of this user's own")
    path = folder() / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise StateProblem(f"{path} can't be written: {error.strerror}") from None


def remove(name: str) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(folder() / name)


def _replace(path: Path, text: str) -> None:
    # Made with mode 0600, under a name that nobody else has.
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(made, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(made)
        raise


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise StateProblem(f"{path} is not a file of this user's: remove it")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateProblem(
            f"others may read or write {path}: remove it, and consider what is in "
            "it known to them"
        )
