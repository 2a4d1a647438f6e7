"""Whether somebody knows a user's password, and how often that may be tried.

A try counts as failed before it is judged, and is taken back if it was good: so tries
at the same time do not pass each other by. It is counted for the user and address
together, for the address (an IPv6 network of 64 bits, which one machine may have for
itself), and for the user from anywhere. Names that nobody has count as others do.

Somebody who tries from many addresses can keep a user from logging in. API keys and
sessions go on, and `quantplane-server user` does not ask.
"""

from datetime import timedelta
from hashlib import sha256
from ipaddress import IPv4Address, ip_address, ip_network
from typing import NamedTuple

from quantplane_server.audit.queries import Entry, record
from quantplane_server.db import Database
from quantplane_server.errors import LoginLocked, Overloaded, Unauthenticated
from quantplane_server.identity import queries
from quantplane_server.identity.passwords import Passwords
from quantplane_server.identity.queries import Account
from quantplane_server.rpc.caller import Caller
from quantplane_server.telemetry.metrics import LOGINS_FAILED

MOST = timedelta(minutes=15)  # that a failure locks


class Limit(NamedTuple):
    """How often a login may fail."""

    free: int  # the failure with this number is the first that locks
    forgotten: timedelta  # one of them after each


PAIR = Limit(5, timedelta(hours=1))
ADDRESS = Limit(100, timedelta(minutes=1))  # which a whole desk may share
USER = Limit(100, timedelta(minutes=1))


class Logins:
    """Judges passwords."""

    def __init__(self, db: Database, passwords: Passwords) -> None:
        self._db = db
        self._passwords = passwords

    async def check(
        self, action: str, username: str, password: str, caller: Caller
    ) -> Account:
        """Return the active user of this name and password.

        A failure is entered in the audit log as that of this action. Raises
        Unauthenticated, LoginLocked and Overloaded.
        """
        limits = _limits(username, caller.address)
        async with self._db.transaction() as conn:
            if retry_s := await queries.locked_s(conn, list(limits)):
                raise LoginLocked(retry_s)  # and nothing is written, however many try
            for subject, limit in sorted(limits.items()):
                if not await queries.count_failure(conn, subject, *limit, MOST):
                    raise LoginLocked(await queries.locked_s(conn, list(limits)))
            account = await queries.account(conn, username)
        kept = account.password_hash if account else None
        try:
            is_good = await self._passwords.verify(kept, password)
        except Overloaded:
            await self._take_back(limits)
            raise
        if account and is_good and account.is_active:
            await self._take_back(limits, forgiven=True)
            return account
        LOGINS_FAILED.add(1, action)
        await self._enter(action, username if account else "", limits, caller)
        raise Unauthenticated

    async def _take_back(
        self, limits: dict[str, Limit], forgiven: bool = False
    ) -> None:
        async with self._db.transaction() as conn:
            for subject, limit in sorted(limits.items()):
                if forgiven and limit is PAIR:
                    await queries.forgive(conn, subject)
                else:
                    await queries.take_back(conn, subject, limit.forgotten)

    async def _enter(
        self, action: str, username: str, limits: dict[str, Limit], caller: Caller
    ) -> None:
        """Enter a failure. A name that nobody has may be a password: it is not told."""
        async with self._db.transaction() as conn:
            locked_s = round(await queries.locked_s(conn, list(limits)))
            new = {"known": bool(username), "locked_s": locked_s}
            entry = Entry(f"{action}_failed", "user", username, new=new)
            await record(conn, caller, [entry])


def _limits(username: str, address: str | None) -> dict[str, Limit]:
    """Return what a try counts for. A name may be a password: only its hash is kept."""
    user, place = sha256(username.encode()).hexdigest(), _place(address)
    return {
        f"{place} {user}": PAIR,
        f"address {place}": ADDRESS,
        f"user {user}": USER,
    }


def _place(address: str | None) -> str:
    if address is None:
        return "local"
    ip = ip_address(address)
    if isinstance(ip, IPv4Address):
        return str(ip)
    if ip.ipv4_mapped:  # a server that listens to both may see them so
        return str(ip.ipv4_mapped)
    return str(ip_network((ip, 64), strict=False))
