"""As root and as an ordinary user, and never at the cost of somebody's folders."""

import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quantplane_server.embedded import EmbeddedError, Postgres, services
from quantplane_server.embedded.binaries import postgres_bin
from tests.embedded import ROOT, connected, gone, server, valkey

as_root = pytest.mark.skipif(not ROOT, reason="needs root")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def owners(folder: Path) -> list[tuple[Path, int, int, int]]:
    stats = [(f, f.stat()) for f in (folder, *folder.parents, postgres_bin())]
    return [(f, s.st_mode, s.st_uid, s.st_gid) for f, s in stats]


@pytest.mark.parametrize("folder", ["public", "tmp_path"])
async def test_starting_changes_no_folder_above_the_data(
    folder: str, request: pytest.FixtureRequest
):
    data = request.getfixturevalue(folder)
    before = owners(data)
    async with services(data) as s:
        async with connected(s.postgres_dsn) as sql:
            assert await sql.fetchval("SELECT 1") == 1
        assert await valkey(s.redis_url, "PING") == "+PONG"
    assert owners(data) == before


@as_root
async def test_root_runs_postgresql_as_nobody_and_in_a_folder_that_only_root_reaches(
    public: Path,
):
    async with Postgres(public) as postgres:
        assert psutil.Process(postgres.pid).username() == "nobody"
    private = public / "private"
    private.mkdir(mode=0o700)
    shutil.move(public / "postgres", private)
    async with Postgres(private) as postgres, connected(postgres.dsn) as sql:
        assert await sql.fetchval("SELECT 1") == 1
        assert (private / "postgres").stat().st_uid == 0


@as_root
@pytest.mark.parametrize("path", ["/usr/bin:/bin", ""])
async def test_root_runs_an_installation_that_only_root_reaches(
    path: str, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = postgres_bin().parents[1]
    skip = shutil.ignore_patterns("include")
    for name in (package.name, package.name + ".libs"):
        shutil.copytree(package.with_name(name), tmp_path / name, ignore=skip)
    bin_dir = tmp_path / package.name / "pginstall/bin"
    monkeypatch.setenv("PATH", path)  # without it there is no `unshare`
    before = owners(bin_dir)
    async with Postgres(public, bin_dir=bin_dir) as postgres:
        user = psutil.Process(postgres.pid).username()
        assert user == ("root" if path else "nobody")
    assert owners(bin_dir) == before


@as_root
async def test_root_leaves_a_folder_of_an_ordinary_user_alone(tmp_path: Path):
    for name in ("postgres", "valkey"):
        (tmp_path / name).mkdir()
        shutil.chown(tmp_path / name, "daemon")
    with pytest.raises(EmbeddedError, match="belongs to user daemon; start as"):
        async with services(tmp_path):
            pass
    assert list((tmp_path / "valkey").iterdir()) == []


@as_root
def test_both_start_as_an_ordinary_user(public: Path):
    user = pwd.getpwnam("nobody")
    python = python_for(user.pw_uid)
    data = public / "data"
    data.mkdir()
    shutil.chown(data, user.pw_uid, user.pw_gid)
    with server(data, user.pw_uid, python) as ordinary:
        assert ordinary.acknowledged() == 0
        everything = ordinary.everything()
        assert {p.username() for p in everything} == {"nobody"}
        ordinary.process.kill()
        assert gone(everything)


def python_for(uid: int) -> str:
    """A Python of this version that the user may run; ours may be in root's home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            subprocess.run([python, "-V"], user=uid, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("no Python of this version that an ordinary user may run")
