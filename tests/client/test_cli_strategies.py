"""The commands of strategies."""

import io
import json

import grpc
import pytest
from google.protobuf.json_format import MessageToDict, Parse
from typer.testing import CliRunner

from quantplane import v1 as pb
from quantplane.cli import app
from quantplane.tables import StrategyLines, print_strategies, print_strategy
from tests.client.commands import cells, interrupt, invoke, lines_of
from tests.client.test_cli import NOWHERE, running

CREATE = ("strategies", "create", "s", "--name", "Slow", "--type", "momentum")
UPDATE = ("strategies", "update", "s")


async def get(client, strategy_id="s"):
    request = pb.GetStrategyRequest(strategy_id=strategy_id)
    return (await client.strategy.GetStrategy(request)).strategy


def limits(strategy):
    return MessageToDict(strategy.risk_limits)


def parameters(strategy):
    return MessageToDict(strategy.parameters)


@pytest.fixture
async def strategy(client, call):
    """A strategy with parameters, limits and symbols."""
    (created,) = await call(
        *CREATE, "--symbol", "SPY", "--symbol", "QQQ", "--parameter", "fast=5",
        "--parameter", "mode=dry run", "--limit", "max_position=100",
        "--limit", "max_open_orders=3", kind=pb.Strategy,
    )  # fmt: skip
    return created


# --- without a server ---------------------------------------------------------


def test_help_names_the_commands_of_reference_data():
    shown = CliRunner().invoke(app, ["--help"])
    for command in ("strategies", "config", "audit"):
        assert f"  {command} " in shown.stdout


async def test_a_server_that_does_not_answer_is_told_with_its_cure():
    failed = await invoke(NOWHERE, "strategies", "watch", "s")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == (
        "quantplane: no server answers at 127.0.0.1:1; "
        "start one with `quantplane-server up`, or set --target\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("strategies", "create", "s", "--name", "n"), "--type"),
        ((*CREATE, "--parameter", "fast"), "'fast' is not KEY=VALUE"),
        ((*CREATE, "--limit", "=5"), "'=5' is not KEY=VALUE"),
        ((*CREATE, "--parameter", f"n={2**53 + 1}"), "can't be kept exactly"),
        ((*CREATE, "--parameter", f"n={'9' * 400}"), "can't be kept exactly"),
        ((*CREATE, "--parameter", "n=1e999"), "can't be kept exactly"),
        ((*CREATE, "--parameter", f"n={'[' * 5000}{']' * 5000}"), "too deeply"),
        ((*CREATE, "--parameters-file", "/nowhere.json"), "--parameters-file"),
        (UPDATE, "use --name, --type, --status, --symbol, --parameter,"),
        (("strategies", "watch"), "ID"),
    ],
)  # fmt: skip
def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 2
    assert words.lower() in " ".join(failed.output.lower().split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "no JSON object"),
        (b"fast: 5", "no JSON object"),
        (b"\xff\xfe", "no JSON object"),
        (b" " * 1_000_001, "more than 1,000,000 characters"),
    ],
    ids=["list", "text", "bytes", "size"],
)
def test_a_file_that_is_no_json_object_ends_with_code_2(content, words, tmp_path):
    file = tmp_path / "parameters.json"
    file.write_bytes(content)
    failed = CliRunner().invoke(app, [*CREATE, "--parameters-file", str(file)])
    assert failed.exit_code == 2
    assert words in " ".join(failed.output.split())


# --- with a server ------------------------------------------------------------


async def test_a_strategy_is_created_as_it_is_said(client, strategy):
    assert strategy == await get(client)
    assert (strategy.name, strategy.type) == ("Slow", "momentum")
    assert strategy.status == "stopped"
    assert list(strategy.symbols) == ["SPY", "QQQ"]
    assert parameters(strategy) == {"fast": 5, "mode": "dry run"}
    assert limits(strategy) == {"max_position": 100, "max_open_orders": 3}


