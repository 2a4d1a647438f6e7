"""Commands of strategies."""

from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import (
    JsonOption,
    RowsOption,
    TargetOption,
    entries_of,
    struct_of,
)
from quantplane.cli.running import hinting, run, say
from quantplane.cli.showing import show, show_pages, watch

if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Struct, Value

    from quantplane import v1 as pb
    from quantplane.client import Client

SEE_ALL = "see `quantplane strategies list`"

IdArgument = Annotated[str, typer.Argument(metavar="ID")]
SymbolsOption = Annotated[
    list[str] | None,
    typer.Option("--symbol", metavar="S", help="All it trades; may be repeated."),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        metavar="KEY=VALUE",
        help="JSON, or text where it is none; may be repeated.",
    ),
]
ParametersOption = Annotated[
    typer.FileText | None,
    typer.Option(
        "--parameters-file",
        encoding="utf-8",
        help="A JSON object of all parameters; - is stdin.",
    ),
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="KEY=VALUE",
        help="max_position=100, max_order_quantity, max_order_notional, "
        "max_open_orders or allowed_symbols='[\"SPY\"]'; may be repeated.",
    ),
]


def list_strategies(
    kind: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="T", help="Only of it; may be repeated."),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="Only with it; may be repeated."),
    ] = None,
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List strategies, in order of their ids."""
    from quantplane import v1 as pb
    from quantplane.tables import print_strategies

    request = pb.ListStrategiesRequest(types=kind, statuses=status)

    async def work(client: "Client") -> None:
        method = client.strategy.ListStrategies
        await show_pages(
            method, request, "strategies", print_strategies, limit, as_json
        )

    run(target, work)


def show_strategy(
    strategy_id: IdArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Show all there is to know of a strategy."""

    async def work(client: "Client") -> None:
        _show(await _get(client, strategy_id), as_json)

    run(target, work)


