"""Option chains as data frames."""

from datetime import UTC, date, datetime

import pandas as pd
import polars as pl
import pyarrow
import pytest

from quantplane import v1 as pb
from quantplane.frames import (
    CHAIN_COLUMNS,
    chains_to_arrow,
    chains_to_pandas,
    chains_to_polars,
)
from tests.client.test_frames import cells

FRAMES = [chains_to_pandas, chains_to_polars, chains_to_arrow]
FLOATS = tuple("bid ask last_price implied_vol delta gamma theta vega rho".split())
COUNTS = ("volume", "open_interest")
CALL, PUT = pb.OPTION_TYPE_CALL, pb.OPTION_TYPE_PUT
START = datetime(2024, 1, 1, tzinfo=UTC)


def quote(strike=100.0, **fields):
    return pb.OptionQuote(
        **{"expiration": "2024-03-15", "option_type": CALL, **fields}, strike=strike
    )


def chain(*contracts, underlying="A", microsecond=1):
    made = pb.OptionChain(underlying=underlying, contracts=contracts)
    made.time.FromDatetime(START.replace(microsecond=microsecond))
    return made


@pytest.mark.parametrize("to_frame", FRAMES)
def test_the_columns_have_one_order(to_frame):
    frame = to_frame([chain(quote())])
    names = frame.column_names if to_frame is chains_to_arrow else list(frame.columns)
    assert names == list(CHAIN_COLUMNS)


@pytest.mark.parametrize("to_frame", FRAMES)
def test_a_contract_is_a_row(to_frame):
    frame = to_frame([chain(quote(1.5), quote(2.5, option_type=PUT))])
    assert cells(frame, "underlying") == ["A", "A"]
    assert cells(frame, "strike") == [1.5, 2.5]
    assert cells(frame, "option_type") == ["call", "put"]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_an_expiration_is_a_date(to_frame):
    (found,) = cells(to_frame([chain(quote())]), "expiration")
    expected = date(2024, 3, 15)
    assert found == (
        pd.Timestamp(expected) if to_frame is chains_to_pandas else expected
    )


@pytest.mark.parametrize("to_frame", FRAMES)
def test_a_row_has_the_time_it_was_quoted_at(to_frame):
    earlier = quote()
    earlier.time.FromDatetime(START)
    frame = to_frame([chain(quote(), earlier)])
    assert cells(frame, "time") == [START.replace(microsecond=1), START]


@pytest.mark.parametrize("to_frame", FRAMES)
@pytest.mark.parametrize("name", FLOATS + COUNTS)
def test_unknown_is_null_and_zero_is_not(to_frame, name):
    rows = [quote(1, **{name: 7}), quote(2), quote(3, **{name: 0})]
    frame = to_frame([chain(*rows)])
    assert cells(frame, name) == [7, None, 0]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_chains_of_many_underlyings_and_times_become_one_frame(to_frame):
    chains = [
        chain(quote(1), quote(2)),
        chain(quote(3), underlying="B"),
        chain(underlying="C"),
        chain(quote(4), microsecond=2),
    ]
    frame = to_frame(iter(chains))
    assert cells(frame, "underlying") == ["A", "A", "B", "A"]
    assert cells(frame, "strike") == [1, 2, 3, 4]
    assert [time.microsecond for time in cells(frame, "time")] == [1, 1, 1, 2]


ANY_CHAINS = [[], [chain()], [chain(quote())], [chain(quote(volume=1, delta=0.5))]]


@pytest.mark.parametrize("chains", ANY_CHAINS)
def test_pandas_types_do_not_depend_on_the_contracts(chains):
    types = {
        name: str(dtype) for name, dtype in chains_to_pandas(chains).dtypes.items()
    }
    assert types == {
        "underlying": "category",
        "time": "datetime64[us, UTC]",
        "expiration": "datetime64[s]",
        "strike": "float64",
        "option_type": "category",
        **dict.fromkeys(FLOATS, "float64"),
        **dict.fromkeys(COUNTS, "Int32"),
    }


@pytest.mark.parametrize("chains", ANY_CHAINS)
def test_polars_types_do_not_depend_on_the_contracts(chains):
    assert dict(chains_to_polars(chains).schema) == {
        "underlying": pl.Categorical(),
        "time": pl.Datetime("us", "UTC"),
        "expiration": pl.Date(),
        "strike": pl.Float64(),
        "option_type": pl.Categorical(),
        **dict.fromkeys(FLOATS, pl.Float64()),
        **dict.fromkeys(COUNTS, pl.Int32()),
    }


@pytest.mark.parametrize("chains", ANY_CHAINS)
def test_arrow_types_do_not_depend_on_the_contracts(chains):
    schema = chains_to_arrow(chains).schema
    names = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "underlying": names,
        "time": pyarrow.timestamp("us", "UTC"),
        "expiration": pyarrow.date32(),
        "strike": pyarrow.float64(),
        "option_type": names,
        **dict.fromkeys(FLOATS, pyarrow.float64()),
        **dict.fromkeys(COUNTS, pyarrow.int32()),
    }
