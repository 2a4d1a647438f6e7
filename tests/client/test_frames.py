import math
import sys
from datetime import UTC, datetime

import pandas as pd
import polars as pl
import pyarrow
import pytest

from quantplane import v1 as pb
from quantplane.files import read_bars as read_file
from quantplane.frames import COLUMNS, read_bars, to_arrow, to_pandas, to_polars
from tests.client import serving
from tests.client.test_files import FUTURE, OHLC, real_data

NAN = math.nan
START = datetime(2024, 1, 1, tzinfo=UTC)
START_US = int(START.timestamp()) * 1_000_000
FRAMES = [to_pandas, to_polars, to_arrow]
PRICES = ("open", "high", "low", "close", "vwap", "bid", "ask")
UNITS = ("volume", "bid_size", "ask_size")


def chunk(symbol="ES", rows=3, **columns):
    times = range(START_US, START_US + rows * 60_000_000, 60_000_000)
    columns.setdefault("close", [float(row) for row in range(rows)])
    return pb.BarColumns(symbol=symbol, time_us=times, **columns)


def cells(frame, name):
    """Return a column as plain values, None where it is null."""
    if isinstance(frame, pyarrow.Table):
        return frame[name].to_pylist()
    values = frame[name].to_list() if isinstance(frame, pl.DataFrame) else frame[name]
    return [None if value is pd.NA or value != value else value for value in values]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_the_columns_have_one_order(to_frame):
    frame = to_frame([chunk()])
    names = frame.column_names if to_frame is to_arrow else list(frame.columns)
    assert names == list(COLUMNS)


@pytest.mark.parametrize("to_frame", FRAMES)
def test_chunks_of_many_symbols_become_one_frame(to_frame):
    frame = to_frame([chunk("ES", 2), chunk("NQ", 1), chunk("ES", 1)])
    assert cells(frame, "symbol") == ["ES", "ES", "NQ", "ES"]
    assert cells(frame, "close") == [0, 1, 0, 0]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_the_chunks_may_come_from_a_generator(to_frame):
    assert cells(to_frame(chunk(name) for name in "AB"), "symbol") == list("AAABBB")


@pytest.mark.parametrize("to_frame", FRAMES)
def test_a_time_is_in_utc_to_the_microsecond(to_frame):
    frame = to_frame([pb.BarColumns(symbol="S", time_us=[START_US + 1], close=[1.0])])
    assert cells(frame, "time") == [START.replace(microsecond=1)]


@pytest.mark.parametrize("to_frame", FRAMES)
@pytest.mark.parametrize("name", PRICES)
def test_a_nan_is_null(to_frame, name):
    frame = to_frame([chunk(**{name: [1.5, NAN, -1.0]})])
    assert cells(frame, name) == [1.5, None, -1.0]


@pytest.mark.parametrize("to_frame", FRAMES)
@pytest.mark.parametrize("name", UNITS)
def test_minus_one_is_null_among_units(to_frame, name):
    frame = to_frame([chunk(**{name: [7, -1, 0]})])
    assert cells(frame, name) == [7, None, 0]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_an_empty_column_is_null_throughout(to_frame):
    frame = to_frame([chunk("A", 2), chunk("B", 1, volume=[5], bid=[1.0])])
    assert cells(frame, "volume") == [None, None, 5]
    assert cells(frame, "bid") == [None, None, 1.0]
    assert cells(frame, "ask_size") == cells(frame, "vwap") == [None] * 3


@pytest.mark.parametrize("to_frame", FRAMES)
def test_the_largest_volume_is_exact(to_frame):
    frame = to_frame([chunk(rows=1, volume=[2**63 - 1])])
    assert cells(frame, "volume") == [2**63 - 1]


@pytest.mark.parametrize("to_frame", FRAMES)
def test_a_column_of_another_length_is_refused(to_frame):
    with pytest.raises(ValueError, match="open has 2 values for 3 bars"):
        to_frame([chunk(open=[1.0, 2.0])])


