"""People log in, stay logged in, and log out; guessing is slow, and tells nothing."""

import asyncio
import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Any

import grpc
import jwt
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quantplane import v1 as pb
from quantplane_server.checks import SYMBOL
from quantplane_server.errors import Overloaded
from quantplane_server.identity import access, passwords, queries
from quantplane_server.identity.access import KEPT, LIFE, ROTATED, SKEW, SigningKey
from quantplane_server.identity.checks import GIVEN
from quantplane_server.identity.logins import MOST, PAIR, Limit, _limits
from quantplane_server.identity.passwords import Passwords
from quantplane_server.identity.sessions import _PACKED, AT_MOST, PURPOSE
from quantplane_server.identity.upkeep import upkeep
from quantplane_server.tokens import Tokens
from tests.admin import connected
from tests.identity.desk import PASSWORD, UNKNOWN, WRONG, Desk, open_desk
from tests.postgres import database
from tests.reference import entries, fetch
from tests.signals import refused, violations, waiting


@pytest.fixture
async def desk(dsn: str) -> AsyncIterator[Desk]:
    async with open_desk(dsn) as desk:
        await desk.add()
        yield desk


# --- Login --------------------------------------------------------------------------


async def test_a_login_gives_an_access_token_for_15_minutes(desk: Desk):
    tokens = await desk.log_in()
    claims = await desk.claims(tokens)
    assert claims
    user_id = await desk.value("SELECT user_id::text FROM users WHERE username = 'ann'")
    session_id = await desk.value("SELECT session_id::text FROM sessions")
    assert (claims.user_id, claims.session_id) == (user_id, session_id)
    assert claims.expires_at == tokens.access_expires_at.ToDatetime(UTC)
    assert await desk.claims_at(tokens, claims.expires_at) is None


async def test_the_user_has_logged_in_since(desk: Desk):
    before = await desk.get()
    await desk.log_in()
    after = await desk.get()
    assert not before.HasField("last_login_at") and after.HasField("last_login_at")
    assert after.etag == before.etag


@pytest.mark.parametrize(
    ("username", "password"),
    [("ann", WRONG), ("nobody", PASSWORD), ("Ann", PASSWORD), ("ann", PASSWORD + " ")],
)
async def test_a_wrong_name_or_password_is_told_alike(
    desk: Desk, username: str, password: str
):
    assert await refused(desk.log_in(username, password)) == UNKNOWN


async def test_so_is_a_user_who_is_disabled(desk: Desk):
    await desk.execute("UPDATE users SET is_active = false WHERE username = 'ann'")
    assert await refused(desk.log_in()) == UNKNOWN
    assert await desk.value("SELECT count(*) FROM sessions") == 0


async def test_and_one_without_a_password(desk: Desk):
    await desk.execute("UPDATE users SET password_hash = '!' WHERE username = 'ann'")
    for password in (PASSWORD, "!"):
        assert await refused(desk.log_in(password=password)) == UNKNOWN


