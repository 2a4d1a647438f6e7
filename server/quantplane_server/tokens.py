"""Opaque tokens for callers: what a page or a stream goes on from.

A token carries a payload and a MAC over it and its purpose. The purpose names the
method and everything else that the payload depends on (the query, the symbols, the
strategy that the caller is bound to), so a token that was altered, or made for
something else, does not open.
"""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

from quantplane_server.db import Connection
from quantplane_server.errors import InvalidPageToken
from quantplane_server.principal import bound

VERSION = b"\x01"
MAC_BYTES = 12


class Tokens:
    """Seals and opens tokens with a key that all servers of an installation share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    async def load(cls, conn: Connection) -> "Tokens":
        """Use the key that the migration made for this installation."""
        return cls(
            await conn.fetchval("SELECT key FROM server_keys WHERE purpose = 'tokens'")
        )

    def seal(self, purpose: bytes, payload: bytes) -> bytes:
        return VERSION + payload + self._mac(purpose, payload)

    def open(self, purpose: bytes, token: bytes) -> bytes | None:
        """Return the payload, or None for a token not sealed for this purpose."""
        payload, mac = token[1:-MAC_BYTES], token[-MAC_BYTES:]
        if token[:1] != VERSION:
            return None
        if not hmac.compare_digest(mac, self._mac(purpose, payload)):
            return None
        return payload

    def page_token(self, purpose: bytes, payload: bytes) -> str:
        return urlsafe_b64encode(self.seal(purpose, payload)).decode()

    def open_page(self, purpose: bytes, token: str) -> bytes:
        """Return the payload of a page token. Raises InvalidPageToken."""
        try:
            payload = self.open(purpose, urlsafe_b64decode(token))
        except ValueError:  # not even base64
            payload = None
        if payload is None:
            raise InvalidPageToken
        return payload

    def _mac(self, purpose: bytes, payload: bytes) -> bytes:
        head = len(purpose).to_bytes(4, "big")
        return hmac.digest(self._key, head + purpose + payload, "sha256")[:MAC_BYTES]


def list_purpose(request: Any) -> bytes:
    """Return what the page tokens of a list depend on: all but where a page lies."""
    return purpose(request, "page_token", "page_size")


def purpose(request: Any, *free: str) -> bytes:
    """Return what a token of the call that runs depends on.

    The request without some fields, and the only strategy that the caller may see. Not
    who it is: a process goes on from its token when it gets a new key.
    """
    terms = type(request)()
    terms.CopyFrom(request)
    for field in free:
        terms.ClearField(field)
    head: str = request.DESCRIPTOR.name
    if strategy_id := bound():  # printable, and no message begins with 0
        head += f"\0{strategy_id}\0"
    return head.encode() + bytes(terms.SerializeToString(deterministic=True))
