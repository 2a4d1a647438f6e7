"""Restoring a backup: all of it, and equal to what was written, or nothing."""

from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from quantplane_server import migrate

from . import fingerprint, subset, target, tools
from .archive import Archive
from .errors import BackupError
from .manifest import Manifest, Part, dump_of
from .progress import Progress
from .session import explained, libpq, session
from .target import Terms

SHOWN = 5  # differences


async def restore(
    dsns: Mapping[str, str], path: Path, terms: Terms, progress: Progress
) -> Manifest:
    """Restore a backup into empty databases, or some tables into empty tables.

    Raises BackupError, and changes nothing then: what does not fit is refused before
    anything is touched, and whatever fails later leaves the databases empty again.
    """
    with Archive(path) as archive:
        manifest = archive.manifest
        _check_databases(manifest, dsns)
        _check_revisions(manifest)
        progress.step(f"reading {path}")
        await archive.check(progress.bytes)
        with explained("the target"):
            if manifest.whole:
                await _restore(archive, dsns, terms, progress)
            else:
                await subset.load(archive, dsns, progress)
    return manifest


def _check_databases(manifest: Manifest, dsns: Mapping[str, str]) -> None:
    if not manifest.whole or set(manifest.databases) == set(dsns):
        return
    if "reference" in manifest.databases:
        raise BackupError(
            "the backup is of two databases, and the settings name one",
            "QUANTPLANE_REFERENCE_DSN must name the second",
        )
    raise BackupError(
        "the backup is of one database, and the settings name two",
        "leave QUANTPLANE_REFERENCE_DSN out",
    )


def _check_revisions(manifest: Manifest) -> None:
    for part in manifest.databases.values():
        for revision in part.revisions.values():
            if not migrate.knows(revision):
                raise BackupError(
                    f"the backup's schema is at {revision}, which this server does not"
                    " know",
                    "restore it with the server that wrote it, or a newer one",
                )


async def _restore(
    archive: Archive, dsns: Mapping[str, str], terms: Terms, progress: Progress
) -> None:
    parts = archive.manifest.databases
    async with AsyncExitStack() as stack:
        locks = {
            name: await stack.enter_async_context(target.locked(dsn))
            for name, dsn in dsns.items()
        }
        programs = {}
        for name, part in parts.items():
            await target.check(locks[name], dsns[name], part, terms)
            major = locks[name].get_server_version().major
            programs[name] = tools.find(major, part.tools_major)
        try:
            for name, part in parts.items():
                await target.begin(locks[name], dsns[name], part.timescaledb)
                with libpq(dsns[name]) as uri:
                    await _load(archive, name, uri, programs[name], terms, progress)
                await _verify(name, dsns[name], part, progress)
            for name, part in parts.items():
                await target.finish(dsns[name], part.timescaledb)
        except BaseException:
            progress.step("emptying the target again")
            for dsn in dsns.values():
                await target.empty(dsn)
            raise


async def _load(
    archive: Archive,
    name: str,
    uri: str,
    programs: tools.Tools,
    terms: Terms,
    progress: Progress,
) -> None:
    progress.step(f"restoring {name}")
    options = ["--exit-on-error", f"--dbname={uri}"]
    if not terms.owners:
        options += ["--no-owner", "--no-privileges"]
    async with tools.running(programs.folder / "pg_restore", *options) as run:
        assert run.stdin
        size = 0
        # It has failed if it does not read on, and says why.
        with suppress(ConnectionError):
            async for chunk in archive.read(dump_of(name)):
                run.stdin.write(chunk)
                await run.stdin.drain()
                size += len(chunk)
                progress.bytes(size)
        progress.detail("keys and indexes")


async def _verify(name: str, dsn: str, part: Part, progress: Progress) -> None:
    async with session(dsn) as connection:
        if part.timescaledb:
            # For this session only: jobs that compress or drop chunks wait until all
            # is compared.
            await connection.execute("SET timescaledb.restoring = off")
        progress.step(f"comparing {name}")
        await connection.execute("ANALYZE")
        found = await fingerprint.describe(
            connection, part.tools_major, progress.detail
        )
    differences = list(part.differences(found))
    if differences:
        more = len(differences) - SHOWN
        raise BackupError(
            f"what was restored is not what {name} was: "
            + "; ".join(differences[:SHOWN])
            + (f"; and {more} more" if more > 0 else ""),
            "nothing else may use the database during a restore: stop the servers",
        )