async def test_an_unknown_user_takes_the_same_work(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    hashes = list[str]()
    matches = passwords._matches

    def seen(hash: str, password: str) -> bool:
        hashes.append(hash)
        return matches(hash, password)

    monkeypatch.setattr(passwords, "_matches", seen)
    real = passwords.HASHER.hash(PASSWORD)
    await desk.execute("UPDATE users SET password_hash = $1", real)
    await refused(desk.log_in("ann", WRONG))
    await refused(desk.log_in("nobody", WRONG))
    one, other = (hash.rsplit("$", 2)[0] for hash in hashes)
    assert one == other == "$argon2id$v=19$m=65536,t=2,p=1"


async def test_no_password_matches_the_hash_of_nobody():
    work = Passwords()
    assert not await work.verify(None, "")
    assert not await work.verify(None, PASSWORD)
    work.close()


async def test_a_login_without_rules_kept_is_refused_unjudged(desk: Desk):
    request = pb.LoginRequest(username=" ann", password="x" * 257)
    assert await violations(desk.auth.Login(request)) == [
        ("username", SYMBOL),
        ("password", GIVEN),
    ]
    assert await desk.value("SELECT count(*) FROM login_failures") == 0


async def test_a_password_that_changes_while_it_is_verified_is_the_old_one(desk: Desk):
    async with desk.db.transaction() as conn:
        await conn.execute(
            "UPDATE users SET password_hash = '!' WHERE username = 'ann'"
        )
        login = asyncio.create_task(desk.log_in())
        async with connected(desk.dsn) as watcher:
            await waiting(watcher, 1)
    assert await refused(login) == UNKNOWN


async def test_the_oldest_session_of_too_many_ends(desk: Desk):
    oldest = await desk.log_in()
    await desk.execute(
        """
        INSERT INTO sessions (session_id, user_id, secret_hash, expires_at)
        SELECT gen_random_uuid(), user_id, '', NOW() + INTERVAL '1 day'
          FROM users, generate_series(2, $1) WHERE username = 'ann'
        """,
        AT_MOST,
    )
    assert desk.changes == 0
    oldest = await desk.refresh(oldest.refresh_token)
    latest = await desk.log_in()
    assert await refused(desk.refresh(oldest.refresh_token)) == UNKNOWN
    assert await desk.refresh(latest.refresh_token)
    assert desk.changes == 1


# --- Guessing -----------------------------------------------------------------------


async def test_a_login_is_locked_after_5_failures_even_with_the_right_password(
    desk: Desk,
):
    for _ in range(PAIR.free - 1):
        assert await refused(desk.log_in(password=WRONG)) == UNKNOWN
    await _longer(desk)
    assert await refused(desk.log_in(password=WRONG)) == UNKNOWN
    await _longer(desk)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await desk.log_in()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 0 < _retry_s(raised.value) <= 600
    await desk.log_in("root")  # others, from the same address, are not


async def test_nobodys_name_is_locked_as_a_users(desk: Desk):
    for _ in range(PAIR.free):
        await refused(desk.log_in("nobody", WRONG))
    await _longer(desk)
    assert (await refused(desk.log_in("nobody", WRONG)))[1] == "LOGIN_LOCKED"


async def test_tries_at_the_same_time_do_not_pass_each_other_by(desk: Desk):
    tries = (refused(desk.log_in(password=WRONG)) for _ in range(20))
    reasons = [reason for _, reason, _ in await asyncio.gather(*tries)]
    # Slow tries may see a second lock end: doubling holds them back all the same.
    assert reasons.count("UNAUTHENTICATED") < PAIR.free + 5
    assert reasons.count("LOGIN_LOCKED") > 10


async def test_a_good_login_forgives(desk: Desk):
    for _ in range(PAIR.free - 1):
        await refused(desk.log_in(password=WRONG))
    await desk.log_in()
    for _ in range(PAIR.free - 1):
        assert await refused(desk.log_in(password=WRONG)) == UNKNOWN
    await desk.log_in()


async def test_but_not_the_address_nor_the_user_from_elsewhere(desk: Desk):
    for _ in range(3):
        await refused(desk.log_in(password=WRONG))
    await desk.log_in()
    kept = await fetch(
        desk.dsn,
        """
        SELECT split_part(subject, ' ', 1),
               ceil(extract(epoch FROM forgotten_at - NOW()) / 60)::int
          FROM login_failures ORDER BY 1
        """,
    )
    assert kept == [("address", 3), ("user", 3)]


@pytest.mark.parametrize("subject", ["address 127.0.0.1", "user"])
async def test_an_address_and_a_user_are_locked_too(desk: Desk, subject: str):
    (subject,) = (s for s in _limits("ann", "127.0.0.1") if s.startswith(subject))
    await desk.execute(
        """
        INSERT INTO login_failures
        VALUES ($1, NOW() + INTERVAL '2 hours', NOW() + INTERVAL '5 minutes')
        """,
        subject,
    )
    assert (await refused(desk.log_in()))[1] == "LOGIN_LOCKED"
    before = await fetch(desk.dsn, "SELECT * FROM login_failures")
    assert [row[0] for row in before] == [subject]  # what is locked counts no more


async def test_each_failure_locks_twice_as_long_to_a_bound(desk: Desk):
    locked = list[int]()
    for _ in range(20):
        async with desk.db.connection() as conn:
            assert await queries.count_failure(conn, "s", *PAIR, MOST)
            now = "coalesce(extract(epoch FROM locked_until - NOW()), 0)::float8"
            seconds = await conn.fetchval(f"SELECT {now} FROM login_failures")
            locked.append(ceil(seconds))
            await conn.execute("UPDATE login_failures SET locked_until = NULL")
    doubled = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert locked == [0] * 4 + doubled + [900] * 6


async def test_failures_are_forgotten_one_by_one(desk: Desk):
    limit = Limit(3, timedelta(minutes=1))
    async with desk.db.connection() as conn:

        async def fail() -> bool:
            await queries.count_failure(conn, "s", *limit, MOST)
            locked = "SELECT locked_until IS NOT NULL FROM login_failures"
            is_locked = bool(await conn.fetchval(locked))
            await conn.execute("UPDATE login_failures SET locked_until = NULL")
            return is_locked

        async def minutes_pass(count: int) -> None:
            await conn.execute(
                "UPDATE login_failures SET forgotten_at = forgotten_at - $1::interval",
                timedelta(minutes=count),
            )

        assert [await fail() for _ in range(4)] == [False, False, True, True]
        await minutes_pass(2)
        assert [await fail() for _ in range(2)] == [True, True]
        await minutes_pass(100)
        assert [await fail() for _ in range(3)] == [False, False, True]


def test_an_ipv4_address_counts_alike_however_it_is_written():
    assert _limits("a", "::ffff:192.0.2.1") == _limits("a", "192.0.2.1")
    assert _limits("a", "::ffff:192.0.2.1") != _limits("a", "::ffff:192.0.2.2")


def test_an_ipv6_network_counts_as_one_address():
    one, other = (set(_limits("a", f"2001:db8::{n}")) for n in (1, 2))
    assert one == other
    assert one != set(_limits("a", "2001:db8:0:1::1"))


async def test_a_process_that_can_hash_no_more_says_so_and_counts_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(passwords, "MAX_WAITING", 0)
    code, reason, _ = await refused(desk.log_in())
    assert (code, reason) == (Overloaded.code, "OVERLOADED")
    failures = "SELECT count(*) FROM login_failures WHERE forgotten_at > NOW()"
    assert await desk.value(failures) == 0


# --- Refresh tokens -----------------------------------------------------------------


async def test_a_refresh_token_is_exchanged_for_tokens_of_the_same_session(desk: Desk):
    first = await desk.log_in()
    second = await desk.refresh(first.refresh_token)
    old, new = await desk.claims(first), await desk.claims(second)
    assert old and new
    assert (new.user_id, new.session_id) == (old.user_id, old.session_id)
    assert second.refresh_token != first.refresh_token
    assert second.refresh_expires_at == first.refresh_expires_at


async def test_within_10_s_it_counts_as_a_retry_with_the_same_answer(desk: Desk):
    first = await desk.log_in()
    answers = [await desk.refresh(first.refresh_token) for _ in range(3)]
    assert len({answer.refresh_token for answer in answers}) == 1
    assert await desk.refresh(answers[0].refresh_token)


async def test_at_the_same_instant_too(desk: Desk):
    first = await desk.log_in()
    calls = (desk.refresh(first.refresh_token) for _ in range(8))
    assert len({tokens.refresh_token for tokens in await asyncio.gather(*calls)}) == 1


async def test_used_again_later_it_ends_the_session(desk: Desk):
    first = await desk.log_in()
    second = await desk.refresh(first.refresh_token)
    await _seconds_pass(desk, 11)
    assert await refused(desk.refresh(first.refresh_token)) == UNKNOWN
    assert await refused(desk.refresh(second.refresh_token)) == UNKNOWN
    assert ("refresh_reused", "user", "ann") in await desk.audited()
    assert desk.changes == 1


async def test_one_before_the_last_ends_it_at_once(desk: Desk):
    first = await desk.log_in()
    second = await desk.refresh(first.refresh_token)
    third = await desk.refresh(second.refresh_token)
    assert await refused(desk.refresh(first.refresh_token)) == UNKNOWN
    assert await refused(desk.refresh(third.refresh_token)) == UNKNOWN


async def test_other_sessions_of_the_user_go_on(desk: Desk):
    first, other = await desk.log_in(), await desk.log_in()
    await desk.refresh(first.refresh_token)
    await _seconds_pass(desk, 11)
    await refused(desk.refresh(first.refresh_token))
    assert await desk.refresh(other.refresh_token)


async def test_a_session_ends_by_itself(desk: Desk):
    tokens = await desk.log_in()
    await desk.execute("UPDATE sessions SET expires_at = NOW()")
    assert await refused(desk.refresh(tokens.refresh_token)) == UNKNOWN


async def test_a_user_who_is_disabled_refreshes_nothing(desk: Desk):
    tokens = await desk.log_in()
    await desk.execute("UPDATE users SET is_active = false")
    assert await refused(desk.refresh(tokens.refresh_token)) == UNKNOWN


async def test_a_token_of_a_restored_databases_future_is_refused(desk: Desk):
    first = await desk.log_in()
    second = await desk.refresh(first.refresh_token)
    await desk.execute("UPDATE sessions SET generation = 1")
    assert await refused(desk.refresh(second.refresh_token)) == UNKNOWN
    assert await desk.refresh(first.refresh_token)


@pytest.mark.parametrize("at", range(0, 69, 4))
async def test_a_token_with_one_bit_changed_is_no_token(desk: Desk, at: int):
    tokens = await desk.log_in()
    data = bytearray(urlsafe_b64decode(tokens.refresh_token))
    assert len(data) == 69
    data[at] ^= 1
    forged = urlsafe_b64encode(data).decode()
    assert await refused(desk.refresh(forged)) == UNKNOWN
    assert await desk.refresh(tokens.refresh_token)  # and does not end the session


@pytest.mark.parametrize("token", ["", "é", "=", "x" * 1_000_000, "AAAA", "qp_"])
async def test_neither_is_any_other_text(desk: Desk, token: str):
    assert await refused(desk.refresh(token)) == UNKNOWN
    assert await refused(desk.log_out(token)) == UNKNOWN


async def test_the_database_alone_does_not_make_a_token(desk: Desk):
    """The key of the tokens, and all of the session's row, lack the secret."""
    await desk.log_in()
    ((id, hash),) = await fetch(
        desk.dsn, "SELECT session_id, secret_hash FROM sessions"
    )
    async with desk.db.connection() as conn:
        tokens = await Tokens.load(conn)
    forged = tokens.page_token(PURPOSE, _PACKED.pack(id.bytes, 1, hash))
    assert await refused(desk.refresh(forged)) == UNKNOWN


async def test_after_a_logout_the_session_is_over(desk: Desk):
    tokens = await desk.log_in()
    await desk.log_out(tokens.refresh_token)
    assert await refused(desk.refresh(tokens.refresh_token)) == UNKNOWN
    assert await desk.value("SELECT ended_at IS NOT NULL FROM sessions")
    assert desk.changes == 1


async def test_logging_out_again_changes_nothing(desk: Desk):
    tokens = await desk.log_in()
    for _ in range(2):
        await desk.log_out(tokens.refresh_token)
    actions = [action for action, *_ in await desk.audited()]
    assert actions == ["login", "logout"]


class Rotation(RuleBasedStateMachine):
    """Sessions as they should be, beside sessions as they are.

    Whoever may hold a token of a session, and whenever they use it: one line of tokens
    is good at a time, and a copy that is used late ends it.
    """

    dsn = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.context = open_desk(self.dsn)
        self.desk = self.runner.run(self.context.__aenter__())
        self.runner.run(self.desk.add())
        self.tokens = [self.runner.run(self.desk.log_in()).refresh_token]
        self.age_s = 0  # of the latest token
        self.is_over = False

    @rule(back=st.integers(0, 4))
    def refresh(self, back: int) -> None:
        place = max(len(self.tokens) - 1 - back, 0)
        behind = len(self.tokens) - 1 - place
        call = self.desk.refresh(self.tokens[place])
        if self.is_over:
            assert self.runner.run(refused(call)) == UNKNOWN
        elif behind == 0:
            self.tokens.append(self.runner.run(call).refresh_token)
            self.age_s = 0
        elif behind == 1 and self.age_s < 10:
            assert self.runner.run(call).refresh_token == self.tokens[-1]
        else:
            assert self.runner.run(refused(call)) == UNKNOWN
            self.is_over = True

    @rule(seconds=st.sampled_from([5, 30]))
    def seconds_pass(self, seconds: int) -> None:
        self.runner.run(_seconds_pass(self.desk, seconds))
        self.age_s += seconds

    @rule()
    def log_out(self) -> None:
        self.runner.run(self.desk.log_out(self.tokens[0]))
        self.is_over = True

    @invariant()
    def no_token_is_given_twice(self) -> None:
        assert len(set(self.tokens)) == len(self.tokens)

    def teardown(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))
        self.runner.close()


