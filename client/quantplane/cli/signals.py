"""Commands of signals."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import (
    EndOption,
    JsonOption,
    RowsOption,
    StartOption,
    StrategyFilter,
    SymbolFilter,
    TargetOption,
    enum_of,
    id_of,
    moment_of,
    time_of,
)
from quantplane.cli.running import run, say
from quantplane.cli.showing import show, show_page, watch

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client

TYPES = "long|short|exit-long|exit-short"

TypeFilter = Annotated[
    list[str] | None,
    typer.Option("--type", metavar=TYPES, help="Only these; may be repeated."),
]
StrengthFilter = Annotated[
    float, typer.Option("--min-strength", help="Only those of this or more, 0 to 1.")
]


def publish(
    symbol: Annotated[str, typer.Argument(help="What to trade.")],
    signal_type: Annotated[str, typer.Argument(metavar=TYPES)],
    strategy: Annotated[str, typer.Option(help="Whose signal it is.")],
    strength: Annotated[float, typer.Option(help="0 to 1.")] = 1.0,
    confidence: Annotated[float, typer.Option(help="0 to 1.")] = 1.0,
    target_price: Annotated[
        float | None, typer.Option(metavar="P", help="Where it should go.")
    ] = None,
    stop_loss: Annotated[
        float | None, typer.Option(metavar="P", help="Where to give up.")
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="In 30s, 5m, 1h, 1d, ...; or an ISO time, in UTC."
        ),
    ] = None,
    signal_id: Annotated[
        str | None, typer.Option("--id", metavar="UUID", show_default="a new one")
    ] = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Publish a signal."""
    from quantplane import v1 as pb
    from quantplane.ids import new_id

    signal = pb.Signal(
        signal_id=id_of(signal_id, "--id", "a UUID") if signal_id else new_id(),
        strategy_id=strategy,
        symbol=symbol,
        signal_type=enum_of(pb.SignalType, signal_type, "TYPE"),
        strength=strength,
        confidence=confidence,
        target_price=target_price,
        stop_loss=stop_loss,
        expiration=moment_of(expires, "--expires"),
    )
    signal.time.GetCurrentTime()
    run(target, lambda client: _publish(client, signal, as_json))


def cancel(
    signal_id: Annotated[str, typer.Argument(metavar="ID")],
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Cancel an active signal."""
    from quantplane import v1 as pb
    from quantplane.tables import print_signals

    request = pb.CancelSignalRequest(signal_id=id_of(signal_id, "ID", "a UUID"))

    async def work(client: "Client") -> None:
        response = await client.signal.CancelSignal(request)
        show([response.signal], print_signals, as_json)

    run(target, work)


def list_signals(
    strategy: StrategyFilter = None,
    symbol: SymbolFilter = None,
    signal_type: TypeFilter = None,
    min_strength: StrengthFilter = 0.0,
    status: Annotated[
        list[str] | None,
        typer.Option(
            metavar="active|executed|expired|cancelled",
            help="Only these; may be repeated.",
        ),
    ] = None,
    start: StartOption = None,
    end: EndOption = None,
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List signals, the latest first."""
    from quantplane import v1 as pb
    from quantplane.tables import print_signals

    request = pb.ListSignalsRequest(
        filter=_filter(strategy, symbol, signal_type, min_strength),
        statuses=[enum_of(pb.SignalStatus, text, "--status") for text in status or []],
        start_time=time_of(start, "--start"),
        end_time=time_of(end, "--end"),
        page_size=limit,
    )

    async def work(client: "Client") -> None:
        page = await client.signal.ListSignals(request)
        show_page(page, "signals", print_signals, as_json)

    run(target, work)


def watch_signals(
    strategy: StrategyFilter = None,
    symbol: SymbolFilter = None,
    signal_type: TypeFilter = None,
    min_strength: StrengthFilter = 0.0,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Print the active signals, then every event of signals as it comes, one a line.

    With --json each line is a SignalEvent; an active signal's has only the signal.
    Ctrl-C ends it.
    """
    from quantplane import v1 as pb
    from quantplane.tables import message_json, signal_line

    request = pb.WatchSignalsRequest(
        filter=_filter(strategy, symbol, signal_type, min_strength)
    )

    def events(response: pb.WatchSignalsResponse) -> list[Any]:
        active = (pb.SignalEvent(signal=signal) for signal in response.signals)
        return [*active, *response.events]

    async def work(client: "Client") -> None:
        stream = client.follow(client.signal.WatchSignals, request)
        await watch(stream, events, message_json if as_json else signal_line)

    run(target, work)


# --- working ------------------------------------------------------------------


def _filter(
    strategies: list[str] | None,
    symbols: list[str] | None,
    types: list[str] | None,
    min_strength: float,
) -> "pb.SignalFilter":
    from quantplane import v1 as pb

    return pb.SignalFilter(
        strategy_ids=strategies,
        symbols=symbols,
        signal_types=[enum_of(pb.SignalType, text, "--type") for text in types or []],
        min_strength=min_strength,
    )


async def _publish(client: "Client", signal: "pb.Signal", as_json: bool) -> None:
    import grpc

    from quantplane import v1 as pb
    from quantplane.errors import is_transient
    from quantplane.tables import print_signals

    request = pb.PublishSignalsRequest(signals=[signal])
    try:
        response = await client.signal.PublishSignals(request)
    except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) or is_transient(error):
            say(f"it may have been published, as signal {signal.signal_id}")
        raise
    show(response.signals, print_signals, as_json)
