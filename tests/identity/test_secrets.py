"""No secret is anywhere but where it belongs.

One run uses every credential that there is, good and bad, in real processes. Then all
that they have left or shown is searched for each of the secrets. A canary is shown
everywhere on purpose: where it is not found, nothing else would be.
"""

import asyncio
import os
import re
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import grpc
import psutil
import redis.asyncio as redis

from quantplane import Client, Tls, reason_of
from quantplane import v1 as pb
from quantplane.credentials import VARIABLE
from quantplane.tls import read_certificates
from quantplane_server.identity.keys import new_secret
from tests.rpc.certificates import Authority, tls_of

CANARY = f"canary{uuid4().hex}"
BIN = Path(sys.executable).parent
WAIT_S = 60

# Python runs it at the start of each process that has its folder on the path.
LOGGING = """
import logging, os, sys
name = f"{os.path.basename(sys.argv[0])}-{os.getpid()}.log"
logging.basicConfig(
    level=logging.DEBUG, filename=os.path.join(os.path.dirname(__file__), name)
)
logging.debug(os.environ["CANARY"])
"""

# Where a secret belongs: there it is found, and nowhere else.
HOMES = {
    ("table", "signing_keys", "signing key"),
    ("table", "server_keys", "server key"),
    ("table", "configurations", "configured"),
}


class Place(NamedTuple):
    """All that is in one place where a secret could be."""

    kind: str
    name: str
    content: bytes


