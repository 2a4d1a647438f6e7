"""TLS of a client: the files it takes, and what a connection that fails means.

All paths are of PEM files. The server reads its own with the same functions.
"""

import os
import re
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc

File: TypeAlias = str | os.PathLike[str]

ADDRESS = re.compile(
    r"(?:dns:(?:///)?|ipv[46]:)?"
    r"(?:\[(?P<v6>[^]]*)]|(?P<host>[^:/,]*))(?::(?P<port>[0-9]{1,5}))?"
)

VARIABLES = ("TLS_CA", "TLS_CLIENT_CERT", "TLS_CLIENT_KEY", "TLS_NAME")

# What gRPC says of a connection that fails, what that means, and what mends it.
CLOSED = ("Socket closed", "Connection reset", "Broken pipe")
WRONG = {
    "Hostname Verification Check failed": "its certificate is for another name; reach "
    "it by that name, or set QUANTPLANE_TLS_NAME to it",
    "certificate has expired": "its certificate has expired",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by a CA that this "
    "client trusts; QUANTPLANE_TLS_CA must name the file of the one that did",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; unset QUANTPLANE_TLS_* to reach "
    "it in plaintext",
}
WANTS_TLS = "it closed the connection; if it speaks TLS, set QUANTPLANE_TLS_CA"
WANTS_CERTIFICATE = (
    "it closed the connection; if it wants a certificate of its clients, set "
    "QUANTPLANE_TLS_CLIENT_CERT and QUANTPLANE_TLS_CLIENT_KEY to one that it trusts"
)


class TlsProblem(ValueError):
    """A file with which there can be no TLS. The text names it."""


class Tls(NamedTuple):
    """What a client trusts and shows. The files are read once, by the constructor."""

    ca: File | None = None
    """Who must have signed the server's certificate. None: gRPC's public CAs."""
    cert: File | None = None
    """The client's own certificate and its chain, for a server that wants one."""
    key: File | None = None
    name: str | None = None
    """What the server's certificate must be for, if not the target's host."""


def from_environment() -> Tls | None:
    """Return what QUANTPLANE_TLS_* say; None if none of them is set."""
    tls = Tls(*(os.environ.get(f"QUANTPLANE_{each}") or None for each in VARIABLES))
    return tls if any(tls) else None


def open_channel(
    target: str, options: Sequence[tuple[str, Any]] = (), tls: Tls | None = None
) -> grpc.aio.Channel:
    """Open a channel with `tls`, or what the environment says, or in plaintext.

    Raises TlsProblem.
    """
    tls = tls or from_environment()
    if is_loopback(target):
        # gRPC would ask the proxy of `http_proxy` for this machine too: plaintext
        # must not leave it.
        options = [*options, ("grpc.enable_http_proxy", 0)]
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    roots = read_certificates(tls.ca) if tls.ca else None
    cert = key = None
    if tls.cert and tls.key:
        cert, key = read_pair(tls.cert, tls.key)
    elif tls.cert or tls.key:
        raise TlsProblem("a client's certificate and its key go together")
    credentials = grpc.ssl_channel_credentials(roots, key, cert)
    name = [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
    return grpc.aio.secure_channel(target, credentials, [*options, *name])


def is_loopback(target: str) -> bool:
    """Say whether only this machine reaches a target as gRPC takes it."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    match = ADDRESS.fullmatch(target)
    if match is None:
        return False
    if match["host"] == "localhost":
        return True
    try:
        return ip_address(match["v6"] or match["host"]).is_loopback
    except ValueError:
        return False


def port_of(target: str) -> int:
    """Return the port of a target; 0 where it names none."""
    match = ADDRESS.fullmatch(target)
    return int(match["port"] or 0) if match else 0


def explain(error: grpc.RpcError) -> str | None:
    """Return what is wrong between a client of the environment's TLS and its server.

    None: nothing that TLS could explain. gRPC tells only calls that fail at once,
    which those with wait_for_ready do not.
    """
    details = error.details() or ""
    for text, meaning in WRONG.items():
        if text in details:
            return meaning
    if any(text in details for text in CLOSED):
        return WANTS_CERTIFICATE if from_environment() else WANTS_TLS
    return None


def read_pair(cert: File, key: File) -> tuple[bytes, bytes]:
    """Return a certificate's chain and its key. Raises TlsProblem."""
    pair = read_certificates(cert), _read(key)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsProblem(f"{key} is not the key of {cert}") from None
        raise TlsProblem(f"{key} holds no unencrypted private key in PEM") from None
    if pair != (_read(cert), _read(key)):
        raise TlsProblem(f"{cert} and {key} are being written")
    return pair


def read_certificates(file: File) -> bytes:
    """Return certificates, at least one. Raises TlsProblem."""
    content = _read(file)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise TlsProblem(f"{file} holds no certificate in PEM") from None
    return content


def _read(file: File) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise TlsProblem(f"{file} can't be read: {error.strerror}") from None


def _no_password() -> str:
    """Keep OpenSSL from asking the terminal; gRPC takes no encrypted key either."""
    return ""
