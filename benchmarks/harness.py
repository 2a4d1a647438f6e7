"""What a benchmark runs on: real services, a real server, children, and its rounds."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg
import redis.asyncio as redis

from quantplane.credentials import VARIABLE
from quantplane_server import embedded
from quantplane_server.identity.keys import new_secret
from quantplane_server.identity.local import OwnKey, put_keys
from quantplane_server.migrate import upgrade
from quantplane_server.processes import READY

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
LOG = BUILD / "bench.log"  # standard error of every process

ANSWER_S = 30.0  # for anything that a process is to say
STOP_S = 5.0  # for a process to end by itself
LINE_BYTES = 16 << 20  # of JSON from a child, at most

Sample = dict[str, float]
"""What one round measured: `value`, and whatever else is worth reporting."""

Measure = Callable[[], Awaitable[Sample]]


@dataclass
class Figure:
    """A measured value beside its baseline, both medians of their rounds."""

    value: float
    unit: str
    baseline: float
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, unit: str, ours: list[Sample], baseline: list[Sample]) -> Self:
        value, rest = _medians(ours)
        base, base_rest = _medians(baseline)
        rest |= {f"baseline_{name}": number for name, number in base_rest.items()}
        rest["rounds"] = [
            [_rounded(a["value"]), _rounded(b["value"])]
            for a, b in zip(ours, baseline, strict=True)
        ]
        return cls(value, unit, base, rest)

    @property
    def ratio(self) -> float:
        return self.value / self.baseline

    def as_json(self) -> dict[str, Any]:
        return {
            "value": _rounded(self.value),
            "unit": self.unit,
            "baseline": _rounded(self.baseline),
            "ratio": _rounded(self.ratio),
            **self.extra,
        }


class Process:
    """A process that ends when its standard input does."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name

    @classmethod
    async def start(
        cls, *arguments: str, name: str, environment: Mapping[str, str] | None = None
    ) -> Self:
        with LOG.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=LINE_BYTES,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the parent alone
            )
        return cls(process, name)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line(self) -> str:
        assert self._process.stdout
        try:
            async with asyncio.timeout(ANSWER_S):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise RuntimeError(
                f"{self._name} was silent for {ANSWER_S:.0f} s"
            ) from None
        if not line:
            code = await self._process.wait()
            raise RuntimeError(f"{self._name} ended with exit code {code}: see {LOG}")
        return line.decode().rstrip("\n")

    async def hear(self) -> dict[str, Any]:
        """Return the next thing that a child says."""
        heard: dict[str, Any] = json.loads(await self.line())
        return heard

    def say(self, **fields: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")

    async def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Bench:
    """One benchmark's own: an empty database, an empty bus, processes."""

    def __init__(self, lab: "Lab", dsn: str, note: Callable[[str], None]) -> None:
        self._lab = lab
        self.dsn = dsn
        self.redis_url = lab.redis_url
        self.note = note

    @asynccontextmanager
    async def child(
        self, function: Callable[..., Any], **arguments: Any
    ) -> AsyncIterator[Process]:
        """Run `function(parent, **arguments)` in a process while the block runs."""
        name = f"{function.__module__}:{function.__qualname__}"
        command = ("benchmarks.child", name, json.dumps(arguments))
        child = await Process.start(*command, name=name)
        try:
            yield child
        finally:
            await child.close()

    @asynccontextmanager
    async def command(
        self,
        *arguments: str,
        dsn: str | None = None,
        auth: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> AsyncIterator[tuple[str, Process]]:
        """Run `quantplane-server ARGUMENTS`; yield what it is ready on, and itself."""
        environment = {
            "QUANTPLANE_POSTGRES_DSN": dsn or self.dsn,
            "QUANTPLANE_REDIS_URL": self.redis_url,
            "QUANTPLANE_GRACE_S": "1",
            "QUANTPLANE_AUTH": str(auth),
            **(variables or {}),
        }
        server = await Process.start(
            *("quantplane_server", *arguments, "--until-eof"),
            name="quantplane-server",
            environment=environment,
        )
        try:
            while not (line := await server.line()).startswith(READY):
                pass
            yield line.removeprefix(READY), server
        finally:
            await server.close()

    def server(self, *, dsn: str | None = None) -> Any:
        """Run what `up` runs on its services: a server, and a recorder beside it."""
        return self.command("serve", "--listen", "127.0.0.1:0", dsn=dsn)

    def server_without_recorder(
        self,
        *,
        dsn: str | None = None,
        auth: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> Any:
        listen = ("--share-port", "--listen", "127.0.0.1:0")
        return self.command("serve", *listen, dsn=dsn, auth=auth, variables=variables)

    def database(self) -> Any:
        """Make another empty database; yield its DSN."""
        return self._lab.database()

    async def empty_bus(self) -> None:
        await self._lab.empty_bus()

    async def in_turns(
        self, unit: str, ours: Measure, baseline: Measure, rounds: int = 3
    ) -> Figure:
        """Measure A B A B ..., and return the medians."""
        samples: tuple[list[Sample], list[Sample]] = ([], [])
        for turn in range(2 * rounds):
            self.note(f"round {turn // 2 + 1} of {rounds}")
            samples[turn % 2].append(await (ours, baseline)[turn % 2]())
        return Figure.of(unit, *samples)


class Lab:
    """PostgreSQL and Valkey, as `quantplane-server up --ephemeral` runs them."""

    def __init__(self, services: embedded.Services) -> None:
        self._template = services.postgres_dsn
        self._made = 0
        self.redis_url = services.redis_url

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator["Lab"]:
        BUILD.mkdir(exist_ok=True)
        LOG.write_bytes(b"")
        async with embedded.services(None) as services:
            await upgrade(services.postgres_dsn)
            key = new_secret()
            own = OwnKey("bench", "admin", key)
            await put_keys(services.postgres_dsn, "bench", [own])
            os.environ[VARIABLE] = key  # of every client, here and in the children
            yield cls(services)

    @asynccontextmanager
    async def bench(self, note: Callable[[str], None]) -> AsyncIterator[Bench]:
        async with AsyncExitStack() as stack:
            dsn = await stack.enter_async_context(self.database())
            await self.empty_bus()
            yield Bench(self, dsn, note)

    @asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """Make a database with the schema and nothing else; yield its DSN."""
        self._made += 1
        name = f"bench_{self._made}"
        template = urlsplit(self._template)
        await self._execute(
            f"CREATE DATABASE {name} TEMPLATE {template.path.removeprefix('/')}"
        )
        try:
            # Not urlunsplit, which would drop the empty host.
            yield self._template.replace(f"/{template.path[1:]}?", f"/{name}?", 1)
        finally:
            await self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    async def empty_bus(self) -> None:
        async with redis.Redis.from_url(self.redis_url) as client:
            await client.flushall()

    async def _execute(self, statement: str) -> None:
        conn = await asyncpg.connect(self._template, database="postgres")
        try:
            await conn.execute(statement)
        finally:
            await conn.close()


def _medians(samples: list[Sample]) -> tuple[float, dict[str, Any]]:
    medians = {name: median(s[name] for s in samples) for name in samples[0]}
    value = medians.pop("value")
    return value, {name: _rounded(number) for name, number in medians.items()}


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
