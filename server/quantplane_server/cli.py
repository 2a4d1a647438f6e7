"""The command quantplane-server."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import asyncpg
import grpc
import typer
import uvloop
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from quantplane.credentials import left_key
from quantplane.state import StateProblem
from quantplane.tls import explain
from quantplane_server import backup as backups
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server import demo, embedded, rescue
from quantplane_server.admin.doctor import examine
from quantplane_server.admin.findings import tell
from quantplane_server.config import Settings
from quantplane_server.embedded import EmbeddedError, Postgres, Valkey
from quantplane_server.errors import QuantplaneError
from quantplane_server.identity.local import Secrets, local_keys
from quantplane_server.main import available, recording, serving
from quantplane_server.market_data.queries import overdue_day_count
from quantplane_server.migrate import SchemaOutdated, upgrade
from quantplane_server.paper import broker as paper_broker
from quantplane_server.paper.book import Commission
from quantplane_server.processes import READY, Child, running, told_to_stop
from quantplane_server.rpc.health import ask, check
from quantplane_server.rpc.tls import Certificates
from quantplane_server.tasks import end
from quantplane_server.telemetry import tracing
from quantplane_server.telemetry.logs import set_up
from quantplane_server.waiting import FINAL, awaited, databases_up

app = typer.Typer(
    name="quantplane-server",
    help="The quantplane server: the data plane of a trading desk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

user = typer.Typer(help="Users, straight on the database.", no_args_is_help=True)
key = typer.Typer(help="API keys, straight on the database.", no_args_is_help=True)
app.add_typer(user, name="user")
app.add_typer(key, name="key")

logger = logging.getLogger(__name__)

WATCH_S = 0.2
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # and the loopback of it

T = TypeVar("T")
Embedded = TypeVar("Embedded", Postgres, Valkey)
Listen = Annotated[
    str | None, typer.Option("--listen", metavar="HOST:PORT", help="Where to serve.")
]
Insecure = Annotated[
    bool | None,
    typer.Option("--insecure", help="Plaintext may be served beyond loopback."),
]
Workers = Annotated[
    int, typer.Option("--workers", min=1, help="Processes that share the port.")
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where PostgreSQL and Valkey keep their data."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="The backup.")]
Target = Annotated[
    str | None, typer.Option("--target", metavar="HOST:PORT", help="The server.")
]
Username = Annotated[str, typer.Argument(metavar="USER", help="The user's name.")]
UntilEof = Annotated[bool, typer.Option("--until-eof", hidden=True)]


@app.command()
def up(
    with_demo: Annotated[
        bool,
        typer.Option("--demo", help="Add a simulated feed, a strategy, a live view."),
    ] = False,
    with_paper: Annotated[
        bool, typer.Option("--paper/--no-paper", help="Add a paper broker.")
    ] = True,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep nothing after the end.")
    ] = False,
    data_dir: DataDir = None,
    listen: Listen = None,
    insecure: Insecure = None,
    workers: Workers = 1,
) -> None:
    """Start everything: PostgreSQL, Valkey, migrations, the server, a paper broker."""
    settings = _settings(data_dir=data_dir, listen=listen, insecure=insecure)
    _run(_up(settings, ephemeral, workers, with_demo, with_paper), settings)


@app.command()
def serve(
    listen: Listen = None,
    insecure: Insecure = None,
    workers: Workers = 1,
    share_port: Annotated[bool, typer.Option("--share-port", hidden=True)] = False,
    until_eof: UntilEof = False,
) -> None:
    """Serve from the PostgreSQL and Redis that QUANTPLANE_* settings name."""
    settings = _settings(listen=listen, insecure=insecure)
    if share_port:
        _run(_stay(serving(settings, share_port=True), until_eof), settings)
    else:
        _run(_stay(_served(settings, workers), until_eof), settings)


@app.command()
def record(until_eof: UntilEof = False) -> None:
    """Only record what is on the bus; `serve` does it too."""
    settings = _settings()
    recorder = recording(settings, quiet=until_eof)
    _run(_stay(recorder, until_eof, process="record"), settings)


@app.command()
def paper(
    target: Target = None,
    symbols: Annotated[
        list[str] | None,
        typer.Option("--symbol", help="Only its orders; repeatable. None: all."),
    ] = None,
    commission_bps: Annotated[
        float, typer.Option(help="Of the notional of a fill, in 1/100 percent.")
    ] = 0.0,
    commission_per_unit: Annotated[
        float, typer.Option(help="Of a fill, in quote currency.")
    ] = 0.0,
    latency_ms: Annotated[
        float, typer.Option(min=0, help="From a command to its effect.")
    ] = 0.0,
    until_eof: UntilEof = False,
) -> None:
    """Be a broker that fills orders at the market's quotes, with nobody's money."""
    if commission_bps and commission_per_unit:
        _fail("use one of --commission-bps and --commission-per-unit")
    terms = paper_broker.Terms(
        Commission(commission_bps, commission_per_unit),
        latency_ms / 1e3,
        symbols or (),
    )
    settings = _settings()
    server = _answering(target or settings.listen, quiet=until_eof)
    broking = partial(paper_broker.run, terms=terms)
    _run(_stay(server, until_eof, broking, process="paper"), settings)


@app.command(hidden=True)
def strategy(
    started_s: int, target: Target = None, until_eof: UntilEof = False
) -> None:
    """Trade for the demo that started at this Unix time."""
    settings = _settings()
    server = nullcontext(target or settings.listen)
    trading = partial(demo.trade, started_s=started_s)
    _run(_stay(server, until_eof, trading, process="strategy"), settings)


@app.command()
def migrate(
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="For PostgreSQL to be up.")
    ] = 60.0,
) -> None:
    """Bring the database's schema to what this server needs."""
    settings = _settings()
    if not settings.postgres_dsn:
        _fail("QUANTPLANE_POSTGRES_DSN must name the database to migrate")
    reference = settings.reference_dsn or settings.postgres_dsn
    _run(_migrate(settings.postgres_dsn, reference, wait_s))


