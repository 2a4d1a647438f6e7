"""Signals as text."""

from collections.abc import Sequence
from typing import IO

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.tables.rows import print_rows
from quantplane.tables.text import brief, milliseconds, number, printable, word


def print_signals(out: IO[str], signals: Sequence[pb.Signal]) -> None:
    dispensable = ("expires", "target", "stop loss", "confidence", "time", "strategy")
    print_rows(out, [_row(signal) for signal in signals], dispensable)


def _row(signal: pb.Signal) -> dict[str, str]:
    expires = signal.HasField("expiration")
    return {
        "time": milliseconds(signal.time),
        "signal": signal.signal_id,
        "strategy": signal.strategy_id,
        "symbol": signal.symbol,
        "type": word(pb.SignalType, signal.signal_type),
        "strength": number(signal.strength),
        "confidence": number(signal.confidence),
        "target": number(signal.target_price)
        if signal.HasField("target_price")
        else "",
        "stop loss": number(signal.stop_loss) if signal.HasField("stop_loss") else "",
        "expires": milliseconds(signal.expiration) if expires else "",
        "status": word(pb.SignalStatus, signal.status),
    }


def signal_line(event: pb.SignalEvent) -> str:
    """Return the event as a line; one without a type tells that the signal is active.

    An active one has the time at which it was made.
    """
    signal = event.signal
    told = word(pb.SignalEventType, event.type) if event.type else "active"
    time: Timestamp = event.time if event.type else signal.time
    return (
        f"{milliseconds(time)}  {printable(signal.signal_id)}  "
        f"{printable(signal.strategy_id):<12} {printable(signal.symbol):<10} "
        f"{word(pb.SignalType, signal.signal_type):<10} {told:<9}  "
        f"{_details(signal)}"
    ).rstrip()


def signal_words(signal: pb.Signal) -> str:
    """Return the signal as the head of what came of it."""
    return (
        f"signal {printable(signal.signal_id)}  {milliseconds(signal.time)}  "
        f"{printable(signal.strategy_id)}  "
        f"{word(pb.SignalType, signal.signal_type)} {printable(signal.symbol)}  "
        f"{word(pb.SignalStatus, signal.status)}  {_details(signal)}"
    )


def _details(signal: pb.Signal) -> str:
    details = [
        f"strength {number(signal.strength)}",
        f"confidence {number(signal.confidence)}",
    ]
    if signal.HasField("target_price"):
        details.append(f"target {number(signal.target_price)}")
    if signal.HasField("stop_loss"):
        details.append(f"stop loss {number(signal.stop_loss)}")
    if signal.HasField("expiration"):
        details.append(f"expires {brief(signal.expiration)}")
    return ", ".join(details)
