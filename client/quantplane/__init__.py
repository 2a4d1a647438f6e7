"""The client of quantplane, the data plane of a trading desk."""

from quantplane.client import Client
from quantplane.errors import metadata_of, reason_of, violations_of

__all__ = ["Client", "metadata_of", "reason_of", "violations_of"]
