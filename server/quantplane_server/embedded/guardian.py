"""Keeps one service alive exactly as long as the process that started it.

Runs on its own, outside the package, between the server and the service:
`python guardian.py PLAN`, where PLAN is JSON with the fields of `Plan`. Its
standard input is a pipe from the server that carries one command, `s` (stop) or
`k` (kill). The end of that pipe means that the server is gone, however it went.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any, TypedDict

STOP_S = 20.0  # a service that takes longer to stop is killed
LOG_BYTES = 8_000_000  # the log and the one before it are kept
PR_SET_PDEATHSIG = 1


class Plan(TypedDict):
    command: list[str]
    uid: int | None
    gid: int | None
    stop_signal: int
    log: str
    lock: int
    """Descriptor of the locked file; the service inherits the lock."""
    scratch: str
    """Removed after a server that could not do it."""


def main(plan: Plan) -> None:
    server = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The server decides when to stop, even if a whole group was signalled.
        # A handler and not SIG_IGN, which the service would inherit.
        signal.signal(number, lambda *_: None)
    os.umask(0o077)
    output, service_output = os.pipe()
    service = _spawn(plan, service_output)
    os.close(service_output)
    note(plan["lock"], service=service.pid)

    log = threading.Thread(target=_copy, args=(output, plan["log"]), daemon=True)
    log.start()
    threading.Thread(target=_obey, args=(service, plan), daemon=True).start()
    service.wait()
    note(plan["lock"], stopping=True)
    log.join(1)
    if os.getppid() != server:
        shutil.rmtree(plan["scratch"], ignore_errors=True)


def note(lock: int, **changes: Any) -> None:
    """Change fields of the record that the locked file carries."""
    record = json.dumps(recorded(lock) | changes).encode()
    os.pwrite(lock, record, 0)
    os.ftruncate(lock, len(record))


def recorded(lock: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(lock, 4096, 0)))
    except ValueError:  # a new file, or one that is being written
        return {}


def _spawn(plan: Plan, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        plan["command"],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[plan["lock"]],
        user=plan["uid"],
        group=plan["gid"],
        extra_groups=None if plan["uid"] is None else [],
        preexec_fn=lambda: _stop_with_parent(plan["stop_signal"]),
    )


def _stop_with_parent(number: int) -> None:
    # The second net, where the kernel has it: for a guardian that is killed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _obey(service: subprocess.Popen[bytes], plan: Plan) -> None:
    command = os.read(0, 1)
    note(plan["lock"], stopping=True)
    service.send_signal(signal.SIGKILL if command == b"k" else plan["stop_signal"])
    try:
        service.wait(STOP_S)
    except subprocess.TimeoutExpired:
        service.kill()


def _copy(output: int, path: str) -> None:
    while chunk := os.read(output, 65536):
        # A full disk must not stop the reading: the service would block.
        with contextlib.suppress(OSError):
            if os.path.exists(path) and os.path.getsize(path) > LOG_BYTES:
                os.replace(path, path + ".1")
            with open(path, "ab") as log:
                log.write(chunk)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
