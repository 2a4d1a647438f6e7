"""Option chains."""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from quantplane import v1 as pb
from quantplane.files.cells import (
    date_parser,
    int32,
    not_negative,
    option_type,
    positive,
    price,
    time_parser,
)
from quantplane.files.report import FileProblem, Report, shown
from quantplane.files.rows import Path, check_symbol, read_rows
from quantplane.files.table import Columns, Kind, Layout, Parse, Values
from quantplane.files.times import EPOCH, Clock, clock_of, zone_of

CONTRACT_KEY = ("expiration", "strike", "option_type")
CONTRACT_VALUES = tuple(
    "bid ask last_price volume open_interest implied_vol "
    "delta gamma theta vega rho".split()
)
CHAIN_CONTRACTS = 20_000  # the contract's limit
MOST_TIMES = 1_000_000  # of whole chains in a file: some 100 MB

Time = dict[str, int]  # the fields of a Timestamp


def read_chains(
    path: Path,
    underlying: str,
    columns: Columns | None = None,
    *,
    time: str | None = None,
    time_format: str = "iso",
    expiration_format: str = "iso",
    tz: str = "UTC",
    delimiter: str = ",",
    partial: bool = False,
    report: Report | None = None,
) -> Iterator[pb.OptionChain]:
    """Yield the file's rows as chains of at most 20,000 contracts, one for each time.

    `time`, in ISO, is that of the whole file; without it a column has the times.
    `expiration_format` is `iso`, or a pattern of strptime for dates. A field that
    `columns` leaves out is the column named as the field; all else is as for
    `read_quotes`.

    Chains come in the order of the file. Rows of one time need not stand together;
    but of those that lie some 20,000 rows apart, the later ones become a partial chain
    of the same time.

    Raises FileProblem as `read_quotes` does, and at a chain of more than 20,000
    contracts; where `partial`, that one comes in parts.
    """
    check_symbol(underlying, "underlying")
    report = report or Report()
    given = None if time is None else _parsed(time, tz)
    kind = Kind(
        (*(() if given else ("time",)), *CONTRACT_KEY, *CONTRACT_VALUES),
        lambda fields: _lacking(fields, given),
        _parsers(date_parser(expiration_format, "--expiration-format")),
        lambda fields: _completer(given),
        finds_others=True,
    )
    layout = Layout(columns, time_format, tz, delimiter)
    rows = read_rows(kind, path, layout, report)
    yield from _gathered(rows, underlying, partial, report)


def _parsed(time: str, tz: str) -> Time:
    try:
        parsed = time_parser(clock_of("iso", zone_of(tz)))(time)
    except ValueError as error:
        raise FileProblem(f"--time {shown(time)} {error}") from None
    if parsed is None:
        raise FileProblem("--time is empty")
    return parsed


def _lacking(fields: set[str], given: Time | None) -> str:
    for name in CONTRACT_KEY:
        if name not in fields:
            return name
    if not given and "time" not in fields:
        return "time, and --time does not say it"
    return "" if fields & set(CONTRACT_VALUES) else "bid, ask or any other value"


def _parsers(date: Parse) -> Callable[[str, Clock], Parse]:
    parsers: dict[str, Parse] = {
        "expiration": date,
        "strike": positive,
        "option_type": option_type,
        "volume": int32,
        "open_interest": int32,
        "implied_vol": not_negative,
    }
    return lambda name, clock: (
        time_parser(clock) if name == "time" else parsers.get(name, price)
    )


def _completer(given: Time | None) -> Callable[[Values], None]:
    def complete(values: Values) -> None:
        if given:
            values["time"] = given
        for name in ("time", *CONTRACT_KEY):
            if values.get(name) is None:
                raise ValueError(f"{name} is missing")
        day = EPOCH + timedelta(seconds=values["time"]["seconds"])
        if values["expiration"] < f"{day:%Y-%m-%d}":
            raise ValueError(
                f"expiration {values['expiration']} lies before its chain of "
                f"{day:%Y-%m-%d}"
            )

    return complete


class _Chain:
    def __init__(self, underlying: str, time: Time, partial: bool) -> None:
        self.message = pb.OptionChain(underlying=underlying, partial=partial)
        self.message.time.seconds, self.message.time.nanos = time.values()
        self.lines: dict[Any, int] = {}  # of its contracts

    def add(self, contract: Any, line: int, values: Values) -> None:
        self.message.contracts.add(**values)
        self.lines[contract] = line


def _gathered(
    rows: Iterable[tuple[int, Values]], underlying: str, partial: bool, report: Report
) -> Iterator[pb.OptionChain]:
    chains: dict[int, _Chain] = {}  # by time, in the order of the file
    begun: set[int] = set()  # the times of those that were handed out
    held = 0  # contracts
    for line, values in rows:
        time: Time = values.pop("time")
        time_us = time["seconds"] * 1_000_000 + time["nanos"] // 1_000  # as stored
        contract = tuple(values[name] for name in CONTRACT_KEY)
        chain = chains.get(time_us)
        if chain and contract in chain.lines:
            before = f"{report.unit} {chain.lines[contract]}"
            report.refuse(line, f"has the contract and the time of {before}")
            continue
        if held == CHAIN_CONTRACTS:
            first_us = next(iter(chains))
            first = chains.pop(first_us)
            if first is chain:
                if len(first.lines) == CHAIN_CONTRACTS and not partial:
                    raise _too_large(first.message)
                chain = None
            if not partial:
                begun.add(first_us)
                _check_times(begun)
            held -= len(first.lines)
            yield first.message
        if chain is None:
            # A whole chain would take the place of the one handed out.
            is_rest = partial or time_us in begun
            chain = chains[time_us] = _Chain(underlying, time, is_rest)
        chain.add(contract, line, values)
        held += 1
    for chain in chains.values():
        yield chain.message


def _check_times(times: set[int]) -> None:
    if len(times) > MOST_TIMES:
        raise FileProblem(
            f"the file has whole chains of more than {MOST_TIMES:,} times: split it, "
            "or if its rows are changes of a chain, import them with --partial"
        )


def _too_large(chain: pb.OptionChain) -> FileProblem:
    return FileProblem(
        f"the chain of {chain.time.ToJsonString()} has more than "
        f"{CHAIN_CONTRACTS:,} contracts: if the rows are of several times, name the "
        "column that has them (--columns time=COLUMN) in place of --time; "
        "otherwise store it in parts with --partial"
    )
