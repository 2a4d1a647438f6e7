"""The commands of configurations."""

import io
import json

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from quantplane import v1 as pb
from quantplane.cli import app
from quantplane.tables import (
    parse_value,
    print_configuration,
    print_configurations,
    value_text,
)
from tests.client.commands import cells, invoke

OWN = ["orders.session_end", "portfolio.initial_cash", "portfolio.snapshot_interval_s"]


async def get(client, key):
    request = pb.GetConfigurationRequest(key=key)
    return (await client.configuration.GetConfiguration(request)).configuration


async def value(client, key):
    return MessageToDict((await get(client, key)).value)


# --- without a server ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("config", "set", "desk.name"), "VALUE"),
        (("config", "set", "desk.name", "a", "--value-stdin"), "VALUE"),
        (("config", "set", "desk.name", str(2**53 + 1)), "can't be kept exactly"),
        (("config", "get"), "KEY"),
        (("config", "list", "--limit", "0"), "--limit"),
    ],
)
def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 2
    assert words.lower() in " ".join(failed.output.lower().split())


# --- with a server ------------------------------------------------------------


async def test_a_value_is_json_or_else_text(client, call):
    expected = [
        (["60"], 60),
        (["--", "-5.5"], -5.5),
        (["true"], True),
        (["null"], None),
        (['{"a": [1]}'], {"a": [1]}),
        (['"60"'], "60"),
        (["17:00 America/New_York"], "17:00 America/New_York"),
        (["17:00", "America/New_York"], "17:00 America/New_York"),
        (["NaN"], "NaN"),
        (["True"], "True"),
        ([""], ""),
    ]
    for words, told in expected:
        await call("config", "set", "desk.x", *words)
        assert await value(client, "desk.x") == told, words


async def test_a_secret_value_need_not_be_an_argument(client, server):
    asked = ("config", "set", "desk.password", "--value-stdin")
    assert (await invoke(server.target, *asked, stdin="s3 cret\n")).exit_code == 0
    assert await value(client, "desk.password") == "s3 cret"


async def test_the_end_of_the_session_is_set_as_people_say_it(client, call):
    await call("config", "set", "orders.session_end", "17:00 America/New_York")
    assert await value(client, "orders.session_end") == "17:00 America/New_York"


async def test_a_value_that_a_server_cant_use_is_refused_in_one_line(client, server):
    failed = await invoke(
        server.target, "config", "set", "orders.session_end", "five o'clock"
    )
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: INVALID_FIELD: ")
    assert failed.stderr.count("\n") == 1
    assert await value(client, "orders.session_end") is None


async def test_what_is_set_is_set_again(client, call):
    (first,) = await call("config", "set", "desk.x", "1", kind=pb.Configuration)
    (second,) = await call("config", "set", "desk.x", "2", kind=pb.Configuration)
    assert (first.value.number_value, second.value.number_value) == (1, 2)
    assert second == await get(client, "desk.x")


async def test_a_description_stays_until_another_is_given(client, call):
    await call("config", "set", "desk.x", "1", "--description", "an x")
    await call("config", "set", "desk.x", "2")
    assert (await get(client, "desk.x")).description == "an x"
    await call("config", "set", "desk.x", "2", "--description", "")
    assert (await get(client, "desk.x")).description == ""


async def test_a_deleted_configuration_is_gone(client, server, call):
    await call("config", "set", "desk.x", "1")
    deleted = await invoke(server.target, "config", "delete", "desk.x")
    assert (deleted.exit_code, deleted.stdout) == (0, "")
    assert deleted.stderr == "desk.x is not set any more\n"
    assert await call("config", "list", "desk.", kind=pb.Configuration) == []


async def test_an_unknown_key_is_told_with_a_hint(server):
    failed = await invoke(server.target, "config", "get", "desk.x")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: UNKNOWN_CONFIGURATION: ")
    assert failed.stderr.endswith("; see `quantplane config list`\n")


async def test_all_of_a_configuration_is_shown(call):
    options = ("--description", "when the day ends")
    await call("config", "set", "orders.session_end", "17:00", *options)
    shown = [
        line.split(maxsplit=1)
        for line in await call("config", "get", "orders.session_end")
    ]
    assert shown[:3] == [
        ["key", "orders.session_end"],
        ["value", "17:00"],
        ["description", "when the day ends"],
    ]
    assert [label for label, _ in shown[3:]] == ["set", "read", "etag"]


async def test_what_is_not_set_is_shown_with_its_default(call):
    shown = "\n".join(await call("config", "get", "portfolio.snapshot_interval_s"))
    assert "value        60\n" in shown
    assert "set          no, the default\n" in shown


async def test_configurations_are_a_table_with_those_of_the_servers(call):
    await call("config", "set", "desk.x", "[1, 2]", "--description", "an x")
    head, _, *rows = await call("config", "list")
    assert cells(head)[:3] == ["key", "setting", "set"]
    assert cells(rows[0])[:2] == ["desk.x", "[1, 2]"]
    keys = {cells(row)[0] for row in rows}
    assert keys >= {"desk.x", *OWN}


async def test_configurations_are_listed_by_prefix(server, call):
    for key in ("desk.a", "desk.b", "other"):
        await call("config", "set", key, "1")
    listed = await call("config", "list", "desk.", kind=pb.Configuration)
    assert [each.key for each in listed] == ["desk.a", "desk.b"]
    none = await invoke(server.target, "config", "list", "nothing")
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "no configurations are like that\n"


# --- as text ------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)  # fmt: skip


@given(JSON | st.sampled_from(["", "none", "null", "5", '"5"', "NaN", "[", "{}"]))
def test_what_is_shown_is_what_would_set_it(wanted):
    read = parse_value(value_text(wanted))
    assert json.dumps(read) == json.dumps(wanted)


def test_text_that_begins_like_deep_json_is_shown():
    text = "[" * 65_000
    assert value_text(text) == f'"{text}"'


@pytest.mark.parametrize("printing", [print_configurations, print_configuration])
def test_terminal_escapes_in_a_configuration_are_text(printing):
    hostile = "\x1b[2J\n"
    configuration = pb.Configuration(
        key=hostile, value={"string_value": hostile}, description=hostile,
        updated_by=hostile, etag=hostile,
    )  # fmt: skip
    out = io.StringIO()
    printing(out, [configuration])
    assert "\x1b" not in out.getvalue()
    assert r"\x1b[2J\n" in out.getvalue()
