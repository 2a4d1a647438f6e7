"""The account that PostgreSQL runs under, since it refuses to run as root."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import EmbeddedError


@dataclass(frozen=True)
class Account:
    """How to start a process: as another user, behind another command, or neither."""

    uid: int | None = None
    gid: int | None = None
    prefix: tuple[str, ...] = ()

    @property
    def owner(self) -> tuple[int, int]:
        """Whose files the processes see as their own, from outside."""
        if self.uid is None or self.gid is None:
            return os.geteuid(), os.getegid()
        return self.uid, self.gid

    def run(
        self, *command: str | Path, lock: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.prefix, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            pass_fds=[] if lock is None else [lock],
            start_new_session=True,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
        )

    def can(self, *command: str | Path) -> bool:
        try:
            return self.run(*command).returncode == 0
        except OSError:
            return False

    def can_reach(self, folders: Iterable[Path]) -> bool:
        # Asked of the kernel, which also knows of access lists and mounts.
        return self.can("/bin/sh", "-c", 'for f do cd "$f" || exit; done', "", *folders)


def unprivileged(
    bin_dir: Path, folders: Iterable[Path], scratch: Path
) -> tuple[Account, Path]:
    """An account that may run PostgreSQL, and the bin folder to run it from.

    It reaches all of `folders` as they are: no mode of any folder is changed.
    """
    root = os.geteuid() == 0
    if not root and _named(os.geteuid()):
        return Account(), bin_dir

    uid, gid = nobody()
    switched = Account(uid, gid)
    reachable = root and switched.can_reach(folders)
    if reachable and switched.can(bin_dir / "postgres", "--version"):
        return switched, bin_dir

    # Still the same account outside, so it reaches whatever the server reaches.
    # initdb wants an account with a name, and this one has one.
    names = (f"--map-user={uid}", f"--map-group={gid}")
    mapped = Account(prefix=("unshare", "--user", *names))
    if mapped.can(bin_dir / "postgres", "--version"):
        return mapped, bin_dir

    if reachable:
        return switched, _copied(bin_dir, scratch)
    raise EmbeddedError(
        "PostgreSQL cannot run as this user, and neither user namespaces nor a data"
        " folder that the user `nobody` can reach are at hand: run as an ordinary"
        " user, or choose another folder with --data-dir"
    )


def nobody() -> tuple[int, int]:
    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid


def _named(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _copied(bin_dir: Path, scratch: Path) -> Path:
    """Copy the installation to where everybody may read it."""
    package = bin_dir.parent.parent
    target = scratch / "installation"
    skip = shutil.ignore_patterns("include", "__pycache__")
    for folder in (package, package.with_name(package.name + ".libs")):
        if folder.exists():
            copy = target / folder.name
            shutil.copytree(folder, copy, symlinks=True, ignore=skip)
            copy.chmod(0o755)
    target.chmod(0o755)
    return target / bin_dir.relative_to(package.parent)
