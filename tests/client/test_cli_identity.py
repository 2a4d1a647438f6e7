"""The commands of users, keys, permissions and logins."""

import json
import stat

import pytest

from quantplane import state
from quantplane import v1 as pb
from tests.client.commands import invoke
from tests.client.known import serving

PASSWORD = "correct horse battery"
CREATE = ("users", "create", "alice", "--email", "alice@example.com")


@pytest.fixture
def as_nobody(monkeypatch, tmp_path):
    """Commands know only who has logged in."""
    monkeypatch.delenv("QUANTPLANE_API_KEY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


async def with_input(target, text, *arguments):
    """Run a command that reads a password."""
    return await invoke(target, *arguments, stdin=text)


@pytest.fixture
async def alice(server):
    """A user who may log in."""
    command = (*CREATE, "--role", "trader", "--password-stdin")
    done = await with_input(server.target, f"{PASSWORD}\n", *command)
    assert done.exit_code == 0, done.stderr


# --- users --------------------------------------------------------------------


async def test_a_user_is_created_changed_and_listed(call):
    (made,) = await call(*CREATE, kind=pb.User)
    assert (made.username, made.role, made.is_active) == ("alice", "viewer", True)
    (changed,) = await call(
        "users", "update", "alice", "--role", "trader", kind=pb.User
    )
    assert changed.role == "trader"
    (off,) = await call("users", "disable", "alice", kind=pb.User)
    assert not off.is_active
    (on,) = await call("users", "enable", "alice", kind=pb.User)
    assert on.is_active
    (shown,) = await call("users", "show", "alice", kind=pb.User)
    assert shown == on
    names = [user.username for user in await call("users", "list", kind=pb.User)]
    assert names == ["alice", "test"]


async def test_a_user_who_is_not_there_is_told_with_a_cure(server):
    failed = await invoke(server.target, "users", "show", "nobody")
    assert failed.exit_code == 1
    assert "UNKNOWN_USER" in failed.stderr
    assert "see `quantplane users list`" in failed.stderr


async def test_the_last_admin_stays(server):
    failed = await invoke(server.target, "users", "disable", "test")
    assert failed.exit_code == 1
    assert "LAST_ADMIN" in failed.stderr


# --- keys ---------------------------------------------------------------------


async def test_the_secret_of_a_new_key_is_alone_on_stdout(server, monkeypatch):
    made = await invoke(server.target, "keys", "create", "feed", "--role", "viewer")
    assert made.exit_code == 0, made.stderr
    (secret,) = made.stdout.splitlines()
    assert secret.startswith("qp_")
    assert secret not in made.stderr
    monkeypatch.setenv("QUANTPLANE_API_KEY", secret)
    whoami = await invoke(server.target, "whoami", "--json")
    known = json.loads(whoami.stdout)
    assert (known["username"], known["role"]) == ("test", "viewer")


async def test_a_key_is_listed_and_revoked(call):
    (made,) = await call(
        "keys", "create", "bound", "--strategy", "s", "--role", "strategy",
        "--expires", "90d", kind=pb.CreateApiKeyResponse,
    )  # fmt: skip
    key = made.key
    assert key.strategy_id == "s"
    assert key.expires_at.seconds - key.created_at.seconds >= 89 * 86_400
    (revoked,) = await call("keys", "revoke", key.key_id, kind=pb.ApiKey)
    assert revoked.HasField("revoked_at")
    _, _, *rows = await call("keys", "list", "--user", "test")
    assert any("bound" in row and "revoked" in row for row in rows)


# --- permissions --------------------------------------------------------------


async def test_a_permission_is_granted_listed_and_revoked(call):
    await call("permissions", "grant", "viewer", "orders", "read")
    rows = await call("permissions", "list", "--role", "viewer", kind=pb.RolePermission)
    assert pb.RolePermission(role="viewer", resource="orders", action="read") in rows
    await call("permissions", "revoke", "viewer", "orders", "read")
    rows = await call("permissions", "list", "--role", "viewer", kind=pb.RolePermission)
    assert [row.resource for row in rows] == ["portfolio", "signals", "strategies"]


# --- logins -------------------------------------------------------------------


async def log_in(server, password=PASSWORD):
    command = ("login", "alice", "--password-stdin")
    return await with_input(server.target, f"{password}\n", *command)


async def test_after_a_login_commands_are_the_user_s(
    server, alice, as_nobody, tmp_path
):
    done = await log_in(server)
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    (file,) = (tmp_path / "quantplane").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert PASSWORD not in file.read_text()
    whoami = await invoke(server.target, "whoami", "--json")
    known = json.loads(whoami.stdout)
    assert (known["username"], known["role"]) == ("alice", "trader")


async def test_after_the_logout_they_are_nobody_s(server, alice, as_nobody, tmp_path):
    await log_in(server)
    done = await invoke(server.target, "logout")
    assert done.exit_code == 0, done.stderr
    assert not list((tmp_path / "quantplane").iterdir())
    failed = await invoke(server.target, "whoami")
    assert failed.exit_code == 1
    assert "`quantplane login`, or set QUANTPLANE_API_KEY" in failed.stderr


async def test_a_key_that_is_no_good_is_told_to_be_so(server, monkeypatch):
    monkeypatch.setenv("QUANTPLANE_API_KEY", "qp_unknown")
    failed = await invoke(server.target, "whoami")
    assert failed.exit_code == 1
    assert "the key in QUANTPLANE_API_KEY is not, or no longer, good" in failed.stderr
    assert "qp_unknown" not in failed.stderr


async def test_a_wrong_password_keeps_nothing(server, alice, as_nobody, tmp_path):
    failed = await log_in(server, "wrong " + PASSWORD)
    assert failed.exit_code == 1
    assert failed.stderr == "quantplane: UNAUTHENTICATED: wrong name or password\n"
    assert not (tmp_path / "quantplane").exists()


async def test_without_a_login_there_is_no_logout(server, as_nobody):
    failed = await invoke(server.target, "logout")
    assert failed.stderr == f"quantplane: nobody is logged in at {server.target}\n"


async def test_a_password_is_not_sent_in_plaintext_beyond_loopback(as_nobody):
    failed = await with_input("10.0.0.7:50051", "x\n", "login", "a", "--password-stdin")
    assert failed.exit_code == 2
    assert "10.0.0.7:50051 is beyond loopback" in failed.stderr


async def test_without_a_terminal_the_password_comes_from_stdin_if_so_told(as_nobody):
    failed = await invoke("127.0.0.1:1", "login", "alice")
    assert failed.exit_code == 2
    assert "--password-stdin" in failed.stderr


async def test_a_login_that_others_could_read_is_refused(server, alice, as_nobody):
    await log_in(server)
    (file,) = state.folder().iterdir()
    file.chmod(0o644)
    failed = await invoke(server.target, "whoami")
    assert failed.exit_code == 2
    assert f"others may read or write {file}: remove it" in failed.stderr


async def test_an_access_token_about_to_expire_is_exchanged_and_kept(as_nobody):
    from quantplane.cli.login import keep, kept

    async with serving() as door:
        tokens = door.tokens()
        tokens.access_expires_at.seconds -= 800
        keep(door.target, tokens)
        done = await invoke(door.target, "symbols")
        assert done.exit_code == 0, done.stderr
        assert kept(door.target).refresh_token == "r1"
    assert door.refreshed == ["r0"]


async def test_what_another_command_has_exchanged_is_taken_over(as_nobody):
    from quantplane import Client
    from quantplane.cli.login import keep, resume

    async with serving() as door, Client(door.target) as client:
        keep(door.target, door.tokens())
        await resume(client)
        other = door.tokens()
        other.access_token, other.refresh_token = "a7", "r7"
        keep(door.target, other)
        await client._session.renew()
        assert client._session.token() == "a7"
    assert door.refreshed == []


async def test_a_login_that_has_ended_is_told(as_nobody):
    from quantplane.cli.login import keep

    async with serving() as door:
        tokens = door.tokens()
        tokens.refresh_token = "gone"
        tokens.access_expires_at.seconds -= 800
        keep(door.target, tokens)
        failed = await invoke(door.target, "symbols")
    assert failed.exit_code == 1
    assert "has ended: `quantplane login` again" in failed.stderr
