"""What does not fit is refused in a sentence, before anything is touched."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from quantplane_server.backup import BackupError
from quantplane_server.backup.archive import Archive
from quantplane_server.backup.tools import Tools
from tests.backup import (
    backup,
    connected,
    leftovers,
    restore,
    rewritten,
    run,
    with_manifest,
)
from tests.backup.conftest import Source
from tests.conftest import both_editions
from tests.postgres import database

Change = Callable[[Any], None]


async def refused(file: Path, dsn: str, why: str, **terms: bool) -> None:
    """Restoring must fail, and leave the empty database as it is."""
    before = await leftovers(dsn)
    with pytest.raises(BackupError, match=why):
        await restore(file, dsn, **terms)
    assert await leftovers(dsn) == before


def part(change: Change) -> Change:
    return lambda manifest: change(manifest["databases"]["timeseries"])


# --- The file -----------------------------------------------------------------------


async def test_a_file_that_is_cut_short_is_refused(
    source: Source, untouched: str, tmp_path: Path
):
    whole = source.file.read_bytes()
    cut = tmp_path / "cut"
    for size in (len(whole) - 1, len(whole) - 30, len(whole) // 2, 100, 4):
        cut.write_bytes(whole[:size])
        await refused(cut, untouched, "is cut short")


async def test_a_flipped_bit_is_told_or_changes_nothing(source: Source, tmp_path: Path):
    async def read(path: Path) -> dict[str, bytes]:
        with Archive(path) as archive:
            await archive.check(lambda _: None)
            dump = [chunk async for chunk in archive.read("timeseries.dump")]
            return {
                "manifest": archive.manifest.model_dump_json().encode(),
                "dump": b"".join(dump),
            }

    whole, written = source.file.read_bytes(), await read(source.file)
    directory = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"PK\x01\x02"))
    places = random.Random(1).sample(range(len(whole)), 100)
    places += range(60), range(directory, len(whole))  # what makes it a ZIP
    flipped, told = tmp_path / "flipped", 0
    for place in [p for r in places for p in (r if isinstance(r, range) else [r])]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        flipped.write_bytes(data)
        try:
            assert await read(flipped) == written
        except BackupError:
            told += 1
    assert told > 100
    data = bytearray(whole)
    data[len(whole) // 3] ^= 1
    flipped.write_bytes(data)
    # All of it is read before the target is looked at.
    await refused(flipped, source.dsn, "is damaged: Bad CRC-32")


async def test_other_files_are_no_backups(
    source: Source, untouched: str, tmp_path: Path
):
    text, foreign, dump = tmp_path / "text", tmp_path / "foreign", tmp_path / "dump"
    text.write_text("time,symbol,close\n" * 100)
    with ZipFile(foreign, "w") as zip:
        zip.writestr("readme.txt", "a ZIP")
    with ZipFile(source.file) as zip:
        dump.write_bytes(zip.read("timeseries.dump"))
    await refused(text, untouched, "is no backup by quantplane")
    await refused(foreign, untouched, "is no backup by quantplane")
    await refused(dump, untouched, "is a dump by pg_dump")
    await refused(tmp_path / "nothing", untouched, "can't be read: No such file")
    await refused(tmp_path, untouched, "can't be read: Is a directory")


async def test_a_manifest_must_be_one_and_name_the_members(
    source: Source, untouched: str, tmp_path: Path
):
    file = tmp_path / "file"
    for manifest in (b"", b"[1]", b"{}", b'{"format": 1}', b'{"format": "x"}'):
        rewritten(
            source.file,
            file,
            lambda name, data, manifest=manifest: manifest if "json" in name else data,
        )
        await refused(file, untouched, "is no backup by quantplane")
    rewritten(source.file, file, lambda name, data: data if "json" in name else None)
    await refused(file, untouched, "has not what its manifest says")


async def test_a_newer_format_is_refused(
    source: Source, untouched: str, tmp_path: Path
):
    file = with_manifest(source.file, tmp_path / "file", lambda m: m.update(format=2))
    await refused(file, untouched, "has format 2, this server reads 1")


async def test_a_newer_schema_is_refused(
    source: Source, untouched: str, tmp_path: Path
):
    change = part(lambda p: p["revisions"].update(timeseries="9999"))
    file = with_manifest(source.file, tmp_path / "file", change)
    await refused(file, untouched, "schema is at 9999, which this server does not know")


# --- The target ---------------------------------------------------------------------


async def test_a_database_that_is_not_empty_is_refused(source: Source, empty: str):
    for kind, definition, told in (
        ("TABLE", "(n int)", "table public.mine"),
        ("TABLE", "(n int) PARTITION BY RANGE (n)", "table public.mine"),
        ("VIEW", "AS SELECT 1 AS n", "view public.mine"),
        ("SEQUENCE", "", "sequence public.mine"),
        ("TYPE", "AS ENUM ('a')", "type public.mine"),
        ("FUNCTION", "() RETURNS int RETURN 1", r"function public.mine\(\)"),
        ("SCHEMA", "", "schema mine"),
    ):
        async with connected(empty) as connection:
            await connection.execute(f"CREATE {kind} mine {definition}")
        await refused(source.file, empty, f"is not empty: it has the {told}")
        async with connected(empty) as connection:
            await connection.execute(f"DROP {kind} mine")


@both_editions
async def test_the_database_that_was_backed_up_is_refused(dsn: str, tmp_path: Path):
    await refused(await backup(dsn, tmp_path / "file"), dsn, "is not empty")


@pytest.mark.parametrize("newer", [1, -1], ids=["older", "newer"])
async def test_another_major_version_of_postgresql_is_refused(
    source: Source, untouched: str, tmp_path: Path, newer: int
):
    change = part(lambda p: p.update(server_major=p["server_major"] + newer))
    file = with_manifest(source.file, tmp_path / "file", change)
    await refused(
        file, untouched, r"is of PostgreSQL \d+ and the target is PostgreSQL \d+"
    )


async def test_a_newer_postgresql_is_taken_where_that_is_wanted(
    source: Source, empty: str, tmp_path: Path
):
    change = part(lambda p: p.update(server_major=p["server_major"] - 1))
    file = with_manifest(source.file, tmp_path / "file", change)
    await restore(file, empty, upgrade=True)


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_a_server_without_timescaledb_is_refused(
    source: Source, postgres_dsn: str
):
    async with database(postgres_dsn, migrated=False) as plain:
        why = "which the target's server does not have"
        await refused(source.file, plain, why, upgrade=True)


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_another_timescaledb_is_refused(
    source: Source, empty: str, tmp_path: Path
):
    change = part(lambda p: p.update(timescaledb="2.1.0"))
    file = with_manifest(source.file, tmp_path / "file", change)
    await refused(file, empty, "is of TimescaleDB 2.1.0, which the target's server")
    async with connected(empty) as connection:
        await connection.execute("CREATE EXTENSION timescaledb")
    await refused(file, empty, r"TimescaleDB 2.1.0 and the target database has \d")


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_a_lower_edition_is_refused(source: Source, empty: str, tmp_path: Path):
    file = with_manifest(
        source.file, tmp_path / "file", part(lambda p: p.update(edition="community"))
    )
    manifest = json.loads(ZipFile(source.file).read("manifest.json"))
    if manifest["databases"]["timeseries"]["edition"] == "apache":
        await refused(file, empty, "community edition and the target is of the apache")
    else:
        await restore(file, empty)


@pytest.mark.parametrize("edition", ["timescale"], indirect=True)
async def test_a_plain_database_is_not_restored_over_the_extension(
    postgres_source: Source, empty: str, tmp_path: Path
):
    async with connected(empty) as connection:
        await connection.execute("CREATE EXTENSION timescaledb")
    # It is of a newer PostgreSQL, which is another reason.
    change = part(lambda p: p.update(server_major=15))
    file = with_manifest(postgres_source.file, tmp_path / "file", change)
    why = "a database without TimescaleDB, and the target"
    await refused(file, empty, why, upgrade=True)


async def test_roles_that_are_not_there_are_told(
    source: Source, empty: str, tmp_path: Path
):
    change = part(lambda p: p["roles"].append("somebody"))
    file = with_manifest(source.file, tmp_path / "file", change)
    await refused(file, empty, "of somebody, which the target's server does not know")
    await restore(file, empty, owners=False)


async def test_two_databases_are_needed_for_two(
    source: Source, empty: str, postgres_dsn: str, tmp_path: Path
):
    async with database(postgres_dsn, migrated=False) as other:
        both = {"timeseries": empty, "reference": other}
        with pytest.raises(
            BackupError, match="one database, and the settings name two"
        ):
            await restore(source.file, both)
        file = tmp_path / "file"
        await backup({"timeseries": source.dsn, "reference": source.dsn}, file)
        await refused(file, empty, "is of two databases, and the settings name one")
        async with connected(other) as connection:
            await connection.execute("CREATE TABLE mine ()")
        with pytest.raises(BackupError, match="is not empty"):
            await restore(file, both)
        assert await leftovers(empty) == []
        same = {"timeseries": empty, "reference": empty}
        with pytest.raises(BackupError, match="is under way"):
            await restore(file, same)


# --- Backups ------------------------------------------------------------------------


async def test_a_backup_overwrites_nothing(source: Source, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("dear to me")
    with pytest.raises(BackupError, match="overwrite nothing"):
        await backup(source.dsn, file)
    assert file.read_text() == "dear to me"
    with pytest.raises(BackupError, match="can't be written: No such file"):
        await backup(source.dsn, tmp_path / "nowhere" / "file")


async def test_a_database_that_is_not_quantplanes_is_refused(
    empty: str, tmp_path: Path
):
    with pytest.raises(BackupError, match="no schema of quantplane"):
        await backup(empty, tmp_path / "file")
    assert os.listdir(tmp_path) == []


async def test_errors_are_a_sentence_and_a_hint(source: Source, tmp_path: Path):
    code, out, err = await run(
        "restore", source.file, QUANTPLANE_POSTGRES_DSN=source.dsn
    )
    last = err.splitlines()[-2:]
    assert (code, out) == (1, "")
    assert last[0].startswith("quantplane-server: the target database is not empty")
    assert last[1].startswith("  hint: ")
    away = "postgresql://127.0.0.1:1/x"
    code, _, err = await run("backup", tmp_path / "f", QUANTPLANE_POSTGRES_DSN=away)
    assert (code, "can't be reached" in err.splitlines()[-1]) == (1, True)


@pytest.mark.parametrize(
    ("major", "server", "written_by", "serves"),
    [
        (18, 18, 0, True),
        (18, 17, 0, True),
        (17, 18, 0, False),
        (17, 17, 18, False),  # may not read what a newer one has written
        (18, 17, 18, True),
        (18, 15, 0, False),  # would set what PostgreSQL 15 does not know
        (16, 15, 0, True),
        (16, 15, 16, True),
    ],
)
def test_tools_fit_a_server(major: int, server: int, written_by: int, serves: bool):
    assert Tools(Path(), major).serves(server, written_by) is serves