@app.command()
def health(
    target: Target = None,
    service: Annotated[
        str,
        typer.Option(
            "--service",
            metavar="NAME",
            help="quantplane.v1.OrderService, ..., or recorder. None: all but that.",
        ),
    ] = "",
) -> None:
    """Ask a running server whether it serves; exit with 1 if not."""
    status = _run(check(target or _settings().listen, service))
    print(status.lower())
    if status != "SERVING":
        raise typer.Exit(1)


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Look at what servers stand on; say what is wrong and how to mend it."""
    if not _run(_doctor(_settings(data_dir=data_dir))):
        raise typer.Exit(1)


@app.command()
def backup(
    file: File,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", help="Only this table, and what it needs; repeatable."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Write a backup of the databases to FILE, while servers go on."""
    manifest = _run(_backup(_settings(data_dir=data_dir), file, table or []))
    print(f"{file}: {manifest.summary()}, {file.stat().st_size / 1e6:,.1f} MB")


@app.command()
def restore(
    file: File,
    no_owner: Annotated[
        bool, typer.Option("--no-owner", help="Leave out owners and privileges.")
    ] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="PostgreSQL may be of a newer major.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Restore a backup into empty databases, and compare all of it."""
    terms = backups.Terms(owners=not no_owner, upgrade=upgrade)
    manifest = _run(_restore(_settings(data_dir=data_dir), file, terms))
    for line in manifest.lines():
        print(line)
    print(f"restored and found equal: {manifest.summary()}")


# --- Users and keys -----------------------------------------------------------------


@user.command("add")
def add_user(
    username: Username,
    email: Annotated[str, typer.Option("--email", help="No two users have one.")],
    role: Annotated[
        str, typer.Option("--role", help="admin may do everything.")
    ] = "viewer",
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Only keys, no login.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Add a user; asks for the password, or reads it from the standard input."""
    password = "" if no_password else _password()
    _run(_rescued(data_dir, rescue.add_user, username, email, role, password))
    print(f"user {username} with role {role} is there")


@user.command("set-password")
def set_password(username: Username, data_dir: DataDir = None) -> None:
    """Set a user's password, and end every session of the user."""
    _run(_rescued(data_dir, rescue.set_password, username, _password()))
    print(f"user {username} has a new password, and no session")


@user.command("list")
def list_users(data_dir: DataDir = None) -> None:
    """List users: name, role, whether active, address, last login."""
    for line in _run(_rescued(data_dir, rescue.user_lines)):
        print(line)


@user.command()
def enable(username: Username, data_dir: DataDir = None) -> None:
    """Let a user, and the user's keys, do again what they are permitted."""
    _run(_rescued(data_dir, rescue.set_active, username, True))
    print(f"user {username} is enabled")


@user.command()
def disable(username: Username, data_dir: DataDir = None) -> None:
    """Let a user, and the user's keys, do nothing any more."""
    _run(_rescued(data_dir, rescue.set_active, username, False))
    print(f"user {username} is disabled")


@key.command("create")
def create_key(
    username: Username,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    role: Annotated[
        str, typer.Option("--role", help="What it may do. None: as its user.")
    ] = "",
    strategy_id: Annotated[
        str, typer.Option("--strategy", help="The only one it may act for. None: any.")
    ] = "",
    days: Annotated[
        int, typer.Option("--days", min=0, max=36_500, help="It is good for. 0: ever.")
    ] = 0,
    data_dir: DataDir = None,
) -> None:
    """Make an API key, and print it: it can't be had again."""
    asked = (username, name, role, strategy_id, days)
    made, secret = _run(_rescued(data_dir, rescue.create_key, *asked))
    print(f"key {made.key_id} with role {made.role}:", file=sys.stderr)
    print(secret)


@key.command("list")
def list_keys(
    username: Annotated[
        str, typer.Option("--user", help="Only this user's. None: all.")
    ] = "",
    data_dir: DataDir = None,
) -> None:
    """List API keys: id, user, name, role, strategy, what has become of it."""
    for line in _run(_rescued(data_dir, rescue.key_lines, username)):
        print(line)


@key.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Of `key list`.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke an API key."""
    _run(_rescued(data_dir, rescue.revoke_key, key_id))
    print(f"key {key_id} is revoked")


async def _rescued(
    data_dir: Path | None, work: Callable[..., Coroutine[Any, Any, T]], *args: Any
) -> T:
    """Do something on the database of users."""
    async with _databases(_settings(data_dir=data_dir), new=False) as dsns:
        return await work(dsns.get("reference", dsns["timeseries"]), *args)


def _password() -> str:
    """Ask for a new password, twice, or read it where nobody can be asked.

    It is never an argument: everybody on the machine can read those.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass("New password: ")
    if getpass("Once more: ") != password:
        _fail("the two differ")
    return password


# --- What they do -------------------------------------------------------------------


async def _up(
    settings: Settings,
    ephemeral: bool,
    workers: int,
    with_demo: bool,
    with_paper: bool,
) -> None:
    _check_transport(settings)
    async with AsyncExitStack() as stack:
        folder = None if ephemeral else settings.data_dir
        if not settings.postgres_dsn:
            postgres = await stack.enter_async_context(_kept(Postgres(folder)))
            settings = settings.model_copy(update={"postgres_dsn": postgres.dsn})
        if not settings.redis_url:
            valkey = await stack.enter_async_context(_kept(Valkey(folder)))
            settings = settings.model_copy(update={"redis_url": valkey.url})
        assert settings.postgres_dsn
        reference = settings.reference_dsn or settings.postgres_dsn
        await databases_up(settings.postgres_dsn, reference)
        await upgrade(settings.postgres_dsn, reference)
        keys = await stack.enter_async_context(local_keys(reference, settings.listen))
        beside = partial(demo.run, api_key=keys.admin) if with_demo else None
        served = _traded(settings, keys, workers, with_paper, with_demo)
        await _stay(served, beside=beside)


@asynccontextmanager
async def _kept(service: Embedded) -> AsyncIterator[Embedded]:
    """Run an embedded service, and start it again whenever it dies."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if not service.running:
                logger.error("%s has died; starting it again", service.title)
                await service.start()

    async with service:
        watching = asyncio.create_task(watch())
        try:
            yield service
        finally:
            watching.cancel()


@asynccontextmanager
async def _served(settings: Settings, workers: int) -> AsyncIterator[str]:
    """Serve and record: one process that serves, or several, and one that records."""
    settings.backends()  # refuses at once what is not set
    _check_transport(settings)
    if workers > 1 and settings.listen.endswith(":0"):
        raise ValueError("workers share a port: give --listen one that is not 0")
    serve = ("serve", "--share-port")
    beside = range(workers if workers > 1 else 0)
    servers = [Child(*serve, settings=settings.process(n)) for n in beside]
    recorder = Child("record", settings=settings.process(workers))
    async with running(recorder), running(*servers):  # the recorder ends last
        if servers:
            await available(settings)
        here = nullcontext(settings.listen) if servers else serving(settings)
        async with here as address:
            for child in (*servers, recorder):
                await child.ready()
            yield address


@asynccontextmanager
async def _traded(
    settings: Settings,
    keys: Secrets,
    workers: int,
    with_paper: bool,
    with_strategy: bool,
) -> AsyncIterator[str]:
    """Serve, with a paper broker and the demo's strategy if wanted."""
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(_served(settings, workers))
        _leave(keys.admin, address, stack)
        target = _reached(address)
        commands = [(["paper"], keys.broker)] if with_paper else []
        if with_strategy:
            commands.append((["strategy", str(int(time.time()))], keys.strategy))
        if commands and settings.tls():
            await _check_reachable(target)
        for command, key in commands:
            command += ["--target", target]
            child = Child(*command, settings=settings, api_key=key)
            await stack.enter_async_context(running(child))
            await child.ready()
        yield address


def _leave(key: str, address: str, stack: AsyncExitStack) -> None:
    """Leave the key for this user's programs, or say how else they get one."""
    try:
        if stack.enter_context(left_key(address, key)):
            return
        problem = f"no key for {address} is left for this user's programs"
    except StateProblem as error:
        problem = str(error)
    logger.warning("%s; `quantplane-server key create local NAME` makes one", problem)


def _reached(address: str) -> str:
    """Return where clients of this machine reach what listens on an address."""
    host, _, port = address.rpartition(":")
    return f"{EVERYWHERE[host]}:{port}" if host in EVERYWHERE else address


def _check_transport(settings: Settings) -> None:
    """Raise ValueError, before anything is started, for what could not be served."""
    settings.metrics_address()
    if files := settings.tls():
        Certificates(*files)


async def _check_reachable(address: str) -> None:
    """Raise RuntimeError if TLS keeps out the clients that run beside the server."""
    try:
        await ask(address)
    except grpc.aio.AioRpcError as error:
        if why := explain(error):
            raise RuntimeError(
                f"the clients beside the server can't reach {address}: {why}"
            ) from None


@asynccontextmanager
async def _answering(target: str, quiet: bool) -> AsyncIterator[str]:
    """Yield the target once a server answers there."""

    async def attempt() -> None:
        try:
            await ask(target)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(explain(error) or error.details()) from error

    await awaited(f"a server at {target}", attempt, quiet=quiet)
    yield target


async def _stay(
    context: AbstractAsyncContextManager[str | None],
    until_eof: bool = False,
    beside: Callable[[str], Coroutine[Any, Any, None]] | None = None,
    process: str = "serve",
) -> None:
    """Enter `context`, say so, and leave it when told to, or when `beside` ends.

    Traces tell which process it was.
    """
    stopped = told_to_stop(is_child=until_eof)
    is_ready = False

    async def stay() -> None:
        nonlocal is_ready
        with_client = beside is not None
        async with tracing.running(process, with_client), context as address:
            is_ready = True
            print(f"{READY}{address or 'the bus'}", flush=True)
            waits: list[asyncio.Task[Any]] = [asyncio.create_task(stopped.wait())]
            if beside and address:
                waits.append(asyncio.create_task(beside(_reached(address))))
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            await end(*waits)
            for task in done:
                task.result()

    staying = asyncio.create_task(stay())
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait((staying, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not is_ready:  # it waits for something, or has failed
        staying.cancel()
    with suppress(asyncio.CancelledError):
        await staying


async def _doctor(settings: Settings) -> bool:
    """Tell what there is to say of what is set, or of what `up` runs."""
    if not (settings.postgres_dsn or settings.redis_url):
        if found := embedded.running(settings.data_dir):
            dsn, url = found
            there = {"postgres_dsn": dsn, "redis_url": url}
            settings = settings.model_copy(update=there)
    return await tell(examine(settings, overdue_day_count))


async def _backup(
    settings: Settings, file: Path, tables: list[str]
) -> backups.Manifest:
    async with _databases(settings, new=False) as dsns:
        with backups.Progress() as progress:
            return await backups.backup(dsns, file, tables, progress)


async def _restore(
    settings: Settings, file: Path, terms: backups.Terms
) -> backups.Manifest:
    async with _databases(settings, new=True) as dsns:
        with backups.Progress() as progress:
            return await backups.restore(dsns, file, terms, progress)


@asynccontextmanager
async def _databases(settings: Settings, new: bool) -> AsyncIterator[dict[str, str]]:
    """Yield the DSN of each database: those that are named, or that of `up`.

    SIGTERM ends the block as Ctrl-C does, so that it can clean up.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    async with AsyncExitStack() as stack:
        dsn, folder = settings.postgres_dsn, settings.data_dir
        if not dsn and (running := embedded.running(folder)):
            dsn = running[0]
        if not dsn and not new and not (folder / Postgres.name).exists():
            raise ValueError(
                f"there is no database in {folder}: QUANTPLANE_POSTGRES_DSN or"
                " --data-dir must name one"
            )
        if not dsn:
            postgres = await stack.enter_async_context(Postgres(folder))
            dsn = postgres.dsn
        reference = settings.reference_dsn
        both = {"reference": reference} if reference and reference != dsn else {}
        yield {"timeseries": dsn} | both


def _settings(**given: object) -> Settings:
    try:
        return Settings(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"QUANTPLANE_{str(first['loc'][0]).upper()}: {first['msg']}")


async def _migrate(dsn: str, reference: str, wait_s: float) -> None:
    await databases_up(dsn, reference, at_most_s=wait_s)
    print("schema at", await upgrade(dsn, reference))


def _run(main: Coroutine[Any, Any, T], settings: Settings | None = None) -> T:
    """Run to the end; what a person can mend is one sentence, not a traceback.

    Without settings, what is logged is for people too.
    """
    if settings:
        set_up(settings.log_format, settings.log_level)
    else:
        set_up("text", "info")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (
        *(EmbeddedError, SchemaOutdated, QuantplaneError),
        *(RuntimeError, ValueError),
    ) as error:
        _fail(str(error))
    except FINAL as error:  # some of these are among the next
        _fail(f"a backend refuses: {error}")
    except databases.UNAVAILABLE + buses.UNAVAILABLE as error:
        _fail(f"a backend can't be reached: {error}")
    except (asyncpg.PostgresError, DBAPIError) as error:
        _fail(f"the database refused: {getattr(error, 'orig', None) or error}")


def _fail(message: str) -> NoReturn:
    print(f"quantplane-server: {message}", file=sys.stderr)
    raise typer.Exit(1)
