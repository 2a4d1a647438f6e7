"""API keys: what a process shows instead of a password.

A key is 256 random bits, so its hash needs no salt and no slowness: there is nothing
to guess from. Only the hash is kept.
"""

import secrets
from hashlib import sha256

PREFIX = "qp_"  # so that a key is found where it does not belong
RANDOM_BYTES = 32


def new_secret() -> str:
    """Return a new key: "qp_" and 43 characters of base64url."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def hash_of(secret: str) -> bytes:
    """Return what is kept of a key."""
    return sha256(secret.encode()).digest()
