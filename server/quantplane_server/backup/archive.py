"""The file of a backup: a ZIP of what pg_dump or COPY wrote, and its manifest.

The manifest comes last and the ZIP's directory behind it, so a file that was cut
short is told at once. Every member has a checksum, so a damaged one is too. Nothing
is compressed: a dump is already.
"""

import asyncio
import fcntl
import json
import os
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self
from zipfile import BadZipFile, ZipFile, is_zipfile

from pydantic import ValidationError

from .errors import BackupError
from .manifest import FORMAT, Manifest

MANIFEST = "manifest.json"
CHUNK = 1 << 20

# What reading a damaged ZIP can raise.
DAMAGED = (
    *(BadZipFile, EOFError, OSError, ValueError, KeyError, struct.error, zlib.error),
    *(NotImplementedError, RuntimeError),  # of flipped flags: methods, encryption
)


class Writer:
    """Writes a backup, which has its name only once it is whole.

    Until then it is FILE.partial, which goes if the block fails. Raises BackupError
    where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with self._explained():
            if self._path.exists():
                raise BackupError(
                    f"{self._path} exists, and backups overwrite nothing",
                    "give another name",
                )
            # Taken over from a backup that was killed, but not from one that runs.
            self._file = os.fdopen(
                os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b"
            )
            self._open.enter_context(self._file)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._open.close()
                raise BackupError(
                    f"another backup writes {self._partial} now"
                ) from None
            self._file.truncate()
            self._zip = self._open.enter_context(ZipFile(self._file, "w"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            if kind is None:
                with self._explained():
                    self._finish()
                whole = True
        finally:
            with suppress(OSError):  # the disk may be full
                self._open.close()
            if not whole:
                self._partial.unlink(missing_ok=True)

    @contextmanager
    def member(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Yield what writes the next bytes of a member."""
        with self._explained():
            member = self._zip.open(name, "w", force_zip64=True)

        def write(data: bytes) -> None:
            with self._explained():
                member.write(data)

        try:
            yield write
        except BaseException:
            with suppress(OSError):
                member.close()
            raise
        with self._explained():
            member.close()

    def finish(self, manifest: Manifest) -> None:
        with self.member(MANIFEST) as write:
            write(manifest.model_dump_json(indent=1).encode())

    def _finish(self) -> None:
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackupError(
                f"{self._path} can't be written: {error.strerror or error}"
            ) from error


class Archive:
    """A backup to read. Raises BackupError for what is none, or damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise BackupError(f"{path} can't be read: {error.strerror}") from error
        try:
            self._zip = self._opened()
            self.manifest = self._read_manifest()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    async def check(self, progress: Callable[[int], None]) -> None:
        """Read all of it, to see whether it is as it was written.

        Tells the bytes that were read so far.
        """
        size = 0
        for name in self.manifest.members():
            async for chunk in self.read(name):
                size += len(chunk)
                progress(size)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield a member's bytes."""
        with self._damage_explained():
            member = self._zip.open(name)
        with member:
            while True:
                with self._damage_explained():
                    chunk = member.read(CHUNK)
                if not chunk:
                    return
                yield chunk
                await asyncio.sleep(0)  # a moment for Ctrl-C

    def _opened(self) -> ZipFile:
        start = self._file.read(5)
        if start == b"PGDMP":
            raise BackupError(
                f"{self._path} is a dump by pg_dump and no backup by quantplane",
                "pg_restore reads it; it may not be whole if TimescaleDB was in it",
            )
        if not start.startswith(b"PK\x03\x04"):
            raise BackupError(f"{self._path} is no backup by quantplane")
        if not is_zipfile(self._file):
            raise BackupError(
                f"{self._path} is cut short", "take another backup, or copy it again"
            )
        with self._damage_explained():
            return ZipFile(self._file)

    def _read_manifest(self) -> Manifest:
        names = self._zip.namelist()
        if MANIFEST not in names:
            raise BackupError(f"{self._path} is no backup by quantplane")
        with self._damage_explained():
            text = self._zip.read(MANIFEST)
        try:
            format = json.loads(text)["format"]
            if isinstance(format, int) and format > FORMAT:
                raise BackupError(
                    f"{self._path} has format {format}, this server reads {FORMAT}",
                    "restore it with the server that wrote it, or a newer one",
                )
            manifest = Manifest.model_validate_json(text)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise BackupError(f"{self._path} is no backup by quantplane") from error
        if sorted(names) != sorted([MANIFEST, *manifest.members()]):
            raise BackupError(f"{self._path} has not what its manifest says")
        return manifest

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            raise BackupError(
                f"{self._path} is damaged: {error}",
                "take another backup, or copy it again",
            ) from error