ANY_CHUNKS = [[], [pb.BarColumns(symbol="ES")], [chunk()], [chunk(volume=[1, 2, 3])]]


@pytest.mark.parametrize("chunks", ANY_CHUNKS)
def test_pandas_types_do_not_depend_on_the_bars(chunks):
    types = {name: str(dtype) for name, dtype in to_pandas(chunks).dtypes.items()}
    assert types == {
        "symbol": "category",
        "time": "datetime64[us, UTC]",
        **dict.fromkeys(PRICES, "float64"),
        "volume": "Int64",
        "bid_size": "Int32",
        "ask_size": "Int32",
    }


@pytest.mark.parametrize("chunks", ANY_CHUNKS)
def test_polars_types_do_not_depend_on_the_bars(chunks):
    assert dict(to_polars(chunks).schema) == {
        "symbol": pl.Categorical(),
        "time": pl.Datetime("us", "UTC"),
        **dict.fromkeys(PRICES, pl.Float64()),
        "volume": pl.Int64(),
        "bid_size": pl.Int32(),
        "ask_size": pl.Int32(),
    }


@pytest.mark.parametrize("chunks", ANY_CHUNKS)
def test_arrow_types_do_not_depend_on_the_bars(chunks):
    schema = to_arrow(chunks).schema
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "symbol": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "time": pyarrow.timestamp("us", "UTC"),
        **dict.fromkeys(PRICES, pyarrow.float64()),
        "volume": pyarrow.int64(),
        "bid_size": pyarrow.int32(),
        "ask_size": pyarrow.int32(),
    }


@pytest.mark.parametrize("to_frame", FRAMES)
def test_a_runtime_without_array_views_gives_the_same_frame(to_frame, monkeypatch):
    chunks = [chunk(volume=[1, -1, 3])]
    expected = to_frame(chunks)
    monkeypatch.setattr(
        "quantplane.frames.hasattr", lambda values, name: False, raising=False
    )
    assert to_frame(chunks).equals(expected)


@pytest.mark.parametrize(
    ("to_frame", "module", "extra"),
    [
        (to_pandas, "pandas", "pandas"),
        (to_polars, "polars", "polars"),
        (to_arrow, "pyarrow", "cli"),
    ],
)
def test_a_missing_package_is_told_with_its_cure(to_frame, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'quantplane\[{extra}\]'"):
        to_frame([])


@real_data
def test_a_real_month_of_bars_survives_bit_for_bit():
    columns = {"time": "timestamp_utc", "volume": "volume", **OHLC}
    bars = [bar for batch in read_file(FUTURE, "6EH4", columns) for bar in batch]
    message = pb.BarColumns(
        symbol="6EH4",
        time_us=[bar.time.ToMicroseconds() for bar in bars],
        volume=[bar.volume for bar in bars],
        **{name: [getattr(bar, name) for bar in bars] for name in OHLC},
    )
    for to_frame in FRAMES:
        frame = to_frame([message])
        assert cells(frame, "time") == [bar.time.ToDatetime(UTC) for bar in bars]
        assert cells(frame, "volume") == [bar.volume for bar in bars]
        for name in OHLC:
            assert cells(frame, name) == [getattr(bar, name) for bar in bars]


async def test_reading_bars_goes_on_after_a_cut_and_leaves_out_the_events():
    async def cut(request, context):
        yield pb.StreamBarsResponse(event=pb.StreamEvent(subscribed=pb.Subscribed()))
        yield pb.StreamBarsResponse(columns=chunk("A"), resume_token=b"1")

    async def rest(request, context):
        assert request.resume_token == b"1"
        yield pb.StreamBarsResponse(event=pb.StreamEvent(subscribed=pb.Subscribed()))
        yield pb.StreamBarsResponse(columns=chunk("B"), resume_token=b"2")
        yield pb.StreamBarsResponse(event=pb.StreamEvent(complete=pb.Complete()))

    request = pb.StreamBarsRequest(symbols=["A", "B"])
    async with serving(cut, rest) as (client, _):
        assert await read_bars(client, request) == [chunk("A"), chunk("B")]
