"""A real TimescaleDB for the tests, on a Debian machine, without root.

Debian carries TimescaleDB's Apache edition. Its packages are downloaded with an
apt of our own (own state, own cache, the machine's mirror and keys), unpacked
under `build/timescale`, and run through the C library that came with them, so it
works on older releases, and nothing of the machine's own packages changes.
"""

import asyncio
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from quantplane_server.embedded import Postgres

SUITE = "trixie"
PACKAGE = "postgresql-17-timescaledb"
SERVER = "usr/lib/postgresql/17/bin"
HOME = Path(__file__).parents[1] / "build" / "timescale"

# What PACKAGE needs to run, out of all that apt would install with it. Just-in-time
# compilation (LLVM), Perl's tools and what only sets up a machine stay away.
WANTED = ("postgresql-17", "postgresql-client-17", PACKAGE, "zlib1g")
UNWANTED = (
    *("libllvm", "libz3", "libperl", "libdb5", "libgdbm", "libproc2", "libsemanage"),
    *("libsepol", "libc-bin", "libc-l10n", "libpam-", "libdebconf"),
)
UNUSED = ("usr/share/locale", "usr/share/doc", "usr/lib/postgresql/17/lib/bitcode")

SETTINGS = {
    "jit": "off",
    "max_connections": "200",
    "shared_preload_libraries": "timescaledb",
    "timescaledb.telemetry_level": "off",
    # No workers: each would hold a connection to its database, and a database
    # in use can be neither copied nor dropped.
    "timescaledb.max_background_workers": "0",
}


class TimescaleUnavailable(Exception):
    """There is no TimescaleDB to test with; the message says why."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"the tests need TimescaleDB: {why}. Set QUANTPLANE_TEST_TIMESCALE_DSN "
            "to a server where they may create databases as a superuser"
        )


@contextmanager
def timescale_server() -> Iterator[str]:
    """Yield a superuser's DSN: of the server that is set, or else of a new one."""
    dsn = os.environ.get("QUANTPLANE_TEST_TIMESCALE_DSN")
    if dsn:
        yield dsn
        return
    server = Postgres(bin_dir=_installation() / SERVER)
    try:
        asyncio.run(_start(server))
        yield server.dsn
    finally:
        asyncio.run(server.close())


async def _start(server: Postgres) -> None:
    await server.start()
    connection = await asyncpg.connect(server.dsn)
    for name, value in SETTINGS.items():
        await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await connection.close()
    await server.stop()
    await server.start()


# --- installing ------------------------------------------------------------------


def _installation() -> Path:
    """The unpacked packages: those of an earlier run, if nothing is missing."""
    HOME.mkdir(parents=True, exist_ok=True)
    root = HOME / f"{PACKAGE}-{os.uname().machine}"
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _intact(root):
            _install(root)
    return root


def _install(root: Path) -> None:
    for program in "apt-get", "apt-config", "dpkg":
        if not shutil.which(program):
            raise TimescaleUnavailable(f"this machine has no {program} to get it with")
    for old in root, *HOME.glob("new-*"):  # of runs that were killed
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=HOME, prefix="new-") as new:
        folder = Path(new)
        packages = _download(folder)
        _say("unpacking")
        unpacked = folder / "root"
        unpacked.mkdir(mode=0o755)
        for package in packages:
            _run(["dpkg", "-x", package, unpacked])
        for unused in UNUSED:
            shutil.rmtree(unpacked / unused)
        _wrap_programs(unpacked)
        (unpacked / "manifest").write_text(json.dumps(_manifest(unpacked)))
        unpacked.rename(root)


def _wrap_programs(root: Path) -> None:
    """Start each program with the C library beside it, not the machine's.

    All of them, because they start each other by name.
    """
    library = next(root.glob("usr/lib/*-linux-gnu*"))
    loader = next(library.glob("ld-linux*.so.*"))
    for program in sorted((root / SERVER).iterdir()):
        real = program.rename(program.with_name(f"{program.name}.real"))
        program.write_text(
            "#!/bin/sh\n"
            f'root="${{0%/*}}/{"/".join([".."] * len(Path(SERVER).parts))}"\n'
            f'exec "$root/{loader.relative_to(root)}"'
            f' --library-path "$root/{library.relative_to(root)}"'
            f' "${{0%/*}}/{real.name}" "$@"\n'
        )
        program.chmod(0o755)
        listed = _run([loader, "--library-path", library, "--list", real])
        if "not found" in listed:
            raise TimescaleUnavailable(f"{program.name} lacks a library: {listed}")


def _intact(root: Path) -> bool:
    """Whether every file is there in its full length."""
    try:
        manifest = json.loads((root / "manifest").read_text())
    except (OSError, ValueError):
        return False
    return bool(_manifest(root) == manifest)


def _manifest(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.lstat().st_size
        for path in sorted(root.rglob("*"))
        if path.name != "manifest" and not path.is_dir()
    }


# --- apt -------------------------------------------------------------------------


class Source(NamedTuple):
    """A place that Debian's packages come from, and the keys they are signed with."""

    uri: str
    signed_by: str


