"""The commands of option chains."""

import asyncio
import io
import json
import signal

import pytest
from typer.testing import CliRunner

from quantplane import Client
from quantplane import v1 as pb
from quantplane.batches import publish_batches
from quantplane.cli import app
from quantplane.cli.options import Watched
from quantplane.tables import print_chain
from tests.client.test_cli import NOWHERE, file, run, running, symbol
from tests.client.test_files import DATA, real_data

__all__ = ["file", "symbol"]  # fixtures

CALL, PUT = pb.OPTION_TYPE_CALL, pb.OPTION_TYPE_PUT
TSLA = DATA / "options-tsla-20221024.csv.gz"
HEADER = "time,expiration,strike,option_type,bid"
TIME = {"seconds": 1_709_308_800}  # 2024-03-01T16:00Z


def quote(strike, option_type=CALL, expiration="2024-03-15", **fields):
    return pb.OptionQuote(
        strike=strike, option_type=option_type, expiration=expiration, **fields
    )


CONTRACTS = [
    quote(95, CALL, bid=6.5, ask=0, last_price=6.45, volume=1200, implied_vol=0.3125),
    quote(95, PUT, bid=1.25, open_interest=31, delta=-0.2),
    quote(97.5, PUT, ask=2.5, delta=-0.4),
    quote(100, CALL, "2024-06-21", delta=0.5),
]


async def publish(server, symbol, *contracts, partial=False, second=0):
    time = {"seconds": TIME["seconds"] + second}
    chain = pb.OptionChain(
        underlying=symbol, time=time, contracts=contracts, partial=partial
    )
    requests = [pb.PublishOptionChainRequest(chain=chain)]
    async with Client(server.target) as client:
        async for _ in publish_batches(client.options.PublishOptionChain, requests):
            pass


@pytest.fixture
async def published(server, symbol):
    await publish(server, symbol, *CONTRACTS)


def found(output):
    """Return strike and type of the contracts that were printed as JSON."""
    rows = map(json.loads, output.lines)
    return [(row["strike"], row["option_type"]) for row in rows]


async def listed(server, symbol, *options):
    shown = await run(server.target, "chain", symbol, "--json", *options)
    assert (shown.code, shown.err) == (0, "")
    return found(shown)


# --- without a server ---------------------------------------------------------


async def test_help_names_the_commands_of_options():
    shown = await run(NOWHERE, "--help")
    for command in ("chain", "expirations"):
        assert f"  {command} " in shown.out


@pytest.mark.parametrize("command", ["chain", "expirations"])
async def test_a_server_that_does_not_answer_is_told_with_its_cure(command):
    failed = await run(NOWHERE, command, "TSLA")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("quantplane: no server answers at 127.0.0.1:1; start")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "options", __file__), "--underlying"),
        (("import", "options", "no.csv", "--underlying", "A"), "No such file"),
        (("import", "options", __file__, "--underlying", "A", "--time", "x"), "--time"),
        (("chain",), "underlying"),
        (("chain", "A", "--as-of", "soon"), "'soon' is not an ISO time"),
        (("chain", "A", "--as-of", "2024-01-01", "--watch"), "use one of --watch and"),
        (("chain", "A", "--expiration", "soon"), "'soon' is not a date"),
        (("chain", "A", "--min-expiration", "1/2/24"), "'1/2/24' is not a date"),
        (("chain", "A", "--expiration", "2024-01-19", "--max-expiration", "2024-01-19"),
         "use --expiration, or --min-expiration and --max-expiration"),
        (("chain", "A", "--strike", "100"), "'100' is not a range like 200:300"),
        (("chain", "A", "--strike", "a:b"), "'a:b' is not a range"),
        (("chain", "A", "--delta", "1:2:3"), "'1:2:3' is not a range"),
        (("chain", "A", "--type", "straddle"), "'straddle' is neither call nor put"),
        (("chain", "A", "--moneyness", "0.9:1.1"), "--moneyness and --price together"),
        (("chain", "A", "--price", "100"), "--moneyness and --price together"),
        (("expirations", "A", "--as-of", "soon"), "'soon' is not an ISO time"),
    ],
)  # fmt: skip
def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 2
    assert words.lower() in " ".join(failed.output.lower().split())


# --- importing ----------------------------------------------------------------


