"""The client of quantplane, the data plane of a trading desk."""

from quantplane.client import Client
from quantplane.errors import metadata_of, reason_of, retry_s, violations_of
from quantplane.tls import Tls

__all__ = [
    "Client",
    "Tls",
    "metadata_of",
    "reason_of",
    "retry_s",
    "violations_of",
]