class Run:
    """The processes of one run, the secrets they know, and what they have told."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.secrets: dict[str, bytes] = {}
        self.places: list[Place] = []
        self.state = folder / "quantplane"
        self.logs = folder / "logs"
        self.logs.mkdir()
        (self.logs / "sitecustomize.py").write_text(LOGGING)
        path = f"{self.logs}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own = {"CANARY": CANARY, "PYTHONPATH": path, "XDG_STATE_HOME": str(folder)}
        self.environment = os.environ | own | environment
        del self.environment[VARIABLE]

    def secret(self, name: str, value: str = "") -> str:
        """Have a secret looked for: this one, or one that is made here."""
        value = value or f"{uuid4().hex}Pw"
        self.secrets[name] = value.encode()
        return value

    def told(self, kind: str, name: str, content: str | bytes) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.places.append(Place(kind, name, content))

    async def command(
        self, program: str, *args: str, stdin: str = "", code: int = 0, **more: str
    ) -> None:
        """Run a command to its end."""
        process = await self._begin(program, *args, **more)
        out, err = await process.communicate(stdin.encode())
        assert process.returncode == code, err.decode()
        self._ran(args, out + err)

    async def made_key(self, program: str, *args: str) -> str:
        """Run a command whose standard output is a secret; return that."""
        process = await self._begin(program, *args)
        out, err = await process.communicate()
        self._ran(args, err)
        return self.secret(f"key of {program}", out.decode().strip())

    def _ran(self, args: Sequence[str], output: bytes) -> None:
        self.told("arguments", args[0], "\0".join(args))
        self.told("output", args[0], output)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[str]:
        """Run everything; yield the address."""
        args = ("up", "--listen", "127.0.0.1:0", "--data-dir", f"/tmp/{CANARY}")
        process = await self._begin("quantplane-server", *args)
        assert process.stdout and process.stderr
        reading = asyncio.create_task(process.stderr.read())
        try:
            line = await process.stdout.readline()
            assert line.startswith(b"quantplane ready on "), await reading
            root = psutil.Process(process.pid)
            for each in (root, *root.children(recursive=True)):
                self.told("arguments", f"process {each.pid}", "\0".join(each.cmdline()))
                if key := each.environ().get(VARIABLE):
                    self.secret("key of the broker", key)
            yield line.split()[-1].decode()
        finally:
            process.terminate()
            out = await process.stdout.read() + await reading
            await process.wait()
        self.told("output", "up", out)

    async def _begin(
        self, program: str, *args: str, **more: str
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(BIN / program, *args),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment | more,
        )

    async def refused(self, reason: str, call: Awaitable[Any]) -> None:
        """Await a call that fails; keep all that comes back."""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) == reason
            metadata = [*error.initial_metadata(), *error.trailing_metadata()]
            sent = [str(error).encode(), repr(metadata).encode()]
            sent += [v if isinstance(v, bytes) else v.encode() for _, v in metadata]
            self.told("error", reason, b"\n".join(sent))
        else:
            raise AssertionError(f"not refused: {reason}")

    def found(self) -> set[tuple[str, str, str]]:
        """Return the kind and name of each place with a secret, and which it is."""
        return {
            (place.kind, place.name, name)
            for name, secret in self.secrets.items()
            for form in forms(secret)
            for place in self.places
            if form in place.content
        }


def forms(secret: bytes) -> set[bytes]:
    """Return as what a secret could be written, and be had again."""
    found = {secret, repr(secret)[2:-1].encode(), secret.hex().encode()}
    for encode in (b64encode, urlsafe_b64encode):
        for shift in range(3):  # it may stand within a longer text
            found.add(encode(bytes(shift) + secret).rstrip(b"=")[4 * bool(shift) : -1])
    return found


async def test_no_secret_is_anywhere_but_where_it_belongs(
    dsn: str, redis_url: str, tmp_path: Path
):
    authority = Authority(tmp_path / "tls")
    cert, key = authority.sign()
    tls = {f"QUANTPLANE_{k.upper()}": v for k, v in tls_of((cert, key)).items()}
    run = Run(tmp_path, QUANTPLANE_TLS_CA=str(authority.file), **tls)
    run.secret("TLS key", key.read_text().splitlines()[1])
    async with asyncio.timeout(WAIT_S), backends(run, dsn, redis_url):
        async with run.up() as target, asyncio.TaskGroup() as tasks:
            run.environment["QUANTPLANE_TARGET"] = target
            (left,) = run.state.glob("up-*.key")
            run.secret("key of up", left.read_text().strip())
            tasks.create_task(urls(run))
            await commands(run)
            await calls(run, target, authority.file)
        await look(run, dsn, redis_url)

    assert run.found() == HOMES
    run.secrets = {"canary": CANARY.encode()}
    seen = {(kind, name) for kind, name, _ in run.found()}
    assert {kind for kind, _ in seen} == {place.kind for place in run.places}
    assert {p[:2] for p in run.places if p.kind == "log"} <= seen


# --- The run --------------------------------------------------------------------------


@asynccontextmanager
async def backends(run: Run, dsn: str, url: str) -> AsyncIterator[None]:
    """Have the server use accounts with passwords."""
    name = f"user{uuid4().hex[:8]}"
    password = run.secret("password of the database")
    rules = ("on", "~*", "&*", "+@all", f">{run.secret('password of the bus')}")
    there = dsn.replace("//quantplane@", f"//{name}:{password}@")
    bus = url.replace("//", f"//{name}:{run.secrets['password of the bus'].decode()}@")
    run.environment |= {"QUANTPLANE_POSTGRES_DSN": there, "QUANTPLANE_REDIS_URL": bus}
    conn = await asyncpg.connect(dsn)
    async with redis.Redis.from_url(url) as valkey:
        await valkey.execute_command("ACL", "SETUSER", name, *rules)
        await conn.execute(f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD '{password}'")
        try:
            yield
        finally:
            await valkey.execute_command("ACL", "DELUSER", name)
            await conn.execute(f"DROP ROLE {name}")
            await conn.close()


async def commands(run: Run) -> None:
    """Do what people do with passwords and keys."""
    ann, eve = run.secret("password of ann"), run.secret("password of eve")
    create = ("users", "create", "ann", "--email", f"{CANARY}@desk", "--role", "admin")
    add = ("user", "add", "eve", "--email", "eve@desk")
    key, *_ = await asyncio.gather(
        run.made_key("quantplane", "keys", "create", "good"),
        run.command("quantplane", *create, "--password-stdin", stdin=ann),
        run.command("quantplane-server", *add, stdin=eve),
    )
    login = ("quantplane", "login", "ann", "--password-stdin")
    await run.command(*login, stdin=run.secret("wrong password"), code=1)
    await run.command(*login, stdin=ann)
    (kept,) = run.state.glob("login-*")
    for name in ("accessToken", "refreshToken"):
        (token,) = re.findall(rf'"{name}": "([^"]+)"', kept.read_text())
        run.secret(f"{name} of a command", token.rpartition(".")[2])
    both = f"{ann}\n{run.secret('next password of ann')}\n"
    change = ("users", "set-password", "--password-stdin")
    other = run.secret("one character off", key[:-1] + ("A" if key[-1] != "A" else "E"))
    await asyncio.gather(
        run.command("quantplane", *change, stdin=both),
        run.command("quantplane", "whoami", code=1, **{VARIABLE: other}),
        run.made_key("quantplane-server", "key", "create", "eve", "another"),
    )


async def urls(run: Run) -> None:
    """Name backends by what is no URL, and backends that are away."""
    part, all_of = run.secret("part of a password"), run.secret("password of nobody")
    no_url = {"QUANTPLANE_POSTGRES_DSN": f"postgresql://app:{part}/x@127.0.0.1/x"}
    away = {
        "QUANTPLANE_POSTGRES_DSN": f"postgresql://app:{all_of}@127.0.0.1:1/x",
        "QUANTPLANE_REDIS_URL": f"redis://app:{all_of}@127.0.0.1:1",
    }
    for settings in (no_url, away):
        await run.command("quantplane-server", "doctor", code=1, **settings)


async def calls(run: Run, target: str, ca: Path) -> None:
    """Make calls with credentials, good ones and bad ones."""
    key = run.secrets["key of quantplane"].decode()
    async with Client(target, token=key, tls=Tls(ca)) as client:
        await with_a_key(run, client)
    credentials = grpc.ssl_channel_credentials(read_certificates(ca))
    agent = [("grpc.primary_user_agent", CANARY)]
    async with grpc.aio.secure_channel(target, credentials, agent) as channel:
        auth = pb.AuthServiceStub(channel)
        await with_a_login(run, auth, pb.UserServiceStub(channel))
        for name in ("unknown", "revoked", "longer"):
            token = run.secrets.get(f"{name} key", f"{key}A".encode()).decode()
            await run.refused("UNAUTHENTICATED", shown(auth, token))


async def with_a_key(run: Run, client: Client) -> None:
    await client.auth.WhoAmI(pb.WhoAmIRequest())
    secret = pb.Configuration(key="desk.password")
    secret.value.string_value = run.secret("configured")
    request = pb.CreateConfigurationRequest(configuration=secret)
    await client.configuration.CreateConfiguration(request)
    unknown = pb.GetUserRequest(username=CANARY)
    await run.refused("UNKNOWN_USER", client.user.GetUser(unknown))
    short = run.secret("short password", uuid4().hex[:11])
    user = pb.User(username="x", email="x@desk", role="viewer")
    create = pb.CreateUserRequest(user=user, password=short)
    await run.refused("INVALID_FIELD", client.user.CreateUser(create))
    made = pb.CreateApiKeyRequest(key=pb.ApiKey(name="revoked"))
    response = await client.user.CreateApiKey(made)
    run.secret("revoked key", response.secret)
    run.secret("unknown key", new_secret())
    revoke = pb.RevokeApiKeyRequest(key_id=response.key.key_id)
    await client.user.RevokeApiKey(revoke)


async def with_a_login(run: Run, auth: Any, users: Any) -> None:
    ann, typed = run.secrets["next password of ann"].decode(), run.secret("as a name")
    for name, password in ((typed, ann), ("ann", run.secret("another wrong one"))):
        wrong = pb.LoginRequest(username=name, password=password)
        await run.refused("UNAUTHENTICATED", auth.Login(wrong))
    response = await auth.Login(pb.LoginRequest(username="ann", password=ann))
    tokens = [known(run, response.tokens, "first")]
    await shown(auth, tokens[0].access_token)
    change = pb.SetPasswordRequest(
        old_password=run.secret("wrong old password"),
        new_password=run.secret("password that is not set"),
    )
    metadata = [("authorization", f"Bearer {tokens[0].access_token}")]
    call = users.SetPassword(change, metadata=metadata)
    await run.refused("UNAUTHENTICATED", call)
    for name in ("second", "third"):
        response = await refresh(auth, tokens[-1].refresh_token)
        tokens.append(known(run, response.tokens, name))
    # One that never was, and one that was used long ago, which ends the session.
    for token in (tokens[-1].refresh_token[:-4], tokens[0].refresh_token):
        await run.refused("UNAUTHENTICATED", refresh(auth, token))
    await run.refused("UNAUTHENTICATED", shown(auth, tokens[-1].access_token))


def known(run: Run, tokens: pb.Tokens, name: str) -> pb.Tokens:
    """Have the tokens looked for; of a JWT what nobody else could write."""
    run.secret(f"{name} access token", tokens.access_token.rpartition(".")[2])
    run.secret(f"{name} refresh token", tokens.refresh_token)
    return tokens


def shown(auth: Any, token: str) -> Any:
    metadata = [("authorization", f"Bearer {token}")]
    return auth.WhoAmI(pb.WhoAmIRequest(), metadata=metadata)


def refresh(auth: Any, token: str) -> Any:
    return auth.RefreshToken(pb.RefreshTokenRequest(refresh_token=token))


# --- What it has left -----------------------------------------------------------------


async def look(run: Run, dsn: str, url: str) -> None:
    """Collect it: logs, tables, the bus."""
    for path in run.logs.glob("*.log"):
        run.told("log", path.name, path.read_bytes())
    conn = await asyncpg.connect(dsn)
    signing = "SELECT secret FROM signing_keys ORDER BY created_at LIMIT 1"
    run.secrets["signing key"] = await conn.fetchval(signing)
    run.secrets["server key"] = await conn.fetchval("SELECT key FROM server_keys")
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    for (table,) in await conn.fetch(tables):
        rows = await conn.fetch(f"SELECT t::text FROM {table} AS t")
        run.told("table", table, "\n".join(row["t"] for row in rows))
    await conn.execute(f"DO $$BEGIN RAISE LOG '{CANARY}'; END$$")
    await conn.close()
    (sockets,) = parse_qs(urlsplit(dsn).query)["host"]
    log = Path(sockets).with_name("postgres.log")
    # It is written by another process; the canary comes after all that was logged.
    while CANARY.encode() not in (content := log.read_bytes()):
        await asyncio.sleep(0.01)
    run.told("log", "PostgreSQL", content)
    async with redis.Redis.from_url(url) as valkey:
        await valkey.config_set("rdbcompression", "no")
        await valkey.set(CANARY, CANARY)
        for key in await valkey.keys():
            run.told("bus", str(key), key + (await valkey.dump(key) or b""))
