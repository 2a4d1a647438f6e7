"""Who may talk to a server, over real connections."""

import asyncio
import os
import shutil
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from quantplane import Client, Tls, sync
from quantplane import v1 as pb
from quantplane.tls import TlsProblem, explain
from quantplane_server.config import Settings
from quantplane_server.main import serving
from quantplane_server.rpc import tls
from tests.market_data import quote
from tests.orders import watching
from tests.rpc.certificates import Authority, tls_of
from tests.rpc.test_errors import watched
from tests.test_cli import failed, publish_one, started, submit

QUANTPLANE = Path(sys.executable).with_name("quantplane")
SYMBOLS = pb.ListSymbolsRequest(page_size=1)

Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("QUANTPLANE_TLS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


@pytest.fixture
def serve(settings: Settings) -> Serve:
    """Serve with these settings changed; yields the target."""
    return lambda **changed: serving(settings.model_copy(update=changed))


@asynccontextmanager
async def followed(client: Client) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Follow quotes; yield what publishes one by another call and awaits it here."""
    request = pb.StreamQuotesRequest(symbols=["A"])
    async with (
        client.publish_quotes() as publisher,
        client.follow(client.market_data.StreamQuotes, request) as stream,
    ):
        await anext(stream)

        async def pass_on(number: int) -> None:
            sent = quote("A", number)
            await publisher.send([sent])
            async for response in stream:
                if any(each.time == sent.time for each in response.quotes):
                    return

        yield pass_on
        assert stream.reconnects == publisher.reconnects == 0


async def refusal(target: str, tls: Tls | None) -> grpc.aio.AioRpcError:
    """Return what a call says that does not wait for a connection."""
    async with Client(target, tls) as client:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.market_data.ListSymbols(SYMBOLS, wait_for_ready=False)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    return raised.value


async def test_calls_streams_and_publishers_work_over_tls(serve: Serve, ca: Authority):
    async with serve(**tls_of(ca.sign())) as target:
        async with Client(target, Tls(ca.file)) as client, followed(client) as pass_on:
            await pass_on(1)
            await client.market_data.ListSymbols(SYMBOLS)


async def test_synchronous_code_uses_tls_too(serve: Serve, ca: Authority):
    def call(target: str) -> None:
        with sync.Client(target, Tls(ca.file)) as client:
            client.market_data.ListSymbols(SYMBOLS)

    async with serve(**tls_of(ca.sign())) as target:
        await asyncio.to_thread(call, target)


async def test_a_client_takes_tls_from_the_environment(
    serve: Serve, ca: Authority, monkeypatch: pytest.MonkeyPatch
):
    own = ca.client()
    monkeypatch.setenv("QUANTPLANE_TLS_CA", str(own.ca))
    monkeypatch.setenv("QUANTPLANE_TLS_CLIENT_CERT", str(own.cert))
    monkeypatch.setenv("QUANTPLANE_TLS_CLIENT_KEY", str(own.key))
    monkeypatch.setenv("QUANTPLANE_TLS_NAME", "quantplane.example")
    files = tls_of(ca.sign("quantplane.example"), ca.file)
    async with serve(**files) as target, Client(target) as client:
        await client.market_data.ListSymbols(SYMBOLS)


async def test_a_certificate_for_another_name_is_good_under_that_name(
    serve: Serve, ca: Authority
):
    async with serve(**tls_of(ca.sign("quantplane.example"))) as target:
        async with Client(target, Tls(ca.file, name="quantplane.example")) as client:
            await client.market_data.ListSymbols(SYMBOLS)


async def test_a_server_that_wants_certificates_takes_those_that_its_ca_signed(
    serve: Serve, ca: Authority, other: Authority
):
    async with serve(**tls_of(ca.sign(), other.file)) as target:
        async with Client(target, Tls(ca.file, *other.sign("strategy"))) as client:
            await client.market_data.ListSymbols(SYMBOLS)


async def test_a_server_that_wants_certificates_refuses_others(
    serve: Serve, ca: Authority, other: Authority
):
    async with serve(**tls_of(ca.sign(), ca.file)) as target:
        await refusal(target, Tls(ca.file))
        await refusal(target, Tls(ca.file, *other.sign("strategy")))
        await refusal(target, Tls(ca.file, *ca.sign("strategy", age_days=9)))


async def explained(target: str, tls: Tls | None) -> str:
    return explain(await refusal(target, tls)) or "not at all"


async def test_what_keeps_a_client_out_is_explained(
    serve: Serve, ca: Authority, other: Authority
):
    async with serve(**tls_of(ca.sign())) as target:
        assert "set QUANTPLANE_TLS_CA" in await explained(target, None)
        assert "not signed by a CA" in await explained(target, Tls(other.file))
        elsewhere = Tls(ca.file, name="quantplane.example")
        assert "for another name" in await explained(target, elsewhere)


async def test_an_expired_certificate_is_explained(serve: Serve, ca: Authority):
    async with serve(**tls_of(ca.sign(age_days=9))) as target:
        assert "has expired" in await explained(target, Tls(ca.file))


async def test_a_server_without_tls_is_explained(serve: Serve, ca: Authority):
    async with serve() as target:
        assert "does not speak TLS" in await explained(target, Tls(ca.file))


async def test_the_command_line_says_in_one_sentence_what_keeps_it_out(
    serve: Serve, ca: Authority
):
    async with serve(**tls_of(ca.sign(), ca.file)) as target:
        code, lines = await symbols(target, {"QUANTPLANE_TLS_CA": str(ca.file)})
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"quantplane: there is no talking to {target}: ")
    assert "set QUANTPLANE_TLS_CLIENT_CERT" in lines[0]


async def symbols(target: str, environment: dict[str, str]) -> tuple[int, list[str]]:
    """Run `quantplane symbols`; return its exit code and what it says of errors."""
    process = await asyncio.create_subprocess_exec(
        *(QUANTPLANE, "symbols", "--target", target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode().splitlines()


async def test_the_command_line_names_the_file_that_is_no_good():
    missing = {"QUANTPLANE_TLS_CA": "/nowhere/ca.pem"}
    code, lines = await symbols("127.0.0.1:1", missing)
    assert code == 2
    assert lines == [
        "quantplane: /nowhere/ca.pem can't be read: No such file or directory"
    ]


async def test_an_error_without_tls_behind_it_is_not_explained_by_tls():
    error = await refusal("127.0.0.1:1", None)
    assert explain(error) is None


async def test_a_client_s_certificate_without_its_key_is_refused(ca: Authority):
    with pytest.raises(TlsProblem, match="go together"):
        Client("127.0.0.1:1", Tls(ca.file, cert=ca.sign()[0]))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
async def test_tls_begins_with_1_2(serve: Serve, ca: Authority):
    context = ssl.create_default_context(cafile=ca.file)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    async with serve(**tls_of(ca.sign())) as target:
        host, _, port = target.rpartition(":")
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, int(port), ssl=context)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.transport.abort()


async def test_a_new_certificate_is_served_while_old_streams_go_on(
    serve: Serve, ca: Authority, other: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tls, "REREAD_S", 0.0)
    files = ca.sign()
    async with serve(**tls_of(files)) as target:
        async with Client(target, Tls(ca.file)) as old, followed(old) as pass_on:
            await pass_on(1)
            replace(files, other.sign())
            async with Client(target, Tls(other.file)) as client:
                await client.market_data.ListSymbols(SYMBOLS)
            assert "not signed" in str(explain(await refusal(target, Tls(ca.file))))
            await pass_on(2)


async def test_a_new_ca_of_clients_is_in_force_without_a_restart(
    serve: Serve, ca: Authority, other: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tls, "REREAD_S", 0.0)
    client_ca = shutil.copy(ca.file, ca.file.with_name("clients.pem"))
    async with serve(**tls_of(ca.sign(), client_ca)) as target:
        shutil.copy(other.file, client_ca)
        async with Client(target, Tls(ca.file, *other.sign("strategy"))) as client:
            await client.market_data.ListSymbols(SYMBOLS)
        await refusal(target, ca.client())


async def test_new_files_that_are_no_good_leave_the_old_certificate_and_are_logged_once(
    serve: Serve,
    ca: Authority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(tls, "REREAD_S", 0.0)
    cert, key = ca.sign()
    async with serve(**tls_of((cert, key))) as target:
        whole = ca.sign()[0].read_bytes()
        for content in (whole, whole[: len(whole) // 2], b""):  # of another key
            cert.write_bytes(content)
            for _ in range(2):
                async with Client(target, Tls(ca.file)) as client:
                    await client.market_data.ListSymbols(SYMBOLS)
    said = [record.message for record in caplog.records if record.name == tls.__name__]
    assert said == [
        f"{key} is not the key of {cert}; the old certificate stays in force",
        f"{cert} holds no certificate in PEM; the old certificate stays in force",
    ]


async def test_files_are_not_read_at_every_handshake(
    serve: Serve, ca: Authority, other: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tls, "REREAD_S", 3600.0)
    files = ca.sign()
    async with serve(**tls_of(files)) as target:
        replace(files, other.sign())
        async with Client(target, Tls(ca.file)) as client:
            await client.market_data.ListSymbols(SYMBOLS)


def replace(files: tuple[Path, Path], others: tuple[Path, Path]) -> None:
    for file, source in zip(files, others, strict=True):
        os.replace(shutil.copy(source, source.with_suffix(".copy")), file)


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.3.2.1:0", "[::1]:0", "localhost:0", "unix:/tmp/q"]
)
def test_plaintext_is_served_on_loopback(listen: str):
    assert Settings(listen=listen).tls() is None


@pytest.mark.parametrize(
    "listen",
    [
        *("0.0.0.0:0", "[::]:0", ":0", "10.0.0.7:0", "quantplane.example:0"),
        *("127.0.0.1.example:0", "localhost.example:0", "::1:5005", "ipv4:10.0.0.7:0"),
    ],
)
def test_plaintext_is_not_served_beyond_loopback_unless_told(listen: str):
    with pytest.raises(ValueError, match=r"beyond loopback.*--insecure"):
        Settings(listen=listen).tls()
    assert Settings(listen=listen, insecure=True).tls() is None
    both = {"tls_cert": "c", "tls_key": "k"}
    assert Settings(listen=listen, **both).tls() == ("c", "k", None)


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_setting_of_tls_alone_is_refused(name: str):
    with pytest.raises(ValueError, match="must both be set"):
        Settings(**{name: "file"}, insecure=True).tls()


@pytest.mark.parametrize(
    "broken, problem",
    [("cert", "no certificate"), ("key", "private key"), ("client_ca", "certificate")],
)
def test_a_file_that_is_no_pem_is_named(ca: Authority, broken: str, problem: str):
    cert, key = ca.sign()
    files = {"cert": cert, "key": key, "client_ca": ca.file}
    files[broken].write_text("not a certificate")
    with pytest.raises(TlsProblem, match=f"{files[broken]} .*{problem}"):
        tls.Certificates(**{name: str(path) for name, path in files.items()})


def test_a_file_that_is_missing_is_named(ca: Authority):
    cert, key = map(str, ca.sign())
    with pytest.raises(TlsProblem, match=r"^gone\.key can't be read: No such file"):
        tls.Certificates(cert, "gone.key")
    with pytest.raises(TlsProblem, match=r"^gone\.pem can't be read: No such file"):
        tls.Certificates("gone.pem", key)


def test_a_key_that_does_not_fit_is_named(ca: Authority):
    cert, key = ca.sign()[0], ca.sign()[1]
    with pytest.raises(TlsProblem, match=f"{key} is not the key of {cert}"):
        tls.Certificates(str(cert), str(key))


async def test_serve_goes_beyond_loopback_only_when_it_is_told_to(settings: Settings):
    refused = settings.backends()[0].replace("//quantplane@", "//nobody@")
    wide = settings.model_copy(update={"listen": "0.0.0.0:0", "postgres_dsn": refused})
    assert "beyond loopback" in await failed("serve", **wide.environment())
    told = await failed("serve", "--insecure", **wide.environment())
    assert "refuses: " in told  # which is asked when it may serve


async def test_up_names_the_file_that_is_no_good(settings: Settings, ca: Authority):
    cert, key = ca.sign()[0], ca.sign()[1]
    misfit = settings.model_copy(update=tls_of((cert, key))).environment()
    assert f"{key} is not the key of {cert}" in await failed("up", **misfit)


async def test_the_clients_of_up_reach_a_server_that_wants_certificates(
    settings: Settings, ca: Authority, monkeypatch: pytest.MonkeyPatch
):
    server = settings.model_copy(update=tls_of(ca.sign(), ca.file))
    own = ca.client()
    client = {
        "QUANTPLANE_TLS_CA": str(own.ca),
        "QUANTPLANE_TLS_CLIENT_CERT": str(own.cert),
        "QUANTPLANE_TLS_CLIENT_KEY": str(own.key),
    }
    environment = server.environment() | client
    async with started("up", **environment) as run:
        target = await run.ready()
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        await publish_one(target, 1)
        async with (
            asyncio.timeout(60),
            Client(target) as trader,
            watching(trader) as stream,
        ):
            await submit(target)
            async for response in stream:
                if any(e.order.filled_quantity == 10 for e in response.events):
                    break
        out = b""
        while out != b"serving\n":  # it is told late where the machine is busy
            async with started("health", "--target", target, **environment) as asked:
                out, _ = await asked.process.communicate()


async def test_up_says_at_its_start_what_keeps_its_own_clients_out(
    settings: Settings, ca: Authority
):
    environment = settings.model_copy(update=tls_of(ca.sign())).environment()
    assert "set QUANTPLANE_TLS_CA" in await failed("up", **environment)


async def test_a_unix_socket_is_served(settings: Settings, tmp_path: Path):
    listen = f"unix:{tmp_path}/s"
    async with serving(settings.model_copy(update={"listen": listen})) as target:
        await watched(target, "", "SERVING")