async def test_a_value_is_json_or_else_text(client, call):
    values = {
        "a": "[1, 2]", "b": "true", "c": '"5"', "d": "x=y", "e": "NaN", "f": "null",
        "g": '{"h": 0.1}',
    }  # fmt: skip
    options = [f"--parameter={key}={text}" for key, text in values.items()]
    await call(*CREATE, *options)
    assert parameters(await get(client)) == {
        "a": [1, 2], "b": True, "c": "5", "d": "x=y", "e": "NaN", "f": None,
        "g": {"h": 0.1},
    }  # fmt: skip


async def test_parameters_come_from_a_file_and_single_ones_go_before_it(
    client, call, tmp_path
):
    file = tmp_path / "parameters.json"
    file.write_text(json.dumps({"fast": 5, "slow": 20}))
    await call(*CREATE, "--parameters-file", file, "--parameter", "slow=30")
    assert parameters(await get(client)) == {"fast": 5, "slow": 30}


async def test_to_create_it_again_changes_nothing(client, call):
    (first,) = await call(*CREATE, kind=pb.Strategy)
    (again,) = await call(*CREATE, kind=pb.Strategy)
    assert again == first


async def test_to_create_another_under_the_same_id_is_refused_with_a_hint(
    server, strategy
):
    failed = await invoke(server.target, *CREATE, "--status", "running")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: IDEMPOTENCY_KEY_REUSED: ")
    assert failed.stderr.endswith(
        "; `quantplane strategies show s` has what is there\n"
    )


async def test_a_refusal_names_all_that_is_wrong_in_one_line(server):
    failed = await invoke(
        server.target, "strategies", "create", " s", "--name", "", "--type", "t",
        "--limit", "max_position=-1", "--limit", "max_risk=1",
    )  # fmt: skip
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: INVALID_FIELD: ")
    for words in ("strategy_id: ", "name: ", "max_position: ", "risk_limits: "):
        assert words in failed.stderr
    assert failed.stderr.count("\n") == 1


async def test_only_what_is_given_changes(client, call, strategy):
    await call(*UPDATE, "--status", "running", "--name", "Fast")
    now = await get(client)
    assert (now.status, now.name, now.type) == ("running", "Fast", "momentum")
    assert now.parameters == strategy.parameters
    assert now.risk_limits == strategy.risk_limits
    assert now.symbols == strategy.symbols


async def test_parameters_and_limits_under_other_keys_stay(client, call, strategy):
    await call(*UPDATE, "--limit", "max_position=50", "--parameter", "slow=20")
    now = await get(client)
    assert limits(now) == {"max_position": 50, "max_open_orders": 3}
    assert parameters(now) == {"fast": 5, "mode": "dry run", "slow": 20}


async def test_a_key_without_a_value_is_removed(client, call, strategy):
    await call(*UPDATE, "--limit", "max_position=", "--limit", "max_open_orders=4")
    now = await get(client)
    assert limits(now) == {"max_open_orders": 4}
    assert now.parameters == strategy.parameters


async def test_a_file_replaces_all_parameters(client, call, strategy, tmp_path):
    file = tmp_path / "parameters.json"
    file.write_text('{"slow": 20}')
    options = ("--parameters-file", file, "--parameter", "fast=6")
    await call(*UPDATE, *options)
    now = await get(client)
    assert parameters(now) == {"slow": 20, "fast": 6}
    assert now.risk_limits == strategy.risk_limits


async def test_symbols_are_replaced_or_left_empty(client, call, strategy):
    await call(*UPDATE, "--symbol", "TSLA")
    assert list((await get(client)).symbols) == ["TSLA"]
    await call(*UPDATE, "--symbol", "")
    assert list((await get(client)).symbols) == []