def test_refresh_tokens_rotate_whoever_uses_them_whenever(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
):
    with asyncio.Runner() as runner:
        context = database(postgres_dsn)
        monkeypatch.setattr(Rotation, "dsn", runner.run(context.__aenter__()))
        try:
            machine = Rotation.TestCase
            machine.settings = hypothesis(
                max_examples=15,
                stateful_step_count=12,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            machine().runTest()
        finally:
            runner.run(context.__aexit__(None, None, None))


# --- Access tokens ------------------------------------------------------------------

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = SigningKey("a", b"a" * 32, NOW - timedelta(hours=1))
OTHER = SigningKey("b", b"b" * 32, NOW - timedelta(hours=2))
CLAIMS = {
    "sub": "u", "sid": "s", "iat": int(NOW.timestamp()), "exp": int(NOW.timestamp()) + 9
}  # fmt: skip


def test_an_access_token_is_good_until_it_expires():
    token, expires_at = access.issue([KEY], "u", "s", NOW)
    assert expires_at == NOW + LIFE
    assert access.verify([KEY], token, NOW) == ("u", "s", expires_at)
    assert access.verify([OTHER, KEY], token, expires_at - timedelta(seconds=1))
    assert access.verify([KEY], token, expires_at) is None


def test_one_from_the_future_is_not():
    token, _ = access.issue([KEY], "u", "s", NOW)
    assert access.verify([KEY], token, NOW - SKEW)
    assert access.verify([KEY], token, NOW - SKEW - timedelta(seconds=1)) is None


def _signed(claims: Any = CLAIMS, key: bytes = KEY.secret, **header: str) -> str:
    """Return a token as somebody may make it, by the header's alg and kid."""
    header = {"typ": "JWT", "alg": "HS256", "kid": "a"} | header
    parts = (json.dumps(part).encode() for part in (header, claims))
    text = ".".join(urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    digest = header["alg"].replace("HS", "sha")
    signature = b"" if digest == "none" else hmac.digest(key, text.encode(), digest)
    return f"{text}.{urlsafe_b64encode(signature).decode().rstrip('=')}"


def test_a_token_that_is_made_by_the_key_is_good():
    assert access.verify([KEY], _signed(), NOW)


@pytest.mark.parametrize(
    "token",
    [
        _signed(alg="none"),
        _signed(kid="b"),
        _signed(key=OTHER.secret),
        _signed(key=b""),
        _signed(alg="HS384"),
        _signed(alg="HS512"),
        *(_signed(CLAIMS | {claim: None}) for claim in CLAIMS),
        *(
            _signed({name: CLAIMS[name] for name in CLAIMS if name != claim})
            for claim in CLAIMS
        ),
        _signed(CLAIMS | {"exp": "soon"}),
        _signed(CLAIMS | {"exp": 1e300}),
        _signed(CLAIMS | {"iat": [1]}),
        _signed(CLAIMS | {"sub": 1}),
        _signed([]),
        _signed() + "x",
        _signed().rpartition(".")[0] + ".",
        "",
        "a.b.c",
        "é.é.é",
        "\0",
        urlsafe_b64encode(b'{"a":' + b"[" * 600).decode() + ".e30.",
        "x" * 10_000_000,
    ],
    ids=lambda token: token[-20:],
)
def test_no_other_token_is_good(token: str):
    assert access.verify([KEY, OTHER], token, NOW) is None


def test_a_key_signs_once_all_servers_know_it():
    new = SigningKey("new", b"n" * 32, NOW)
    keys = [new, KEY, OTHER]

    def signer(now: datetime) -> str:
        token, _ = access.issue(keys, "u", "s", now)
        return str(jwt.get_unverified_header(token)["kid"])

    assert signer(NOW) == "a"
    assert signer(NOW + access.LEARNT) == "new"
    keys = [new]
    assert signer(NOW) == "new"


async def test_signing_keys_rotate_and_what_they_signed_outlives_them(desk: Desk):
    now = datetime.now(UTC)
    assert not await upkeep(desk.db, now)
    tokens = await desk.log_in()
    assert await upkeep(desk.db, now + ROTATED)
    assert not await upkeep(desk.db, now)
    assert await desk.value("SELECT count(*) FROM signing_keys") == 2
    assert await desk.claims(tokens)
    assert await upkeep(desk.db, now + KEPT)
    assert await desk.claims(tokens) is None
    assert await desk.claims(await desk.log_in())


async def test_deleting_all_signing_keys_ends_every_access_token(desk: Desk):
    before = await desk.log_in()
    await desk.execute("DELETE FROM signing_keys")
    after = await desk.refresh(before.refresh_token)
    assert await desk.claims(before) is None
    assert await desk.claims(after)


async def test_what_is_over_is_deleted(desk: Desk):
    tokens = [await desk.log_in() for _ in range(3)]
    await refused(desk.log_in(password=WRONG))
    await desk.log_out(tokens[0].refresh_token)
    ids = [(await _claims(desk, one)).session_id for one in tokens]
    passed = "UPDATE sessions SET {} = NOW() - INTERVAL '2 hours' WHERE session_id = $1"
    await desk.execute(passed.format("ended_at"), ids[0])
    await desk.execute(passed.format("expires_at"), ids[1])
    await desk.execute(
        "UPDATE login_failures SET forgotten_at = NOW() - INTERVAL '1 s'"
    )
    assert await upkeep(desk.db, datetime.now(UTC))  # the second has expired: told
    left = await fetch(
        desk.dsn, "SELECT session_id::text, ended_at IS NULL FROM sessions"
    )
    assert sorted(left) == sorted([(ids[1], False), (ids[2], True)])
    assert await desk.value("SELECT count(*) FROM login_failures") == 0


# --- Who am I -----------------------------------------------------------------------


async def test_who_is_known_learns_as_whom_and_what_that_permits(desk: Desk):
    metadata = (("as", "ann"), ("bound", "s"))
    known = await desk.auth.WhoAmI(pb.WhoAmIRequest(), metadata=metadata)
    assert (known.username, known.role, known.strategy_id) == ("ann", "viewer", "s")
    permitted = [(p.resource, p.action) for p in known.permissions]
    assert permitted == [
        ("portfolio", "read"), ("signals", "read"), ("strategies", "read")
    ]  # fmt: skip


async def test_who_is_not_is_told_so(desk: Desk):
    assert await refused(desk.auth.WhoAmI(pb.WhoAmIRequest())) == UNKNOWN
    change = pb.GrantPermissionRequest(
        permission=pb.RolePermission(role="viewer", resource="*", action="*")
    )
    assert await refused(desk.call(change, by="")) == UNKNOWN


# --- What is left of it -------------------------------------------------------------


async def test_logins_and_failures_are_in_the_audit_log(desk: Desk):
    tokens = await desk.log_in()
    await refused(desk.log_in(password=WRONG))
    await refused(desk.log_in("hunter2-typed-as-name", WRONG))
    await desk.log_out(tokens.refresh_token)
    log = [(action, name, new) for action, _, name, _, new in await entries(desk.dsn)]
    assert [entry[:2] for entry in log] == [
        ("login", "ann"),
        ("login_failed", "ann"),
        ("login_failed", ""),
        ("logout", "ann"),
    ]
    assert log[1][2] == {"known": True, "locked_s": 0}
    users = "SELECT count(user_id), count(ip_address) FROM audit_logs"
    assert await fetch(desk.dsn, users) == [(2, 4)]


async def test_nothing_secret_is_in_the_database(desk: Desk):
    tokens = await desk.log_in()
    again = await desk.refresh(tokens.refresh_token)
    await refused(desk.log_in(password=WRONG))
    await refused(desk.log_in("hunter2-typed-as-name", WRONG))
    await desk.log_out(again.refresh_token)
    dump = str(
        [
            await fetch(desk.dsn, f"SELECT row_to_json(t)::text FROM {table} AS t")
            for table in ("users", "sessions", "login_failures", "audit_logs")
        ]
    )
    held = urlsafe_b64decode(tokens.refresh_token)[25:57]
    secrets = [PASSWORD, WRONG, "hunter2", held.hex(), again.access_token]
    assert [secret for secret in secrets if secret in dump] == []


async def _claims(desk: Desk, tokens: pb.Tokens) -> access.Claims:
    claims = await desk.claims(tokens)
    assert claims
    return claims


async def _longer(desk: Desk) -> None:
    """Have what is locked be so for long, lest a slow test outlast it."""
    await desk.execute(
        "UPDATE login_failures SET locked_until = NOW() + INTERVAL '10 minutes'"
        " WHERE locked_until IS NOT NULL"
    )


async def _seconds_pass(desk: Desk, seconds: int) -> None:
    await desk.execute(
        "UPDATE sessions SET refreshed_at = refreshed_at - $1::interval",
        timedelta(seconds=seconds),
    )


def _retry_s(error: grpc.aio.AioRpcError) -> float:
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return float(info.retry_delay.ToTimedelta().total_seconds())
