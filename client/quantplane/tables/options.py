"""Option chains as text."""

import json
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import groupby
from operator import itemgetter
from typing import IO, Any

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import v1 as pb
from quantplane.files import CONTRACT_VALUES
from quantplane.tables.rows import add_row, print_table, room_of, table_of
from quantplane.tables.text import brief, microseconds, printable

# Underlying and the fields of a contract; None where unknown.
ContractRow = dict[str, Any]

TYPES = {pb.OPTION_TYPE_CALL: "call", pb.OPTION_TYPE_PUT: "put"}
# What a chain shows of a contract.
SHOWN = {
    "bid": "bid",
    "ask": "ask",
    "last": "last_price",
    "volume": "volume",
    "OI": "open_interest",
    "IV": "implied_vol",
}
# What it leaves out, one after another, until it fits a terminal.
DISPENSABLE = ("last", "volume", "OI")
CELL = 9  # characters


def contract_rows(chain: pb.OptionChain) -> Iterator[ContractRow]:
    for contract in chain.contracts:
        row: ContractRow = {
            "underlying": chain.underlying,
            "time": contract.time if contract.HasField("time") else chain.time,
            "expiration": contract.expiration,
            "strike": contract.strike,
            "option_type": TYPES[contract.option_type],
        }
        name: Any  # HasField takes literals only
        for name in CONTRACT_VALUES:
            known = contract.HasField(name)
            row[name] = getattr(contract, name) if known else None
        yield row


def contract_json(row: ContractRow, gone: bool = False) -> str:
    """Return the contract as a line of JSON, its numbers bit for bit."""
    fields = {**row, "time": microseconds(row["time"])}
    return json.dumps({**fields, "gone": True} if gone else fields, ensure_ascii=False)


def contract_line(row: ContractRow, gone: bool = False) -> str:
    cells = _contract_cells(row, SHOWN)
    values = "".join(f"{cell or '-':>10}" for cell in cells)
    return (
        f"{brief(row['time']):<27}  {printable(row['underlying']):<8} "
        f"{row['expiration']} {_number(row['strike']):>9} {row['option_type']:<4}"
        f"{'      gone' if gone else values}"
    )


def print_chain(out: IO[str], chain: pb.OptionChain) -> None:
    """Print a table for each expiration: calls, the strike, puts."""
    names = list(SHOWN)
    room = room_of(out)
    for name in DISPENSABLE:
        if (2 * len(names) + 1) * CELL <= room:
            break
        names.remove(name)
    head = _chain_line([*names, "strike", *names])
    out.write(f"{printable(chain.underlying)} as of {brief(chain.time)}\n")
    for expiration, rows in groupby(contract_rows(chain), itemgetter("expiration")):
        days = _days(chain.time, expiration)
        title = f"calls  |  {expiration}, {days} days  |  puts"
        centred = title.center(len(head)).rstrip()
        out.write(f"\n{centred}\n{head}\n{'-' * len(head)}\n")
        for strike, pair in groupby(rows, itemgetter("strike")):
            sides = {row["option_type"]: row for row in pair}
            call, put = (
                _contract_cells(sides.get(side, {}), names) for side in ("call", "put")
            )
            out.write(_chain_line([*call, _number(strike), *put]).rstrip() + "\n")


def _chain_line(cells: Iterable[str]) -> str:
    return "".join(f" {cell:>{CELL - 1}}" for cell in cells)


def _contract_cells(row: ContractRow, columns: Iterable[str]) -> list[str]:
    values = {name: row.get(SHOWN[name]) for name in columns}
    return [
        "" if value is None else f"{value:.1%}" if name == "IV" else _number(value)
        for name, value in values.items()
    ]


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _days(time: Timestamp, expiration: str) -> int:
    return (date.fromisoformat(expiration) - time.ToDatetime().date()).days


def print_expirations(out: IO[str], response: pb.ListExpirationsResponse) -> None:
    table = table_of(
        ("expiration", "days", "calls", "puts", "lowest", "highest strike")
    )
    for expiration in response.expirations:
        add_row(
            table,
            expiration.date,
            str(_days(response.time, expiration.date)),
            str(expiration.calls),
            str(expiration.puts),
            _number(expiration.min_strike),
            _number(expiration.max_strike),
        )
    print_table(out, table)


def expiration_json(expiration: pb.Expiration) -> str:
    names = ("calls", "puts", "min_strike", "max_strike")
    values = {name: getattr(expiration, name) for name in names}
    return json.dumps({"expiration": expiration.date, **values})
