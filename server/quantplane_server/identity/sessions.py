"""Sessions: what a login begins, and refresh tokens go on with.

A refresh token is the session's id, a number, and a secret of the session, sealed with
the installation's key. The session knows the number of its latest token. So

- of a session's tokens only the latest is good, and the one before for 10 s more: it
  gives the same next token as the first time, so a retry makes no second line;
- an older one is known for what it is, however old: somebody has a copy, and the
  session ends for both;
- none can be made from a copy of the database, which has a hash of the secret only, nor
  by who has a token, who lacks the key.
"""

import secrets
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from hmac import compare_digest
from struct import Struct
from typing import NamedTuple
from uuid import UUID, uuid4

from quantplane import v1 as pb
from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Connection, Database
from quantplane_server.errors import Unauthenticated
from quantplane_server.identity import access, queries
from quantplane_server.identity.queries import Session
from quantplane_server.rpc.caller import Caller
from quantplane_server.tokens import Tokens

LIFE = timedelta(days=7)  # of a session, however often it is refreshed
GRACE = timedelta(seconds=10)
AT_MOST = 100  # of a user; the oldest end
PURPOSE = b"refresh"
MAX_CHARS = 200

_PACKED = Struct("!16sQ32s")  # session id, number, secret

Changed = Callable[[], Awaitable[None]]


class Held(NamedTuple):
    """What a refresh token holds."""

    session_id: str
    generation: int
    secret: bytes


class Sessions:
    """Begins sessions, goes on with them, ends them.

    `changed` is awaited after an end, which others must notice.
    """

    def __init__(self, db: Database, tokens: Tokens, changed: Changed) -> None:
        self._db = db
        self._tokens = tokens
        self._changed = changed

    async def begin(self, conn: Connection, user_id: str) -> pb.Tokens:
        """Begin a session of a user in a transaction; return its first tokens."""
        held = Held(str(uuid4()), 1, secrets.token_bytes(32))
        expires_at = await queries.add_session(
            conn, held.session_id, user_id, _hash(held), LIFE
        )
        return await self._issue(conn, held, user_id, expires_at)

    async def limit(self, user_id: str) -> None:
        """End the oldest sessions of a user who has too many."""
        async with self._db.connection() as conn:
            if not await queries.surplus_sessions(conn, user_id, AT_MOST):
                return
        async with self._db.transaction() as conn:
            await queries.lock(conn)
            for id in await queries.surplus_sessions(conn, user_id, AT_MOST):
                await queries.end_session(conn, id)
        await self._changed()

    async def refresh(self, token: str, caller: Caller) -> pb.Tokens:
        """Return the tokens that follow a refresh token. Raises Unauthenticated."""
        held = self._open(token)
        async with self._db.transaction() as conn:
            session = await _session(conn, held)
            if not session.is_good or held.generation > session.generation:
                raise Unauthenticated
            expires_at = session.expires_at
            if held.generation == session.generation:
                generation = await queries.refreshed(conn, held.session_id)
                latest = held._replace(generation=generation)
                return await self._issue(conn, latest, session.user_id, expires_at)
            if _is_retry(held, session):
                latest = held._replace(generation=session.generation)
                return await self._issue(conn, latest, session.user_id, expires_at)
        await self._end("refresh_reused", held, session, caller)
        raise Unauthenticated

    async def end(self, token: str, caller: Caller) -> None:
        """End the session of any of its tokens. Raises Unauthenticated."""
        held = self._open(token)
        async with self._db.transaction() as conn:
            session = await _session(conn, held)
        await self._end("logout", held, session, caller)

    async def _end(
        self, action: str, held: Held, session: Session, caller: Caller
    ) -> None:
        async with self._db.transaction() as conn:
            await queries.lock(conn)
            if await queries.end_session(conn, held.session_id):
                new = {"session_id": held.session_id}
                by = caller._replace(name=session.username, user_id=session.user_id)
                entry = Entry(action, "user", session.username, new=new)
                await record(conn, by, [entry])
        await self._changed()

    async def _issue(
        self, conn: Connection, held: Held, user_id: str, expires_at: datetime
    ) -> pb.Tokens:
        # None is left where all were deleted, to end every access token at once.
        keys = await queries.signing_keys(conn) or [await queries.add_signing_key(conn)]
        access_token, access_expires_at = access.issue(
            keys, user_id, held.session_id, datetime.now(UTC)
        )
        id, generation, secret = held
        payload = _PACKED.pack(UUID(id).bytes, generation, secret)
        tokens = pb.Tokens(
            access_token=access_token,
            refresh_token=self._tokens.page_token(PURPOSE, payload),
        )
        tokens.access_expires_at.FromDatetime(access_expires_at)
        tokens.refresh_expires_at.FromDatetime(expires_at)
        return tokens

    def _open(self, token: str) -> Held:
        if len(token) <= MAX_CHARS:
            try:
                payload = self._tokens.open(PURPOSE, urlsafe_b64decode(token))
            except ValueError:  # not even base64
                payload = None
            if payload is not None:
                id, generation, secret = _PACKED.unpack(payload)
                return Held(str(UUID(bytes=id)), generation, secret)
        raise Unauthenticated


async def _session(conn: Connection, held: Held) -> Session:
    session = await queries.session(conn, held.session_id)
    if session is None or not compare_digest(session.secret_hash, _hash(held)):
        raise Unauthenticated
    return session


def _is_retry(held: Held, session: Session) -> bool:
    is_last = held.generation == session.generation - 1
    return is_last and session.refreshed <= GRACE


def _hash(held: Held) -> bytes:
    return sha256(held.secret).digest()
