"""The command of the audit log."""

import io

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from quantplane import v1 as pb
from quantplane.cli import app
from quantplane.tables import differences, print_audit_logs
from tests.client.commands import cells, invoke
from tests.client.test_tables_trading import Terminal

CREATE = ("strategies", "create", "s", "--name", "Slow", "--type", "momentum")


# --- without a server ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--since", "soon"), "'soon' is not an ISO time"),
        (("--until", "999999999w"), "is beyond all calendars"),
        (("--limit", "10001"), "--limit"),
    ],
)
def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = CliRunner().invoke(app, ["audit", *arguments])
    assert failed.exit_code == 2
    assert words.lower() in " ".join(failed.output.lower().split())


# --- with a server ------------------------------------------------------------


@pytest.fixture
async def changes(call):
    """A strategy is created, started and deleted; a key is set."""
    await call(*CREATE)
    await call("strategies", "update", "s", "--status", "running")
    await call("config", "set", "desk.x", "1")
    await call("strategies", "delete", "s")


async def test_changes_are_a_table_the_latest_first(changes, call):
    head, _, *rows = await call("audit")
    assert cells(head) == ["time", "who", "from", "action", "resource", "change"]
    assert [cells(row)[1:5] for row in rows] == [
        ["test", "127.0.0.1", "delete", "strategy s"],
        ["test", "127.0.0.1", "create", "configuration desk.x"],
        ["test", "127.0.0.1", "update", "strategy s"],
        ["test", "127.0.0.1", "create", "strategy s"],
    ]


async def test_an_update_is_told_by_what_differs(changes, call):
    *_, row = await call("audit", "--action", "update")
    assert cells(row)[5:] == ["status: stopped -> running"]


async def test_what_came_is_told_with_what_it_is(changes, call):
    *_, row = await call("audit", "--action", "create", "--id", "s")
    assert cells(row)[5] == "status: stopped; name: Slow; type: momentum"


async def test_a_change_of_a_secret_is_told_without_it(call):
    for secret in ("hunter2", "hunter3"):
        await call("config", "set", "desk.password", secret)
    *_, changed, created = await call("audit")
    assert cells(changed)[3:] == [
        "update", "configuration desk.password", "value: [redacted]",
    ]  # fmt: skip
    assert cells(created)[-1] == "value: [redacted]"


async def test_entries_are_chosen_by_what_they_are(changes, call):
    expected = {
        "": ["delete", "create", "update", "create"],
        "--limit 2": ["delete", "create"],
        "--type strategy": ["delete", "update", "create"],
        "--type configuration --type order": ["create"],
        "--id s --id desk.x": ["delete", "create", "update", "create"],
        "--action update --action delete": ["delete", "update"],
        "--user test": ["delete", "create", "update", "create"],
        "--user nobody --user test --action update": ["update"],
        "--user nobody": [],
        "--since 2h": ["delete", "create", "update", "create"],
        "--since 2100-01-01": [],
        "--until 2h": [],
        "--until 2100-01-01 --type configuration": ["create"],
    }
    for options, actions in expected.items():
        entries = await call("audit", *options.split(), kind=pb.AuditLog)
        assert [entry.action for entry in entries] == actions, options


async def test_pages_are_followed_up_to_the_limit(monkeypatch, changes, server, call):
    monkeypatch.setattr("quantplane.cli.showing.PAGE", 1)
    entries = await call("audit", kind=pb.AuditLog)
    assert [entry.action for entry in entries] == [
        "delete", "create", "update", "create",
    ]  # fmt: skip
    some = await invoke(server.target, "audit", "--limit", 3)
    assert len(some.stdout.splitlines()) == 2 + 3
    assert some.stderr == (
        "more audit logs are like that: these are the latest; see --limit\n"
    )


async def test_no_entries_are_said_to_be_none(server):
    for options in ((), ("--json",)):
        none = await invoke(server.target, "audit", "--id", "nothing", *options)
        assert (none.exit_code, none.stdout) == (0, "")
        assert none.stderr == "no audit logs are like that\n"


# --- as text ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2.5}, ["a: 1 -> 2.5"]),
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
        ({"a": "5"}, {"a": 5}, ['a: "5" -> 5']),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}, ["a.b: 1 -> 3"]),
        ({}, {"a": {"b": 1}}, ['a: none -> {"b": 1}']),
        ({"a": "none"}, {}, ['a: "none" -> none']),
        ({"a": None}, {}, ["a: null -> none"]),
        ({"a": ["X", "Y"]}, {"a": ["Z", "Y"]}, ["a: +Z -X"]),
        ({"a": ["X", "Y"]}, {"a": ["Y", "X"]}, ['a: ["X", "Y"] -> ["Y", "X"]']),
        ({"a": [1]}, {"a": [2]}, ["a: [1] -> [2]"]),
        (
            {"b": 1, "a": 1},
            {"b": 2, "a": 2, "c": 0},
            ["b: 1 -> 2", "a: 1 -> 2", "c: none -> 0"],
        ),
        (60, "17:00", ["60 -> 17:00"]),
        ({"a": "x" * 99}, {"a": ""}, [f'a: {"x" * 37}... -> ""']),
    ],
)
def test_a_difference_is_short(old, new, told):
    assert differences(old, new) == told


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab5", max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner)
    ),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_there_is_a_difference_unless_the_values_are_the_same(old, new):
    same = ParseDict(old, Value()) == ParseDict(new, Value())
    assert bool(differences(old, new)) != same
    assert not differences(old, old)


def row(**fields):
    """Return the cells of an entry."""
    values = {
        name: ParseDict(fields.pop(name), Value())
        for name in ("old_value", "new_value")
        if name in fields
    }
    out = io.StringIO()
    entry = pb.AuditLog(action="update", resource_type="order", **fields, **values)
    print_audit_logs(out, [entry])
    assert "\x1b" not in out.getvalue()
    return cells(out.getvalue().splitlines()[-1])


def test_an_entry_may_have_neither_value():
    assert row(resource_id="x")[1:] == ["update", "order x"]


def test_of_many_differences_some_are_shown():
    new = {f"k{n}": n for n in range(10)}
    assert row(old_value={}, new_value=new)[-1].endswith("; k7: none -> 7; and 2 more")


def test_what_matters_is_told_first_and_nothing_twice():
    old = {"strategy_id": "s", "status": "stopped", "updated_at": "1", "name": "a"}
    new = {"strategy_id": "s", "status": "running", "updated_at": "2", "name": "b"}
    told = row(old_value=old, new_value=new)[-1]
    assert told == "status: stopped -> running; name: a -> b"


def test_a_narrow_terminal_keeps_the_time(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    entry = pb.AuditLog(
        username="u" * 36, ip_address="127.0.0.1", action="CREATED",
        resource_type="order", resource_id="o" * 36,
        new_value={"string_value": "x " * 99},
    )  # fmt: skip
    print_audit_logs(out, [entry])
    head, _, row, *_ = out.getvalue().splitlines()
    assert cells(head) == ["time", "action", "resource", "change"]
    assert row.startswith(" 1970-01-01T00:00:00.000Z ")


def test_who_did_it_is_shown_where_it_is_known():
    assert row(username="u", ip_address="::1")[1:3] == ["u", "::1"]


def test_terminal_escapes_in_an_entry_are_text():
    hostile = "\x1b[2J\n"
    told = row(
        username=hostile, ip_address=hostile, resource_id=hostile,
        old_value={hostile: hostile}, new_value={hostile: 1},
    )  # fmt: skip
    assert told[-1] == r"\x1b[2J\n: \x1b[2J\n -> 1"