def create(
    strategy_id: IdArgument,
    name: Annotated[str, typer.Option(help="For people.")],
    kind: Annotated[
        str, typer.Option("--type", metavar="T", help="Its kind: momentum, ...")
    ],
    status: Annotated[
        str, typer.Option(help="What it does now.", show_default="stopped")
    ] = "",
    symbol: SymbolsOption = None,
    parameter: ParameterOption = None,
    parameters_file: ParametersOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Create a strategy.

    The same again changes nothing.
    """
    from google.protobuf.struct_pb2 import Struct

    from quantplane import v1 as pb

    parameters = _read(parameters_file) or Struct()
    _edit(parameters, entries_of(parameter, "--parameter"))
    limits = Struct()
    _edit(limits, entries_of(limit, "--limit"))
    strategy = pb.Strategy(
        strategy_id=strategy_id,
        name=name,
        type=kind,
        status=status,
        symbols=symbol,
        parameters=parameters,
        risk_limits=limits,
    )
    request = pb.CreateStrategyRequest(strategy=strategy)
    known = f"`quantplane strategies show {quote(strategy_id)}` has what is there"

    async def work(client: "Client") -> None:
        with hinting(IDEMPOTENCY_KEY_REUSED=known):
            response = await client.strategy.CreateStrategy(request)
        _show(response.strategy, as_json)

    run(target, work)


def update(
    strategy_id: IdArgument,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="T", help="Its kind: momentum, ...")
    ] = None,
    status: Annotated[str | None, typer.Option(help="What it does now.")] = None,
    symbol: SymbolsOption = None,
    parameter: ParameterOption = None,
    parameters_file: ParametersOption = None,
    limit: LimitOption = None,
    etag: Annotated[
        str,
        typer.Option(
            help="As `show` tells it: change nothing if it is another by now.",
            show_default="whatever it is",
        ),
    ] = "",
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Change what is given of a strategy; all else stays as it is.

    So do parameters and limits under other keys; KEY= removes one. --symbol ''
    leaves it without symbols.
    """
    from quantplane import v1 as pb

    symbols = None if symbol is None else [each for each in symbol if each]
    fields: dict[str, Any] = {
        "name": name,
        "type": kind,
        "status": status,
        "symbols": symbols,
        "parameters": _read(parameters_file),
    }
    given = {field: value for field, value in fields.items() if value is not None}
    edits = {
        "parameters": entries_of(parameter, "--parameter"),
        "risk_limits": entries_of(limit, "--limit"),
    }
    edits = {field: entries for field, entries in edits.items() if entries}
    if not given and not edits:
        raise typer.BadParameter(
            "use --name, --type, --status, --symbol, --parameter, --parameters-file "
            "or --limit"
        )
    strategy = pb.Strategy(strategy_id=strategy_id, etag=etag, **given)
    request = pb.UpdateStrategyRequest(strategy=strategy)
    request.update_mask.paths.extend(sorted(given | edits))

    async def work(client: "Client") -> None:
        if not edits.keys() <= given.keys():
            await _complete(client, request.strategy, edits.keys() - given.keys())
        for field, entries in edits.items():
            _edit(getattr(request.strategy, field), entries)
        with hinting(ETAG_MISMATCH=_changes(strategy_id), UNKNOWN_STRATEGY=SEE_ALL):
            response = await client.strategy.UpdateStrategy(request)
        _show(response.strategy, as_json)

    run(target, work)


def delete(strategy_id: IdArgument, target: TargetOption = None) -> None:
    """Delete a strategy, and its limits with it.

    Its signals, orders and positions stay.
    """
    from quantplane import v1 as pb

    request = pb.DeleteStrategyRequest(strategy_id=strategy_id)

    async def work(client: "Client") -> None:
        await client.strategy.DeleteStrategy(request)
        say(f"there is no strategy {strategy_id} any more, and no limits of it")

    run(target, work)


def watch_strategies(
    strategy_id: Annotated[list[str], typer.Argument(metavar="ID...")],
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Print the strategies, then what changes of them, one a line.

    With --json each line is a WatchStrategiesResponse of one strategy, or of the id
    of one that is not there. Ctrl-C ends it.
    """
    from quantplane import v1 as pb
    from quantplane.tables import StrategyLines, message_json

    request = pb.WatchStrategiesRequest(strategy_ids=strategy_id)

    def changes(response: pb.WatchStrategiesResponse) -> list[Any]:
        kind = pb.WatchStrategiesResponse
        there = (kind(strategies=[each]) for each in response.strategies)
        return [*there, *(kind(deleted_ids=[each]) for each in response.deleted_ids)]

    async def work(client: "Client") -> None:
        stream = client.follow(client.strategy.WatchStrategies, request)
        line = message_json if as_json else StrategyLines()
        await watch(
            stream, changes, line, no_data=f"there is no such strategy; {SEE_ALL}"
        )

    run(target, work)


# --- working ------------------------------------------------------------------


def _read(file: "typer.FileText | None") -> "Struct | None":
    return None if file is None else struct_of(file, "--parameters-file")


def _edit(struct: "Struct", entries: "dict[str, Value | None]") -> None:
    """Set the entries, and remove those without a value."""
    for key, value in entries.items():
        if value is None:
            struct.fields.pop(key, None)
        else:
            struct.fields[key].CopyFrom(value)


async def _complete(
    client: "Client", strategy: "pb.Strategy", fields: set[str]
) -> None:
    """Fill in fields as they are, and the etag: a server takes only whole ones."""
    now = await _get(client, strategy.strategy_id)
    strategy.etag = strategy.etag or now.etag
    for field in fields:
        getattr(strategy, field).CopyFrom(getattr(now, field))


async def _get(client: "Client", strategy_id: str) -> "pb.Strategy":
    from quantplane import v1 as pb

    request = pb.GetStrategyRequest(strategy_id=strategy_id)
    with hinting(UNKNOWN_STRATEGY=SEE_ALL):
        response = await client.strategy.GetStrategy(request)
    strategy: pb.Strategy = response.strategy
    return strategy


def _changes(strategy_id: str) -> str:
    name = quote(strategy_id)
    return (
        f"`quantplane strategies show {name}` has it as it is, "
        f"`quantplane audit --type strategy --id {name}` what was changed"
    )


def _show(strategy: "pb.Strategy", as_json: bool) -> None:
    from quantplane.tables import print_strategy

    show([strategy], print_strategy, as_json)