@real_data
async def test_a_real_chain_is_imported_and_shown(server, symbol):
    stored = await run(
        server.target, "import", "options", TSLA, "--underlying", symbol,
        "--time", "2022-10-24T20:00",
        "--columns", "expiration=expire_date,implied_vol=imp_vol",
    )  # fmt: skip
    assert stored.out == "5,470 contracts read, 5,470 stored in 1 chain, 0 refused\n"
    assert (stored.code, stored.err) == (0, "")
    shown = await run(
        server.target, "chain", symbol, "--expiration", "2022-10-28",
        "--strike", "210:212.5",
    )  # fmt: skip
    assert shown.lines[0] == f"{symbol} as of 2022-10-24T20:00:00Z"
    assert [line.split() for line in shown.lines[2:]] == [
        ["calls", "|", "2022-10-28,", "4", "days", "|", "puts"],
        [*"bid ask last volume OI IV strike bid ask last volume OI IV".split()],
        ["-" * 117],
        [*"9.6 9.75 9.68 41196 13858 66.7% 210 5 5.05 5.05 26460 9164 64.7%".split()],
        [*"8.1 8.3 8.1 18800 2386 65.8% 212.5 6 6.1 6.02 10479 2581 63.9%".split()],
    ]


async def test_refused_contracts_are_listed_and_the_chain_said_to_lack_them(
    server, symbol, file
):
    path = file(
        f"{HEADER}\n2024-03-01,2024-03-15,95,c,1\n2024-03-01,2024-02-28,95,c,1\n"
        "2024-03-01,2024-03-15,95,p,x\n2024-03-02,2024-03-15,95,put,0\n"
    )
    stored = await run(server.target, "import", "options", path, "--underlying", symbol)
    assert stored.code == 1
    assert stored.out == "4 contracts read, 2 stored in 2 chains, 2 refused\n"
    assert stored.err == (
        "line 3: expiration 2024-02-28 lies before its chain of 2024-03-01\n"
        "line 4: bid 'x' is not a number\n"
        "the chains lack the refused contracts: correct these lines, and import the "
        "file again\n"
    )
    assert await listed(server, symbol) == [(95, "put")]
    assert await listed(server, symbol, "--as-of", "2024-03-01") == [(95, "call")]


async def test_a_partial_file_leaves_the_other_contracts(
    server, symbol, published, file
):
    path = file(f"{HEADER}\n2024-03-02,2024-03-15,90,c,1\n")
    await run(
        server.target, "import", "options", path, "--underlying", symbol, "--partial"
    )
    assert len(await listed(server, symbol)) == 5
    await run(server.target, "import", "options", path, "--underlying", symbol)
    assert await listed(server, symbol) == [(90, "call")]


async def test_rows_of_one_time_that_lie_far_apart_are_one_chain_again(
    server, symbol, file
):
    rows = [f"2024-03-01,2024-03-15,{strike},c,1\n" for strike in range(1, 20_002)]
    other = "2024-03-02,2024-03-15,1,c,1\n"
    path = file(f"{HEADER}\n" + "".join([*rows[:10_000], other, *rows[10_000:20_000]]))
    stored = await run(server.target, "import", "options", path, "--underlying", symbol)
    assert stored.out.startswith("20,001 contracts read, 20,001 stored")
    on_that_day = await listed(server, symbol, "--as-of", "2024-03-01")
    assert on_that_day == [(strike, "call") for strike in range(1, 20_001)]


async def test_a_chain_of_too_many_contracts_is_refused_with_its_cures(
    server, symbol, file
):
    rows = "".join(f"2024-03-01,2024-03-15,{n},c,1\n" for n in range(1, 20_002))
    failed = await run(
        server.target, "import", "options", file(f"{HEADER}\n{rows}"),
        "--underlying", symbol,
    )  # fmt: skip
    assert (failed.code, failed.out) == (2, "")
    assert "more than 20,000 contracts" in failed.err and "--partial" in failed.err


async def test_a_file_without_rows_stores_nothing(server, symbol, file):
    path = file(f"{HEADER}\n")
    stored = await run(server.target, "import", "options", path, "--underlying", symbol)
    assert stored.out == "0 contracts read, 0 stored, 0 refused\n"
    assert stored.code == 0


# --- showing ------------------------------------------------------------------


