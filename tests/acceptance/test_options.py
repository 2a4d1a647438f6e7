"""A real option chain of 5,470 contracts, imported and read back in every way."""

import csv
import gzip
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg
import grpc
import pytest

from quantplane import Client, frames, reason_of
from quantplane import v1 as pb
from quantplane.batches import publish_batches
from tests.acceptance import DATA, needs_data, quantplane, stamp
from tests.conftest import Server, both_editions

pytestmark = needs_data
CHAIN = DATA / "options-tsla-20221024.csv.gz"
UNDERLYING = "TSLA"
COUNT = 5_470
CLOSE = datetime(2022, 10, 24, 20, tzinfo=UTC)
LATER = CLOSE + timedelta(hours=1)
TICK = timedelta(microseconds=1)
PRICE = 211.25  # of the share, at the close
VALUES = (
    "bid", "ask", "last_price", "volume", "open_interest", "implied_vol",
    "delta", "gamma", "theta", "vega", "rho",
)  # fmt: skip


class Contract(NamedTuple):
    expiration: str
    strike: float
    type: str
    values: tuple[float | None, ...]  # None is unknown

    @property
    def delta(self) -> float | None:
        return self.values[VALUES.index("delta")]

    @property
    def moneyness(self) -> float:
        return self.strike / PRICE


