"""Settings: read once from QUANTPLANE_* variables, overridden by command-line flags."""

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self, TypeAlias

from pydantic import AfterValidator, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from quantplane.tls import is_loopback

# A password with characters that divide a URL is taken for a host, a port or a path,
# and who reports that one of these is wrong repeats it.
HOST = r"(\[[^]@]*]|[^]@:/?#\[,]*)(:\d*)?"
URL = re.compile(rf"(?P<scheme>\w+)://([^/?#\[\]]*@)?{HOST}(,{HOST})*([/?#][^@]*)?")


def _check_url(schemes: tuple[str, ...], text: str) -> str:
    """Return a URL, or "". Raises an error that does not repeat it."""
    match = URL.fullmatch(text)
    if text and (match is None or match["scheme"] not in schemes):
        raise PydanticCustomError(
            "url",
            "must be {schemes}://USER:PASSWORD@HOST..., where / ? # [ ] in a password"
            " are %2F %3F %23 %5B %5D",
            {"schemes": " or ".join(schemes)},
        )
    return text


Dsn: TypeAlias = Annotated[
    str, AfterValidator(partial(_check_url, ("postgresql", "postgres")))
]
RedisUrl: TypeAlias = Annotated[
    str, AfterValidator(partial(_check_url, ("redis", "rediss", "unix")))
]


class TlsFiles(NamedTuple):
    """PEM files to serve TLS with."""

    cert: str
    key: str
    client_ca: str | None


class Settings(BaseSettings):
    """What a server can be told. Each field is the variable QUANTPLANE_<FIELD>."""

    model_config = SettingsConfigDict(
        env_prefix="quantplane_", extra="ignore", hide_input_in_errors=True
    )

    listen: str = "127.0.0.1:50051"
    """Host and port; port 0 takes a free one."""
    tls_cert: str | None = None
    """PEM file of the server's certificate and its chain. None: plaintext."""
    tls_key: str | None = None
    """PEM file of the certificate's key."""
    tls_client_ca: str | None = None
    """PEM file of the CA that must have signed clients' certificates. None: no need."""
    insecure: bool = False
    """Plaintext may be served beyond loopback."""
    postgres_dsn: Dsn | None = None
    """A real server's. None: `up` brings its own."""
    reference_dsn: Dsn | None = None
    """Of users, strategies and the like. None: they live with the time series."""
    redis_url: RedisUrl | None = None
    """A real server's (Valkey 8, Redis 7 or newer). None: `up` brings its own."""
    data_dir: Path = Path(".quantplane")
    """Where `up` keeps its own PostgreSQL and Valkey."""
    pool_size: PositiveInt = 10
    """Connections to PostgreSQL, per process."""
    window_mb: PositiveInt = 512
    """Recorded quotes that stay on the bus, for readers that are behind."""
    cap_mb: PositiveInt = 2048
    """Quotes on the bus that are not recorded yet; beyond, feeds are held back."""
    max_streams: PositiveInt = 10_000
    """Streams per process."""
    auth: bool = True
    """Callers must show who they are. False: anybody may do anything, on loopback."""
    max_calls: PositiveInt = 5_000
    """Calls of one user or API key at a time, streams too, per process."""
    max_calls_per_s: PositiveInt = 5_000
    """Calls that one user or API key begins in a second, per process."""
    maintenance_s: PositiveFloat = 60.0
    """Between two runs of the maintenance."""
    grace_s: PositiveFloat = 10.0
    """How long a stopping server waits for its calls to finish."""
    trace_stream_s: PositiveFloat = 10.0
    """Between two spans of what a traced stream delivers."""
    metrics_listen: str | None = None
    """Host and port where Prometheus reads the metrics; further processes take the
    ports after it. None: nowhere."""
    log_format: Literal["text", "json"] | None = None
    """None: text on a terminal, else JSON."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Records of less weight are not logged."""

    def backends(self) -> tuple[str, str]:
        """Return the DSN and the URL. Raises ValueError where one is not set."""
        if not (self.postgres_dsn and self.redis_url):
            raise ValueError(
                "QUANTPLANE_POSTGRES_DSN and QUANTPLANE_REDIS_URL must be set; "
                "`quantplane-server up` brings its own"
            )
        return self.postgres_dsn, self.redis_url

    def tls(self) -> TlsFiles | None:
        """Return the files to serve TLS with; None: plaintext.

        Raises ValueError where only some are set, or where plaintext, or calls of
        anybody, would leave loopback.
        """
        if not (self.auth or is_loopback(self.listen)):
            raise ValueError(
                f"{self.listen} is beyond loopback, where QUANTPLANE_AUTH must be true"
            )
        if self.tls_cert and self.tls_key:
            return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca or None)
        if self.tls_cert or self.tls_key or self.tls_client_ca:
            raise ValueError(
                "QUANTPLANE_TLS_CERT and QUANTPLANE_TLS_KEY must both be set for TLS"
            )
        if not (self.insecure or is_loopback(self.listen)):
            raise ValueError(
                f"{self.listen} is beyond loopback, where plaintext can be read and "
                "changed: set QUANTPLANE_TLS_CERT and QUANTPLANE_TLS_KEY, or say "
                "--insecure"
            )
        return None

    def metrics_address(self) -> tuple[str, int] | None:
        """Return where to serve metrics, if anywhere.

        Raises ValueError where plaintext would leave loopback, or for what is no
        address.
        """
        listen = self.metrics_listen
        if not listen:
            return None
        if re.fullmatch(r"[^,/\s]*:[0-9]+", listen) is None:
            raise ValueError(f"QUANTPLANE_METRICS_LISTEN: {listen} is not HOST:PORT")
        if not (self.insecure or is_loopback(listen)):
            raise ValueError(
                f"{listen} is beyond loopback, where anybody can read the metrics: say "
                "--insecure if that is meant"
            )
        host, _, port = listen.rpartition(":")
        return host.strip("[]"), int(port)

    def process(self, number: int) -> Self:
        """Return the settings of a process beside this one, from 1 on.

        Its metrics are that many ports further, unless each takes a free one.
        """
        address = self.metrics_address()
        if address is None or address[1] == 0:
            return self
        host = self.metrics_listen.rpartition(":")[0]  # type: ignore[union-attr]
        listen = f"{host}:{address[1] + number}"
        return self.model_copy(update={"metrics_listen": listen})

    def environment(self) -> dict[str, str]:
        """Return these settings as the variables that make them."""
        return {
            f"QUANTPLANE_{name.upper()}": str(value)
            for name, value in self.model_dump().items()
            if value is not None
        }