async def test_a_chain_has_calls_left_puts_right_and_blanks_for_the_unknown(
    server, symbol, published
):
    shown = await run(server.target, "chain", symbol)
    assert shown.code == 0
    title, *rows = shown.lines[2], *shown.lines[5:6]
    assert title.split() == "calls | 2024-03-15, 14 days | puts".split()
    cells = [[line[at : at + 9].strip() for at in range(0, 117, 9)] for line in rows]
    assert cells == [["6.5", "0", "6.45", "1200", "", "31.2%", "95", "1.25", "", "", "",
                      "31", ""]]  # fmt: skip
    assert shown.lines[6].split() == ["97.5", "2.5"]
    assert shown.lines[8].split() == "calls | 2024-06-21, 112 days | puts".split()
    assert shown.lines[11].split() == ["100"]


async def test_a_json_contract_has_every_field_and_null_for_the_unknown(
    server, symbol, published
):
    shown = await run(server.target, "chain", symbol, "--json", "--strike", ":95")
    assert [json.loads(line) for line in shown.lines] == [
        {
            "underlying": symbol,
            "time": "2024-03-01T16:00:00.000000Z",
            "expiration": "2024-03-15",
            "strike": 95.0,
            "option_type": kind,
            **dict.fromkeys(
                ("bid", "ask", "last_price", "volume", "open_interest", "implied_vol",
                 "delta", "gamma", "theta", "vega", "rho")
            ),
            **values,
        }
        for kind, values in [
            ("call", {"bid": 6.5, "ask": 0, "last_price": 6.45, "volume": 1200,
                      "implied_vol": 0.3125}),
            ("put", {"bid": 1.25, "open_interest": 31, "delta": -0.2}),
        ]
    ]  # fmt: skip


async def test_options_narrow_the_chain(server, symbol, published):
    expected = {
        "--expiration 2024-06-21": [(100, "call")],
        "--min-expiration 2024-03-16": [(100, "call")],
        "--max-expiration 2024-03-15 --type call": [(95, "call")],
        "--strike 97.5:": [(97.5, "put"), (100, "call")],
        "--strike :95 --type put": [(95, "put")],
        "--delta -0.3:0.6": [(95, "put"), (100, "call")],
        "--moneyness 0.96:0.99 --price 100": [(97.5, "put")],
    }
    shown = await asyncio.gather(
        *(listed(server, symbol, *options.split()) for options in expected)
    )
    assert dict(zip(expected, shown, strict=True)) == expected


async def test_a_chain_may_be_that_of_an_earlier_time(server, symbol, published):
    await publish(server, symbol, quote(95), second=60)
    assert await listed(server, symbol) == [(95, "call")]
    earlier = await listed(server, symbol, "--as-of", "2024-03-01T17:00:59+01:00")
    assert len(earlier) == 4


async def test_a_filter_that_admits_nothing_is_told_with_a_hint(
    server, symbol, published
):
    shown = await run(server.target, "chain", symbol, "--strike", "1000:")
    assert shown.code == 0
    assert shown.err == (
        f"no contract of {symbol} is like that; "
        f"`quantplane expirations {symbol}` tells what there is\n"
    )


@pytest.mark.parametrize("command", ["chain", "expirations"])
async def test_an_unknown_underlying_is_told_in_one_line(server, symbol, command):
    failed = await run(server.target, command, symbol)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("quantplane: UNKNOWN_SYMBOL: ")
    assert failed.err.count("\n") == 1


async def test_expirations_are_listed(server, symbol, published):
    shown = await run(server.target, "expirations", symbol)
    assert [line.split() for line in shown.lines if "2024" in line] == [
        ["2024-03-15", "14", "1", "2", "95", "97.5"],
        ["2024-06-21", "112", "1", "0", "100", "100"],
    ]