def listed() -> list[Contract]:
    """Return the file's contracts, in the order of a chain."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    columns = ("bid", "ask", "last_price", "volume", "open_interest", "imp_vol")
    with gzip.open(CHAIN, "rt", encoding="utf-8-sig") as file:
        return sorted(
            Contract(
                row["expire_date"],
                float(row["strike"]),
                {"CALLS": "call", "PUTS": "put"}[row["option_type"]],
                (*(number(row[column]) for column in columns), *[None] * 5),
            )
            for row in csv.DictReader(file)
        )


def read(chain: pb.OptionChain) -> list[Contract]:
    return [
        Contract(
            quote.expiration,
            quote.strike,
            {pb.OPTION_TYPE_CALL: "call", pb.OPTION_TYPE_PUT: "put"}[quote.option_type],
            tuple(_value(quote, name) for name in VALUES),
        )
        for quote in chain.contracts
    ]


def _value(quote: pb.OptionQuote, name: Any) -> float | None:
    return getattr(quote, name) if quote.HasField(name) else None


def with_deltas(contracts: list[Contract]) -> list[Contract]:
    """Add the deltas of Black and Scholes, where the volatility says any."""
    return [
        each._replace(values=(*each.values[:6], black_scholes_delta(each), *[None] * 4))
        for each in contracts
    ]


def black_scholes_delta(contract: Contract) -> float | None:
    vol, rate = contract.values[VALUES.index("implied_vol")], 0.04
    years = (date.fromisoformat(contract.expiration) - CLOSE.date()).days / 365
    if not vol:
        return None
    drift = math.log(PRICE / contract.strike) + (rate + vol**2 / 2) * years
    call = (1 + math.erf(drift / (vol * math.sqrt(years)) / math.sqrt(2))) / 2
    return call if contract.type == "call" else call - 1


async def import_chain(server: Server) -> str:
    return await quantplane(
        *("import", "options", CHAIN),
        *("--underlying", UNDERLYING, "--time", "2022-10-24T20:00"),
        *("--columns", "expiration=expire_date,implied_vol=imp_vol"),
        target=server.target,
    )


async def publish(client: Client, contracts: list[Contract], time: datetime) -> None:
    chain = pb.OptionChain(underlying=UNDERLYING, time=stamp(time))
    for expiration, strike, kind, values in contracts:
        chain.contracts.add(
            expiration=expiration,
            strike=strike,
            option_type=pb.OptionType.Value(f"OPTION_TYPE_{kind.upper()}"),
            **{
                name: int(value) if name in ("volume", "open_interest") else value
                for name, value in zip(VALUES, values, strict=True)
                if value is not None
            },
        )
    requests = [pb.PublishOptionChainRequest(chain=chain)]
    async for stored in publish_batches(client.options.PublishOptionChain, requests):
        assert len(stored.chain.contracts) == len(contracts)


async def get(
    client: Client, as_of: datetime | None = None, **wanted: Any
) -> pb.OptionChain:
    request = pb.GetOptionChainRequest(
        underlying=UNDERLYING,
        as_of=stamp(as_of) if as_of else None,
        filter=pb.OptionFilter(**wanted),
    )
    response = await client.options.GetOptionChain(request)
    return response.chain


@both_editions
async def test_an_imported_chain_comes_back_as_the_file_has_it(
    server: Server, client: Client
):
    told = await import_chain(server)
    assert told == "5,470 contracts read, 5,470 stored in 1 chain, 0 refused\n"
    chain = await get(client)
    assert len(chain.contracts) == COUNT
    assert read(chain) == listed()
    assert (chain.underlying, chain.time) == (UNDERLYING, stamp(CLOSE))
    assert not chain.partial


def test_the_file_has_unknown_values_beside_zeros():
    for name in ("bid", "ask", "open_interest"):
        column = [each.values[VALUES.index(name)] for each in listed()]
        assert None in column and 0 in column


@both_editions
async def test_an_import_done_again_changes_nothing(server: Server, client: Client):
    await import_chain(server)
    rows, chain = await recorded(server), await get(client)
    assert len(rows) == COUNT
    assert "5,470 stored in 1 chain" in await import_chain(server)
    assert await recorded(server) == rows
    assert await get(client) == chain


async def recorded(server: Server) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(server.settings.postgres_dsn)
    try:
        query = "SELECT * FROM options_chains ORDER BY expiration, strike, option_type"
        return list(await connection.fetch(query))
    finally:
        await connection.close()


Admits = Callable[[Contract], bool]
FILTERS: list[tuple[dict[str, Any], Admits]] = [
    ({"min_expiration": "2023-01-20"}, lambda c: c.expiration >= "2023-01-20"),
    ({"max_expiration": "2023-01-19"}, lambda c: c.expiration <= "2023-01-19"),
    (
        {"min_expiration": "2022-11-18", "max_expiration": "2022-11-18"},
        lambda c: c.expiration == "2022-11-18",
    ),
    ({"min_strike": 212.5}, lambda c: c.strike >= 212.5),
    ({"max_strike": 212.5}, lambda c: c.strike <= 212.5),
    ({"min_strike": 200, "max_strike": 220}, lambda c: 200 <= c.strike <= 220),
    ({"option_type": pb.OPTION_TYPE_CALL}, lambda c: c.type == "call"),
    ({"option_type": pb.OPTION_TYPE_PUT}, lambda c: c.type == "put"),
    (
        {"moneyness": pb.Moneyness(underlying_price=PRICE, min=0.9, max=1.1)},
        lambda c: 0.9 <= c.moneyness <= 1.1,
    ),
    (
        # The bound is a contract's, to the last bit.
        {"moneyness": pb.Moneyness(underlying_price=PRICE, max=212.5 / PRICE)},
        lambda c: c.strike <= 212.5,
    ),
    (
        {"moneyness": pb.Moneyness(underlying_price=PRICE, min=212.5 / PRICE)},
        lambda c: c.strike >= 212.5,
    ),
    (
        {
            "min_expiration": "2022-11-01",
            "max_expiration": "2023-03-17",
            "min_strike": 150,
            "option_type": pb.OPTION_TYPE_PUT,
            "moneyness": pb.Moneyness(underlying_price=PRICE, max=1.2),
        },
        lambda c: (
            "2022-11-01" <= c.expiration <= "2023-03-17"
            and c.strike >= 150
            and c.moneyness <= 1.2
            and c.type == "put"
        ),
    ),
    ({"min_strike": 10_000}, lambda c: False),
    # No contract of the file has a delta.
    ({"min_delta": -1}, lambda c: False),
]


@both_editions
async def test_a_filter_admits_what_plain_python_admits(server: Server, client: Client):
    await import_chain(server)
    contracts = listed()
    for wanted, admits in FILTERS:
        chain = await get(client, **wanted)
        assert read(chain) == list(filter(admits, contracts)), wanted
        assert chain.time == stamp(CLOSE)


@both_editions
async def test_deltas_are_filtered_and_an_unknown_one_never_admitted(
    server: Server, client: Client
):
    await import_chain(server)
    contracts = with_deltas(listed())
    await publish(client, contracts, LATER)
    known = [each.delta for each in contracts if each.delta is not None]
    assert 0 < COUNT - len(known) < COUNT / 10
    low, high = sorted(known)[1_000], sorted(known)[4_000]  # contracts on the bounds
    for wanted, admits in [
        ({"min_delta": low, "max_delta": high}, lambda delta: low <= delta <= high),
        ({"min_delta": high}, lambda delta: delta >= high),
        ({"max_delta": low}, lambda delta: delta <= low),
        ({"min_delta": -1, "max_delta": 1}, lambda delta: True),
    ]:
        expected = [c for c in contracts if c.delta is not None and admits(c.delta)]
        assert 0 < len(expected) < COUNT
        assert read(await get(client, **wanted)) == expected


@both_editions
async def test_a_chain_is_that_of_the_time_it_is_asked_for(
    server: Server, client: Client
):
    await import_chain(server)
    first = listed()
    # Later there are deltas, and every tenth contract is listed no more.
    second = [each for n, each in enumerate(with_deltas(first)) if n % 10]
    await publish(client, second, LATER)
    for as_of, time, contracts in [
        (CLOSE, CLOSE, first),
        (CLOSE + timedelta(minutes=30), CLOSE, first),
        (LATER - TICK, CLOSE, first),
        (LATER, LATER, second),
        (LATER + timedelta(hours=3), LATER, second),
        (None, LATER, second),
    ]:
        chain = await get(client, as_of)
        assert chain.time == stamp(time), as_of
        assert read(chain) == contracts, as_of
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await get(client, CLOSE - TICK)
    assert reason_of(raised.value) == "UNKNOWN_SYMBOL"


@both_editions
async def test_the_expirations_are_those_of_the_file(server: Server, client: Client):
    await import_chain(server)
    contracts = listed()
    request = pb.ListExpirationsRequest(underlying=UNDERLYING)
    response = await client.options.ListExpirations(request)
    assert response.time == stamp(CLOSE)
    assert list(response.expirations) == [
        pb.Expiration(
            date=expiration,
            calls=sum(each.type == "call" for each in expiring),
            puts=sum(each.type == "put" for each in expiring),
            min_strike=min(each.strike for each in expiring),
            max_strike=max(each.strike for each in expiring),
        )
        for expiration in sorted({each.expiration for each in contracts})
        if (expiring := [each for each in contracts if each.expiration == expiration])
    ]


async def test_an_imported_chain_comes_back_as_a_pandas_frame(
    server: Server, client: Client
):
    await import_chain(server)
    frame = frames.chains_to_pandas([await get(client)])
    contracts = listed()
    assert len(frame) == COUNT
    assert (frame["time"] == CLOSE).all()
    assert list(frame["strike"]) == [each.strike for each in contracts]
    assert list(frame["option_type"]) == [each.type for each in contracts]
    assert [f"{day:%Y-%m-%d}" for day in frame["expiration"]] == [
        each.expiration for each in contracts
    ]
    for place, name in enumerate(VALUES):
        expected = [each.values[place] for each in contracts]
        known = frame[name].notna()
        assert list(known) == [value is not None for value in expected]
        assert list(frame[name][known]) == [v for v in expected if v is not None]