async def test_an_etag_guards_against_a_change_of_another(
    client, server, call, strategy
):
    options = ("--limit", "max_position=1", "--etag", strategy.etag)
    (changed,) = await call(*UPDATE, "--status", "running", kind=pb.Strategy)
    failed = await invoke(server.target, *UPDATE, *options)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: ETAG_MISMATCH: ")
    assert failed.stderr.endswith(
        "; `quantplane strategies show s` has it as it is, "
        "`quantplane audit --type strategy --id s` what was changed\n"
    )
    assert await get(client) == changed
    await call(*UPDATE, "--limit", "max_position=1", "--etag", changed.etag)
    assert limits(await get(client))["max_position"] == 1


async def test_an_unknown_strategy_is_told_with_a_hint(server):
    for arguments in (
        ("show", "nothing"),
        ("update", "nothing", "--status", "running"),
        ("update", "nothing", "--limit", "max_position=1"),
    ):
        failed = await invoke(server.target, "strategies", *arguments)
        assert (failed.exit_code, failed.stdout) == (1, "")
        assert failed.stderr.startswith("quantplane: UNKNOWN_STRATEGY: ")
        assert failed.stderr.endswith("; see `quantplane strategies list`\n")


async def test_a_deleted_strategy_is_gone(server, call, strategy):
    for _ in range(2):
        deleted = await invoke(server.target, "strategies", "delete", "s")
        assert (deleted.exit_code, deleted.stdout) == (0, "")
        assert deleted.stderr == (
            "there is no strategy s any more, and no limits of it\n"
        )
    assert await call("strategies", "list", kind=pb.Strategy) == []


async def test_all_of_a_strategy_is_shown(call, strategy):
    shown = [line.split(maxsplit=1) for line in await call("strategies", "show", "s")]
    assert shown[:9] == [
        ["strategy", "s"],
        ["name", "Slow"],
        ["type", "momentum"],
        ["status", "stopped"],
        ["symbols", "SPY, QQQ"],
        ["limit", "max_open_orders=3"],
        ["limit", "max_position=100"],
        ["parameter", "fast=5"],
        ["parameter", "mode=dry run"],
    ]
    assert shown[-1] == ["etag", strategy.etag]


async def test_strategies_are_a_table(call, strategy):
    head, _, row = await call("strategies", "list")
    assert cells(head) == [
        "strategy", "name", "type", "status", "symbols", "limits", "updated",
    ]  # fmt: skip
    assert cells(row)[:-1] == [
        "s", "Slow", "momentum", "stopped", "SPY, QQQ",
        "max_open_orders: 3; max_position: 100",
    ]  # fmt: skip


async def test_strategies_are_listed_by_what_they_are(call):
    for name, kind, status in (
        ("a", "momentum", "running"),
        ("b", "momentum", "stopped"),
        ("c", "carry", "paused"),
    ):
        await call(
            "strategies", "create", name, "--name", name, "--type", kind,
            "--status", status,
        )  # fmt: skip
    expected = {
        "": "abc",
        "--limit 2": "ab",
        "--type momentum": "ab",
        "--status running --status paused": "ac",
        "--type carry --status running": "",
    }
    for options, ids in expected.items():
        listed = await call("strategies", "list", *options.split(), kind=pb.Strategy)
        assert "".join(each.strategy_id for each in listed) == ids, options


async def test_a_list_of_strategies_says_that_it_has_more(server, call, strategy):
    await call("strategies", "create", "t", "--name", "n", "--type", "t")
    some = await invoke(server.target, "strategies", "list", "--limit", 1)
    assert some.stderr == (
        "more strategies are like that: these are the first; see --limit\n"
    )