async def test_expirations_may_be_json_and_earlier(server, symbol, published):
    await publish(server, symbol, quote(95), second=60)
    shown = await run(
        server.target, "expirations", symbol, "--json", "--as-of", "2024-03-01T16:00:30"
    )
    assert [json.loads(line) for line in shown.lines] == [
        {"expiration": "2024-03-15", "calls": 1, "puts": 2,
         "min_strike": 95.0, "max_strike": 97.5},
        {"expiration": "2024-06-21", "calls": 1, "puts": 0,
         "min_strike": 100.0, "max_strike": 100.0},
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (117, "bid ask last volume OI IV"),
        (116, "bid ask volume OI IV"),
        (98, "bid ask OI IV"),
        (80, "bid ask IV"),
        (20, "bid ask IV"),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns(monkeypatch, width, columns):
    monkeypatch.setenv("COLUMNS", str(width))
    out = Terminal()
    print_chain(out, pb.OptionChain(underlying="A", time=TIME, contracts=CONTRACTS))
    assert f"{columns} strike {columns}".split() in [
        line.split() for line in out.getvalue().splitlines()
    ]


def test_numbers_that_are_long_are_shown_whole():
    out = io.StringIO()
    contracts = [quote(0.1 + 0.2, bid=123_456_789.125, ask=0.1)]
    print_chain(out, pb.OptionChain(underlying="A", time=TIME, contracts=contracts))
    row = out.getvalue().splitlines()[-1]
    assert row.split() == ["123456789.125", "0.1", "0.30000000000000004"]


# --- watching -----------------------------------------------------------------


async def test_a_watched_chain_is_shown_and_then_what_changes(
    server, symbol, published
):
    async with running(server.target, "chain", symbol, "--watch") as watching:
        lines = [(await watching.stdout.readline()).decode() for _ in range(12)]
        assert lines[0] == f"{symbol} as of 2024-03-01T16:00:00Z\n"
        assert lines[11].split() == ["100"]
        await publish(server, symbol, quote(95, bid=7), partial=True, second=1)
        changed = (await watching.stdout.readline()).decode()
        assert changed.split() == [
            "2024-03-01T16:00:01Z", symbol, "2024-03-15", "95", "call", "7",
            "-", "-", "-", "-", "-",
        ]  # fmt: skip
        watching.send_signal(signal.SIGINT)
        assert await watching.communicate() == (b"", b"")
    assert watching.returncode == 130


async def test_a_watched_chain_may_be_json(server, symbol, published):
    arguments = ("chain", symbol, "--watch", "--json", "--strike", ":97.5")
    async with running(server.target, *arguments) as watching:
        read = watching.stdout.readline
        rows = [json.loads(await read()) for _ in range(3)]
        assert [row["strike"] for row in rows] == [95, 95, 97.5]
        await publish(server, symbol, quote(90), *CONTRACTS[1:3], second=1)
        rows = [json.loads(await read()) for _ in range(4)]
        assert [(row["strike"], row["time"][-10:], "gone" in row) for row in rows] == [
            (90, "01.000000Z", False),
            (95, "01.000000Z", False),
            (97.5, "01.000000Z", False),
            (95, "00.000000Z", True),
        ]


async def test_an_underlying_that_comes_later_is_watched_from_then_on(server, symbol):
    async with running(server.target, "chain", symbol, "--watch") as watching:
        said = await watching.stderr.readline()
        assert said.decode().startswith(f"{symbol}: nothing was published yet")
        await publish(server, symbol, quote(95))
        async with asyncio.timeout(30):
            line = await watching.stdout.readline()
        assert line.decode() == f"{symbol} as of 2024-03-01T16:00:00Z\n"


def chain(*contracts, partial=False, second=0):
    time = {"seconds": TIME["seconds"] + second}
    return pb.OptionChain(
        underlying="A", time=time, contracts=contracts, partial=partial
    )


def strikes(taken):
    return tuple([row["strike"] for row in rows] for rows in taken)


def test_a_chain_that_comes_again_changes_nothing():
    watched = Watched()
    assert strikes(watched.take(chain(quote(1), quote(2)))) == ([1, 2], [])
    assert strikes(watched.take(chain(quote(1), quote(2)))) == ([], [])


def test_a_contract_that_keeps_its_time_in_a_later_chain_has_not_changed():
    watched = Watched()
    watched.take(chain(quote(1), quote(2)))
    later = chain(quote(1, time=TIME), quote(2, bid=1.0), second=1)
    assert strikes(watched.take(later)) == ([2], [])


def test_a_whole_chain_tells_what_is_gone_and_a_partial_one_never():
    watched = Watched()
    watched.take(chain(quote(1), quote(2)))
    assert strikes(watched.take(chain(quote(3), partial=True))) == ([3], [])
    assert strikes(watched.take(chain(quote(1)))) == ([], [2, 3])