def _download(folder: Path) -> list[Path]:
    """Fetch the packages from the first of the machine's sources that has them."""
    refused = "its apt has no source of Debian packages"
    for source in _sources():
        _say(f"asking {source.uri} for Debian {SUITE}")
        apt = _Apt(folder, source)
        try:
            apt.run("update", "-o", "APT::Update::Error-Mode=any")
            wanted = [name for name in apt.closure(PACKAGE) if _is_wanted(name)]
            _say(f"downloading {len(wanted)} packages (40 MB)")
            apt.run("download", *wanted)
            return sorted(folder.glob("*.deb"))
        except TimescaleUnavailable as error:
            refused = error.why
    raise TimescaleUnavailable(refused)


def _is_wanted(package: str) -> bool:
    if package in WANTED:
        return True
    tooling = package.startswith(UNWANTED) or package.endswith(("-perl", "-common"))
    return package.startswith("lib") and not tooling


class _Apt:
    """apt with a state and a cache of its own, and one source."""

    def __init__(self, folder: Path, source: Source) -> None:
        self._folder = folder
        for part in "state/lists/partial", "cache/archives/partial", "tmp":
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources").mkdir(exist_ok=True)
        (folder / "sources/debian.sources").write_text(
            f"Types: deb\nURIs: {source.uri}\nSuites: {SUITE}\nComponents: main\n"
            + (f"Signed-By: {source.signed_by}\n" if source.signed_by else "")
        )
        (folder / "apt.conf").write_text(_apt_conf(folder))

    def run(self, *arguments: str) -> str:
        return _run(["apt-get", "-q", *arguments], env=self._env(), cwd=self._folder)

    def closure(self, package: str) -> list[str]:
        """The names of `package` and of all that it needs on an empty machine."""
        steps = self.run("install", "--simulate", package).splitlines()
        return [line.split()[1] for line in steps if line.startswith("Inst ")]

    def _env(self) -> dict[str, str]:
        own = {"APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        return os.environ | own | {"TMPDIR": str(self._folder / "tmp")}


def _apt_conf(folder: Path) -> str:
    # Of the machine's own settings only those of the network apply: its hooks, for
    # one, may clean up caches that are not ours to touch.
    network = [
        line
        for line in _run(["apt-config", "dump", "Acquire"]).splitlines()
        if not line.startswith("Acquire::IndexTargets")
    ]
    return "\n".join(
        [
            *network,
            'Dir::Etc::Parts "/dev/null";',
            'Dir::Etc::Main "/dev/null";',
            'Dir::Etc::Preferences "/dev/null";',
            'Dir::Etc::PreferencesParts "/dev/null";',
            'Dir::Etc::SourceList "/dev/null";',
            f'Dir::Etc::SourceParts "{folder}/sources";',
            f'Dir::State "{folder}/state";',
            f'Dir::State::status "{folder}/status";',
            f'Dir::Cache "{folder}/cache";',
            'Acquire::Languages "none";',
            'APT::Install-Recommends "false";',
            'APT::Sandbox::User "";',
            'Debug::NoLocking "true";',
            "",
        ]
    )


def _sources() -> list[Source]:
    """Where the machine's apt gets main sections from, Debian's own place first."""
    found: list[Source] = []
    for file in _source_files():
        text = file.read_text()
        found += _stanzas(text) if file.suffix == ".sources" else _one_lines(text)
    return sorted(dict.fromkeys(found), key=lambda s: not s.uri.endswith("/debian"))


def _source_files() -> list[Path]:
    wanted = ["F", "Dir::Etc::SourceList/f", "D", "Dir::Etc::SourceParts/d"]
    told = _run(["apt-config", "shell", *wanted])
    file, folder = (Path(path) for path in re.findall("'(.*)'", told))
    parts = [*folder.glob("*.list"), *folder.glob("*.sources")]
    return [path for path in (file, *sorted(parts)) if path.is_file()]


def _one_lines(text: str) -> Iterator[Source]:
    entry = re.compile(r"^deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+(.*)", re.M)
    for options, uri, suite, components in entry.findall(text):
        if "main" in components.split() and not suite.endswith("-security"):
            keys = re.search(r"signed-by=(\S+)", options)
            yield Source(uri.rstrip("/"), keys[1] if keys else "")


def _stanzas(text: str) -> Iterator[Source]:
    text = re.sub(r"^#.*\n", "", text, flags=re.M)
    for stanza in re.split(r"\n\s*\n", text):
        # A value may go on in indented lines; that of Signed-By may be a whole key.
        fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.M)
        field = defaultdict(str, {name.lower(): value for name, value in fields})
        if field["enabled"] != "no" and "deb" in field["types"].split():
            for uri in field["uris"].split():
                if "main" in field["components"] and "-security" not in field["suites"]:
                    yield Source(uri.rstrip("/"), field["signed-by"])


# --- processes -------------------------------------------------------------------


def _run(command: Sequence[str | Path], **options: Any) -> str:
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode != 0:
        last = " ".join(done.stdout.split()[-60:])
        raise TimescaleUnavailable(f"{Path(command[0]).name} failed: {last}")
    return str(done.stdout)


def _say(what: str) -> None:
    print(f"timescale: {what}", file=sys.stderr, flush=True)