async def test_a_watcher_sees_the_strategies_and_then_what_changes(
    server, call, strategy
):
    async with running(server.target, "strategies", "watch", "s") as watching:
        (first,) = await lines_of(watching, 1)
        assert first.split()[1:4] == ["s", "momentum", "stopped"]
        assert "risk_limits.max_position: 100" in first
        await call(*UPDATE, "--status", "running", "--limit", "max_position=50")
        (change,) = await lines_of(watching, 1)
        assert cells(change)[-1] == (
            "status: stopped -> running; risk_limits.max_position: 100 -> 50"
        )
        await call("strategies", "delete", "s")
        (gone,) = await lines_of(watching, 1)
        assert cells(gone) == ["-", "s", "not there"]
        assert await interrupt(watching) == ("", "")


async def test_every_json_line_of_a_watch_of_strategies_is_of_one(server, strategy):
    arguments = ("strategies", "watch", "s", "nothing", "--json")
    async with running(server.target, *arguments) as watching:
        lines = await lines_of(watching, 2)
    told = [Parse(line, pb.WatchStrategiesResponse()) for line in lines]
    assert sorted(told, key=lambda each: len(each.strategies)) == [
        pb.WatchStrategiesResponse(deleted_ids=["nothing"]),
        pb.WatchStrategiesResponse(strategies=[strategy]),
    ]


class ScriptedStrategies(pb.StrategyServiceServicer, pb.MarketDataServiceServicer):
    """Has one strategy, which it does not change; keeps the requests to do so."""

    def __init__(self):
        self.updates = []

    async def ListSymbols(self, request, context):
        return pb.ListSymbolsResponse()

    async def GetStrategy(self, request, context):
        strategy = pb.Strategy(etag="read", risk_limits={"max_position": 100})
        return pb.GetStrategyResponse(strategy=strategy)

    async def UpdateStrategy(self, request, context):
        self.updates.append(request)
        return pb.UpdateStrategyResponse(strategy=request.strategy)


async def test_what_is_read_to_be_changed_is_guarded_by_its_etag():
    server, service = grpc.aio.server(), ScriptedStrategies()
    pb.add_StrategyServiceServicer_to_server(service, server)
    pb.add_MarketDataServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    limit = ("--limit", "max_open_orders=3")
    for options in (limit, (*limit, "--etag", "mine"), ("--status", "running")):
        done = await invoke(f"127.0.0.1:{port}", *UPDATE, *options)
        assert done.exit_code == 0
    await server.stop(None)
    assert [update.strategy.etag for update in service.updates] == ["read", "mine", ""]
    assert [list(update.update_mask.paths) for update in service.updates] == [
        ["risk_limits"], ["risk_limits"], ["status"],
    ]  # fmt: skip


# --- as text ------------------------------------------------------------------

HOSTILE = "\x1b[2J\n"


@pytest.mark.parametrize("printing", [print_strategies, print_strategy])
def test_terminal_escapes_in_a_strategy_are_text(printing):
    strategy = pb.Strategy(
        strategy_id=HOSTILE, name=HOSTILE, type=HOSTILE, status=HOSTILE,
        symbols=[HOSTILE], created_by=HOSTILE, etag=HOSTILE,
        parameters={HOSTILE: HOSTILE}, risk_limits={HOSTILE: [HOSTILE]},
    )  # fmt: skip
    out = io.StringIO()
    printing(out, [strategy])
    assert "\x1b" not in out.getvalue()
    assert r"\x1b[2J\n" in out.getvalue()


def test_terminal_escapes_in_a_change_are_text():
    lines = StrategyLines()
    for value in ("a", HOSTILE):
        strategy = pb.Strategy(strategy_id=HOSTILE, parameters={HOSTILE: value})
        line = lines(pb.WatchStrategiesResponse(strategies=[strategy]))
    assert line.isprintable()
    assert r": a -> \x1b[2J\n" in line


def test_of_a_strategy_that_comes_back_all_is_told():
    lines = StrategyLines()
    there = pb.WatchStrategiesResponse(strategies=[pb.Strategy(strategy_id="s")])
    first = lines(there)
    lines(pb.WatchStrategiesResponse(deleted_ids=["s"]))
    assert lines(there) == first
