"""The fixtures, as a strategy's own tests use them."""

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

INI = """
[pytest]
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""
PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture
def run(pytester):
    """Run a strategy's test files in a process of its own; give what came of it."""

    def run(conftest, **tests):
        pytester.makeini(INI)
        pytester.makeconftest(conftest)
        pytester.makepyfile(**{f"test_{name}": text for name, text in tests.items()})
        return pytester.runpytest_subprocess("-p", "no:cacheprovider")

    return run


ASYNCHRONOUS = """
import pytest
from quantplane import v1 as pb

SYMBOLS = pb.ListSymbolsRequest()

def quote():
    quote = pb.Quote(symbol="ES", bid=1, ask=2)
    quote.time.GetCurrentTime()
    return quote

@pytest.mark.asyncio
@pytest.mark.parametrize("run", [1, 2])
async def test_each_test_has_a_server_with_nothing_in_it(quantplane_client, run):
    latest = pb.GetLatestQuotesRequest(symbols=["ES"])
    found = await quantplane_client.market_data.GetLatestQuotes(latest)
    assert found.unknown_symbols == ["ES"]
    listed = await quantplane_client.market_data.ListSymbols(SYMBOLS)
    assert not listed.symbols
    async with quantplane_client.publish_quotes() as publisher:
        await publisher.send([quote()])
        await publisher.durable()
    listed = await quantplane_client.market_data.ListSymbols(SYMBOLS)
    assert [symbol.symbol for symbol in listed.symbols] == ["ES"]

@pytest.mark.asyncio
async def test_the_faulty_client_is_of_the_same_server(
    faults, faulty_client, quantplane_client
):
    faults.drop("ListSymbols", times=2)
    listed = await faulty_client.market_data.ListSymbols(SYMBOLS)
    assert listed == await quantplane_client.market_data.ListSymbols(SYMBOLS)
    assert faults.calls("ListSymbols") == 3
"""


SYNCHRONOUS = """
from quantplane import v1 as pb
from quantplane.sync import Client

def test_it_blocks(quantplane_server, faults):
    faults.drop("ListSymbols")
    with Client(quantplane_server) as client, Client(faults.target) as faulty:
        listed = client.market_data.ListSymbols(pb.ListSymbolsRequest())
        assert listed == faulty.market_data.ListSymbols(pb.ListSymbolsRequest())
    assert faults.calls("ListSymbols") == 2
"""


def documented():
    """Return the files of the documentation's example, by name."""
    return dict(re.findall(r"```python\n# (\w+).py\n(.*?)```", PAGE.read_text(), re.S))


def test_the_documented_example_and_strategies_of_both_kinds_are_tested(run):
    example = documented()
    result = run(
        example["conftest"],
        example=example["test_strategy"],
        asynchronous=ASYNCHRONOUS,
        synchronous=SYNCHRONOUS,
    )
    result.assert_outcomes(passed=5)


WITHOUT_SERVER = """
import importlib.metadata

importlib.metadata.entry_points = lambda **names: ()
"""


def test_without_the_server_installed_one_sentence_says_what_to_install(run):
    result = run(documented()["conftest"] + WITHOUT_SERVER, synchronous=SYNCHRONOUS)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["there is no quantplane server*pip install*quantplane-server*embedded*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
