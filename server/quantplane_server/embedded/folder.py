"""Folders: who may use one, and where the short-lived things go."""

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from .errors import EmbeddedError
from .guardian import STOP_S, note, recorded

SOCKET_NAME_BYTES = 64  # what of the ~104 that a socket's path may have is ours


async def lock(path: Path) -> int:
    """Take the lock at `path` and return its descriptor.

    The guardian and the service inherit the descriptor, so the lock is free when
    the last of their processes is gone, and not before. One that is about to stop
    is waited for.
    """
    descriptor = private(str(path), os.O_RDWR | os.O_CREAT)
    began = time.monotonic()
    try:
        while not _take(descriptor):
            holder = recorded(descriptor)
            server = holder.get("server", 0)
            stopping = holder.get("stopping") or not _alive(server)
            if time.monotonic() - began > (STOP_S + 10 if stopping else 1):
                process = server if _alive(server) else holder.get("service")
                raise EmbeddedError(
                    f"the data folder {path.parent} is in use by process {process};"
                    " stop it or choose another with --data-dir"
                )
            await asyncio.sleep(0.02)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def running(path: Path) -> str | None:
    """The address of the service that holds the lock at `path`, if one does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        holder = recorded(descriptor)
        free = holder.get("stopping") or _take(descriptor)
        return None if free else holder.get("address")
    finally:
        os.close(descriptor)


def claim(descriptor: int, address: str) -> None:
    note(descriptor, server=os.getpid(), service=0, address=address, stopping=False)


def scratch() -> Path:
    """Make a private folder for sockets, with a path short enough for them."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > SOCKET_NAME_BYTES:
        parent = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="quantplane-", dir=parent))
    if os.geteuid() == 0:  # another account may pass to what is given to it inside
        folder.chmod(0o711)
    return folder


def private(path: str, flags: int) -> int:
    """An opener for files that only this user reads."""
    return os.open(path, flags, 0o600)


def own(folder: Path, uid: int, gid: int) -> None:
    """Give `folder` and all it holds to an account, as root."""
    if folder.stat().st_uid == uid:
        return
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in folders + files:
            os.chown(os.path.join(parent, name), uid, gid, follow_symlinks=False)
    os.chown(folder, uid, gid)  # last: it marks the work as done


def move(source: Path, target: Path) -> None:
    """Rename a folder so that the new name survives a power cut."""
    source.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process > 0
