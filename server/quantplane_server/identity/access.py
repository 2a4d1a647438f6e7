"""Access tokens: JWTs that say whose a session is, for 15 minutes.

What the user may do is not in them: it is looked up at each call. Every server knows
the signing keys, which are replaced every day. A new key signs only once all servers
had time to learn of it, and verifies until all that it signed has expired.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import jwt

ALGORITHM = "HS256"
LIFE = timedelta(minutes=15)
ROTATED = timedelta(days=1)  # the age at which a key has a successor
KEPT = timedelta(days=2)
LEARNT = timedelta(minutes=1)  # the age at which a key signs
SKEW = timedelta(seconds=10)  # between the clocks of servers
MAX_CHARS = 1_000
REQUIRED = ["sub", "sid", "iat", "exp"]


class SigningKey(NamedTuple):
    """A secret that all servers share."""

    key_id: str
    secret: bytes
    created_at: datetime


class Claims(NamedTuple):
    """What an access token says."""

    user_id: str
    session_id: str
    expires_at: datetime


def issue(
    keys: Sequence[SigningKey], user_id: str, session_id: str, now: datetime
) -> tuple[str, datetime]:
    """Return a token and when it expires. There is at least one key."""
    key = _signer(keys, now)
    issued_s = int(now.timestamp())
    expires_s = issued_s + int(LIFE.total_seconds())
    claims = {"sub": user_id, "sid": session_id, "iat": issued_s, "exp": expires_s}
    token = jwt.encode(claims, key.secret, ALGORITHM, headers={"kid": key.key_id})
    return token, datetime.fromtimestamp(expires_s, UTC)


def verify(keys: Sequence[SigningKey], token: str, now: datetime) -> Claims | None:
    """Return what a token says; None for one that is not good, whatever is wrong."""
    if len(token) > MAX_CHARS:
        return None
    try:
        wanted = jwt.get_unverified_header(token).get("kid")
        # The times are judged below, by the caller's clock.
        options: Any = {"require": REQUIRED, "verify_exp": False, "verify_iat": False}
        for key in keys:
            if key.key_id == wanted:
                claims = jwt.decode(token, key.secret, [ALGORITHM], options=options)
                return _in_time(claims, now)
    except (jwt.PyJWTError, RecursionError):  # nested too deep, before it is verified
        pass
    return None


def _in_time(claims: dict[str, Any], now: datetime) -> Claims | None:
    issued_s, expires_s = claims["iat"], claims["exp"]
    if not (isinstance(issued_s, int) and isinstance(expires_s, int)):
        return None
    is_begun = issued_s - SKEW.total_seconds() <= now.timestamp() < expires_s
    if not (is_begun and expires_s - issued_s <= LIFE.total_seconds()):
        return None
    expires_at = datetime.fromtimestamp(expires_s, UTC)
    return Claims(claims["sub"], str(claims["sid"]), expires_at)


def _signer(keys: Sequence[SigningKey], now: datetime) -> SigningKey:
    """Return the newest of the keys that all servers know by now."""
    newest_first = sorted(keys, key=lambda key: key.created_at, reverse=True)
    learnt = (key for key in newest_first if key.created_at <= now - LEARNT)
    return next(learnt, newest_first[-1])
