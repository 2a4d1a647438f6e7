"""Text that is meant for a database, a log or a terminal, wherever text may stand."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.attacks.good import CHANGED
from tests.attacks.payloads import TEXTS, obeyed
from tests.attacks.walk import HOSTILE, Outcome, walk
from tests.postgres import database


@pytest.fixture(scope="module")
def outcome(
    postgres_dsn: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    async def run(folder: Path) -> Outcome:
        async with database(postgres_dsn) as dsn:
            return await walk(dsn, valkey_url, folder)

    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    yield asyncio.run(run(tmp_path_factory.mktemp("walk")))


def test_the_requests_are_good_before_they_are_altered(outcome: Outcome):
    assert {name: told for name, told in outcome.good.items() if told != "OK"} == {}


def test_every_text_is_an_argument_or_refused_and_never_a_failure(outcome: Outcome):
    failed = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "BACKEND_UNAVAILABLE")
    assert [a for a in outcome.answers if a.reason in failed] == []
    assert len(outcome.answers) > 900


def test_some_of_each_text_reach_the_database(outcome: Outcome):
    """Else the walk would say nothing of what keeps them."""
    taken = {a.text for a in outcome.answers if a.reason == "OK"}
    assert taken >= TEXTS.keys() - {"NUL"}


def test_no_table_goes_and_no_row_of_an_identity_changes(outcome: Outcome):
    before, after = outcome.tables
    assert before == after
    for table, rows in outcome.before.items():
        gone = {row for row in rows - outcome.after[table] if row[0] != CHANGED}
        assert gone == set(), table


def test_what_is_new_was_asked_for(outcome: Outcome):
    names = {row[0] for row in outcome.after["users"] - outcome.before["users"]}
    made = {name for name in names if re.fullmatch(r"u\d+", name)}
    assert names - made <= {CHANGED, HOSTILE, *TEXTS.values()}
    granted = outcome.after["permissions"] - outcome.before["permissions"]
    assert {role for role, *_ in granted} <= {*TEXTS.values()}
    assert {tuple(rest) for _, *rest in granted} <= {("orders", "read")}


def test_what_the_server_says_has_nothing_that_a_terminal_obeys(outcome: Outcome):
    assert [a for a in outcome.answers if a.told] == []


def test_each_line_of_the_log_begins_as_one_and_has_no_control_character(
    outcome: Outcome,
):
    lines = outcome.log.removesuffix("\n").split("\n")
    assert [line for line in lines if obeyed(line)] == []
    said = [json.loads(line)["message"] for line in lines]
    # What is hostile in it is text.
    assert any(r"\r\nE root: forged" in message for message in said)


def test_no_secret_is_in_the_log(outcome: Outcome):
    assert "correct horse" not in outcome.log


def test_the_commands_that_show_what_is_stored_keep_terminals_as_they_are(
    outcome: Outcome,
):
    raw = {command: obeyed(text) - {"\n"} for command, text in outcome.shown.items()}
    assert {command: found for command, found in raw.items() if found} == {}


def test_some_of_what_was_stored_was_shown(outcome: Outcome):
    """As text: else there would be nothing to keep terminals from."""
    shown = "".join(outcome.shown.values())
    assert r"\x1b]0;title\x07\x1b[2J\x9b2J" in shown
    assert r"\u202edesrever\u2028" in shown
    assert "DROP TABLE" in shown
