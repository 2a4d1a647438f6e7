"""Settings: read once from QUANTPLANE_* variables, overridden by command-line flags."""

from pathlib import Path

from pydantic import PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What a server can be told. Each field is the variable QUANTPLANE_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="quantplane_", extra="ignore")

    listen: str = "127.0.0.1:50051"
    """Host and port; port 0 takes a free one."""
    postgres_dsn: str | None = None
    """A real server's. None: `up` brings its own."""
    reference_dsn: str | None = None
    """Of users, strategies and the like. None: they live with the time series."""
    redis_url: str | None = None
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
    maintenance_s: PositiveFloat = 60.0
    """Between two runs of the maintenance."""
    grace_s: PositiveFloat = 10.0
    """How long a stopping server waits for its calls to finish."""

    def backends(self) -> tuple[str, str]:
        """Return the DSN and the URL. Raises ValueError where one is not set."""
        if not (self.postgres_dsn and self.redis_url):
            raise ValueError(
                "QUANTPLANE_POSTGRES_DSN and QUANTPLANE_REDIS_URL must be set; "
                "`quantplane-server up` brings its own"
            )
        return self.postgres_dsn, self.redis_url

    def environment(self) -> dict[str, str]:
        """Return these settings as the variables that make them."""
        return {
            f"QUANTPLANE_{name.upper()}": str(value)
            for name, value in self.model_dump().items()
            if value is not None
        }
