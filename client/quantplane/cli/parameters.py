"""What the command line says: the parameters that commands share, and their values."""

import re
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Struct, Value
    from google.protobuf.timestamp_pb2 import Timestamp

INTERVALS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
MAX_JSON = 1_000_000  # characters of a file; a server takes less
LENGTH = re.compile("([0-9]{1,9})([smhdw])")

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        envvar="QUANTPLANE_TARGET",
        metavar="HOST:PORT",
        help="The server.",
        show_default="127.0.0.1:50051",
    ),
]
FileArgument = Annotated[
    Path, typer.Argument(help="A CSV (also .csv.gz) or Parquet file.")
]
SymbolOption = Annotated[str, typer.Option("--symbol", help="What the rows are of.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="Which column is which field, by its name or (time=0,bid=1) by its number "
        "from 0; with numbers alone, a CSV file has no header line.",
        show_default="the columns named as the fields",
    ),
]
TimeFormatOption = Annotated[
    str,
    typer.Option(
        "--time-format",
        metavar="FORMAT",
        help="iso; s, ms, us or ns since 1970; or as of strptime: '%Y%m%d %H%M%S%f'.",
    ),
]
ZoneOption = Annotated[
    str,
    typer.Option(
        "--tz",
        metavar="ZONE",
        help="Of times that carry none: America/New_York, -05:00, ...",
    ),
]
DelimiterOption = Annotated[
    str, typer.Option("--delimiter", help="One character, or tab.")
]
StartOption = Annotated[
    str | None,
    typer.Option("--start", metavar="TIME", help="ISO; UTC unless it says else."),
]
UnderlyingArgument = Annotated[str, typer.Argument(help="Whose options.")]
AsOfOption = Annotated[
    str | None,
    typer.Option(
        "--as-of",
        metavar="TIME",
        help="ISO; UTC unless it says else.",
        show_default="the latest",
    ),
]
EndOption = Annotated[
    str | None, typer.Option("--end", metavar="TIME", help="Exclusive; as --start.")
]
StrategyFilter = Annotated[
    list[str] | None,
    typer.Option("--strategy", metavar="S", help="Only of it; may be repeated."),
]
SymbolFilter = Annotated[
    list[str] | None,
    typer.Option("--symbol", metavar="S", help="Only of it; may be repeated."),
]
RowsOption = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most.")
]
OrderArgument = Annotated[
    str,
    typer.Argument(metavar="ORDER", help="An order id, or STRATEGY/CLIENT_ORDER_ID."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="A JSON object a line.")]


def time_of(text: str | None, option: str) -> "Timestamp | None":
    from google.protobuf.timestamp_pb2 import Timestamp

    from quantplane.files import parse_time

    if text is None:
        return None
    time = Timestamp()
    try:
        time.FromNanoseconds(parse_time(text))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not an ISO time like 2024-01-31T14:30", param_hint=option
        ) from None
    return time


def interval_s(text: str) -> int:
    match = LENGTH.fullmatch(text)
    if not match:
        raise typer.BadParameter(
            f"{text!r} is not a length like 30s, 5m, 1h or 1d", param_hint="--interval"
        )
    return int(match[1]) * INTERVALS_S[match[2]]


def date_of(text: str | None, option: str) -> str:
    """Return YYYY-MM-DD, or "" for None."""
    try:
        return "" if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a date like 2024-01-31", param_hint=option
        ) from None


def bounds_of(text: str | None, option: str) -> tuple[float | None, float | None]:
    """Return the bounds of MIN:MAX, either of which may be left out."""
    if text is None:
        return None, None
    try:
        low, high = (float(bound) if bound else None for bound in text.split(":"))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a range like 200:300, 200: or :300", param_hint=option
        ) from None
    return low, high


def moment_of(text: str | None, option: str, ago: bool = False) -> "Timestamp | None":
    """Return an ISO time, or of 5m the time in so long, or so long ago."""
    from google.protobuf.timestamp_pb2 import Timestamp

    if text is None or not LENGTH.fullmatch(text):
        return time_of(text, option)
    time = Timestamp()
    time.GetCurrentTime()
    try:
        length_s = interval_s(text)
        time.FromSeconds(time.seconds + (-length_s if ago else length_s))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is beyond all calendars", param_hint=option
        ) from None
    return time


def enum_of(kind: Any, text: str, parameter: str) -> Any:
    """Return the value of an enum that people call so."""
    from quantplane.tables import words

    values = words(kind)
    if text not in values:
        raise typer.BadParameter(
            f"{text!r} is not one of {', '.join(values)}", param_hint=parameter
        )
    return values[text]


def order_of(text: str) -> dict[str, Any]:
    """Return how requests name an order: the fields of their oneof `id`."""
    from quantplane import v1 as pb

    strategy, slash, name = text.partition("/")
    if slash:
        key = pb.ClientOrderId(strategy_id=strategy, client_order_id=name)
        return {"client_order_id": key}
    return {"order_id": id_of(text, "ORDER", "an order id or STRATEGY/CLIENT_ORDER_ID")}


def value_of(text: str, parameter: str) -> "Value":
    """Return JSON, or text where it is none."""
    from google.protobuf.json_format import Error, MessageToDict, ParseDict
    from google.protobuf.struct_pb2 import Value

    from quantplane.tables import parse_value

    value = Value()
    try:
        parsed = parse_value(text)
        ParseDict(parsed, value)
        exact = MessageToDict(value) == parsed
    except (Error, ValueError, OverflowError, RecursionError):
        exact = False
    if not exact:
        raise typer.BadParameter(
            "a number in it can't be kept exactly, or it is nested too deeply",
            param_hint=parameter,
        )
    return value


def entries_of(texts: list[str] | None, option: str) -> "dict[str, Value | None]":
    """Return the values of KEY=VALUE; None of KEY=, which is to be removed."""
    entries = {}
    for text in texts or []:
        key, given, value = text.partition("=")
        if not (key and given):
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        entries[key] = value_of(value, option) if value else None
    return entries


def struct_of(file: IO[str], option: str) -> "Struct":
    """Return the JSON object that a file holds."""
    try:
        text = file.read(MAX_JSON + 1)
    except ValueError:
        text = ""  # not UTF-8
    if len(text) > MAX_JSON:
        raise typer.BadParameter(
            f"the file has more than {MAX_JSON:,} characters", param_hint=option
        )
    value = value_of(text, option)
    if not value.HasField("struct_value"):
        raise typer.BadParameter("the file is no JSON object", param_hint=option)
    return value.struct_value


def id_of(text: str, parameter: str, what: str) -> str:
    """Return a UUID as the server writes it."""
    try:
        return str(UUID(text))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not {what}", param_hint=parameter
        ) from None
