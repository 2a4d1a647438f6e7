"""Users, keys and permissions in memory: what every call is judged by.

Each server has the whole picture, and reads it again when the row identity_version
moves, which triggers see to whatever makes the change: it is announced, and looked at
twice a second besides. While the database is away the last picture counts.
"""

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from google.protobuf.wrappers_pb2 import Int64Value

from quantplane_server import db as databases
from quantplane_server.db import Database
from quantplane_server.identity import access, queries
from quantplane_server.identity.keys import PREFIX, hash_of
from quantplane_server.identity.queries import Key, Picture
from quantplane_server.principal import Principal
from quantplane_server.tasks import Outage
from quantplane_server.watch import Part, State, Watched, Watches

logger = logging.getLogger(__name__)

TOPIC = "identity"  # announced by whoever has changed what the picture shows
LOOK_S = 0.5  # between two looks at the version, if nothing is announced
REST_S = 0.05  # at the least, however many ask for one
NOTE_S = 30.0  # between two notes of which keys were used
ANY = "*"
MAX_VERIFIED = 10_000  # access tokens that are known to be good


class Holder(NamedTuple):
    """Whom an API key stands for, and until when."""

    principal: Principal
    expires_s: float  # since 1970


class Directory:
    """Who there is, and what they may do, as of the last look."""

    def __init__(self, reference: Database, watches: Watches) -> None:
        self.changed: list[Callable[[], None]] = []
        self._db = reference
        self._watches = watches
        self._watched: Watched | None = None
        self._version = 0
        self._users: Mapping[str, Principal] = {}
        self._names: Mapping[str, Principal] = {}
        self._hashes: Mapping[bytes, Holder] = {}
        self._keys: Mapping[str, Holder] = {}
        self._grants: Mapping[str, set[tuple[str, str]]] = {}
        self._signing_keys: list[access.SigningKey] = []
        self._ended: frozenset[str] = frozenset()  # sessions
        self._verified: dict[str, access.Claims] = {}
        self._next_expiry_s = math.inf
        self._used: set[str] = set()
        work = "noting which keys were used"
        self._outage = Outage(logger, work, databases.UNAVAILABLE)

    # --- Following ---

    async def load(self) -> None:
        """Take a new picture. Raises one of db.UNAVAILABLE."""
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            self._show(await queries.picture(conn))
        self._tell()

    async def run(self) -> None:
        """Follow the changes, and note which keys were used, until cancelled."""
        part = Part(TOPIC, [TOPIC], self._look, LOOK_S, REST_S)
        with self._watches.watching(part, lambda: None) as self._watched:
            while True:
                await asyncio.sleep(NOTE_S)
                await self._note_used()

    async def refresh(self) -> None:
        """Make the picture current; while the database is away it stays as it is."""
        if self._watched:
            await self._watched.refresh().wait()

    async def _look(self) -> State:
        async with self._db.connection() as conn:
            version = await queries.version(conn)
        if version != self._version:
            await self.load()
        elif self._next_expiry_s <= time.time():
            self._tell()
        return {TOPIC: Int64Value(value=version)}

    def _show(self, picture: Picture) -> None:
        self._version = picture.version
        self._users = {
            user_id: Principal(user_id, name, role)
            for user_id, name, role in picture.active_users
        }
        self._names = {user.username: user for user in self._users.values()}
        self._hashes = {
            key.key_hash: Holder(self._holder(key), _seconds(key.expires_at))
            for key in picture.keys
            if key.user_id in self._users
        }
        self._keys = {h.principal.key_id: h for h in self._hashes.values()}
        grants = defaultdict(set)
        for role, resource, action in picture.permissions:
            grants[role].add((resource, action))
        self._grants = dict(grants)
        self._signing_keys = list(picture.signing_keys)
        self._ended = frozenset(picture.ended_sessions)
        self._verified.clear()

    def _holder(self, key: Key) -> Principal:
        name = self._users[key.user_id].username
        return Principal(key.user_id, name, key.role, key.key_id, key.strategy_id)

    def _tell(self) -> None:
        now_s = time.time()
        ahead = (h.expires_s for h in self._keys.values() if h.expires_s > now_s)
        self._next_expiry_s = min(ahead, default=math.inf)
        for judge in self.changed:
            judge()

    async def _note_used(self) -> None:
        used, self._used = self._used, set()
        if not used:
            return
        with self._outage:
            async with self._db.connection() as conn:
                await queries.used(conn, sorted(used))

    # --- Asking ---

    def find(self, token: str) -> Principal | None:
        """Return whom a key or an access token stands for; None: it is not good."""
        if token.startswith(PREFIX):
            holder = self._hashes.get(hash_of(token))
            if holder is None or holder.expires_s <= time.time():
                return None
            self._used.add(holder.principal.key_id)
            return holder.principal
        claims = self._claims(token)
        if claims is None or claims.session_id in self._ended:
            return None
        user = self._users.get(claims.user_id)
        return user and user._replace(session_id=claims.session_id)

    def named(self, username: str) -> Principal | None:
        """Return an active user."""
        return self._names.get(username)

    def current(self, known: Principal) -> Principal | None:
        """Return what somebody known before is now; None: no longer known.

        A session outlives its access tokens: what begins with one may go on after it.
        """
        if known.key_id:
            holder = self._keys.get(known.key_id)
            if holder is None or holder.expires_s <= time.time():
                return None
            return holder.principal
        if known.session_id in self._ended:
            return None
        user = self._users.get(known.user_id)
        return user and user._replace(session_id=known.session_id)

    def permits(self, role: str, resource: str, action: str) -> bool:
        """Tell whether a role permits something now."""
        granted = self._grants.get(role)
        return granted is not None and (
            (resource, action) in granted
            or (resource, ANY) in granted
            or (ANY, action) in granted
            or (ANY, ANY) in granted
        )

    def _claims(self, token: str) -> access.Claims | None:
        now = datetime.now(UTC)
        claims = self._verified.get(token)
        if claims:
            return claims if now < claims.expires_at else None
        claims = access.verify(self._signing_keys, token, now)
        if claims:
            if len(self._verified) >= MAX_VERIFIED:
                self._verified.clear()
            self._verified[token] = claims
        return claims


def _seconds(time: datetime | None) -> float:
    return time.timestamp() if time else math.inf
