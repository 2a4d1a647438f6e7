"""Bars as data frames, made column by column without a loop over rows.

Every frame has the columns of `COLUMNS` in that order, whatever the bars carry:
`symbol` as categories, `time` in UTC with microseconds, prices as float64, units
as integers. What is unknown is null (for prices in pandas: NaN).
"""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantplane import v1 as pb

if TYPE_CHECKING:
    import numpy
    import pandas  # type: ignore[import-untyped]
    import polars
    import pyarrow

    from quantplane.client import Client

    Array = numpy.ndarray[Any, Any]

PRICES = ("open", "high", "low", "close", "vwap", "bid", "ask")
UNITS = {"volume": "int64", "bid_size": "int32", "ask_size": "int32"}
COLUMNS = tuple(
    "symbol time open high low close volume vwap bid ask bid_size ask_size".split()
)


async def read_bars(
    client: "Client", request: pb.StreamBarsRequest
) -> list[pb.BarColumns]:
    """Return all bars of the request, over broken connections if need be."""
    return [
        response.columns
        async for response in client.follow(client.market_data.StreamBars, request)
        if response.HasField("columns")
    ]


def to_pandas(chunks: Iterable[pb.BarColumns]) -> "pandas.DataFrame":
    """Return a DataFrame; units are of the nullable types Int64 and Int32."""
    pd = _import("pandas", "pandas")
    symbols, codes, columns = _gather(chunks)
    frame: dict[str, Any] = dict(columns)
    frame["symbol"] = pd.Categorical.from_codes(
        codes, categories=pd.Index(symbols, dtype="str")
    )
    stamps = columns["time"].view("datetime64[us]")
    frame["time"] = pd.DatetimeIndex(stamps).tz_localize("UTC")
    for name in UNITS:
        frame[name] = pd.arrays.IntegerArray(columns[name], columns[name] < 0)
    return pd.DataFrame({name: frame[name] for name in COLUMNS}, copy=False)


def to_polars(chunks: Iterable[pb.BarColumns]) -> "polars.DataFrame":
    """Return a DataFrame; `symbol` is a Categorical."""
    pl = _import("polars", "polars")
    symbols, codes, columns = _gather(chunks)
    names = pl.Series("symbol", symbols, dtype=pl.Categorical)
    frame = {"symbol": names.gather(codes)}
    frame["time"] = pl.Series(columns["time"]).cast(pl.Datetime("us", "UTC"))
    for name in PRICES:
        frame[name] = pl.Series(columns[name], nan_to_null=True)
    for name in UNITS:
        units = pl.Series(columns[name])
        frame[name] = units.set(units < 0, None)
    table: polars.DataFrame = pl.DataFrame({name: frame[name] for name in COLUMNS})
    return table


def to_arrow(chunks: Iterable[pb.BarColumns]) -> "pyarrow.Table":
    """Return a Table; `symbol` is a dictionary of strings."""
    arrow = _import("pyarrow", "cli")
    symbols, codes, columns = _gather(chunks)
    table = {
        "symbol": arrow.DictionaryArray.from_arrays(
            codes, arrow.array(symbols, arrow.string())
        ),
        "time": arrow.array(columns["time"]).view(arrow.timestamp("us", "UTC")),
    }
    for name in PRICES:
        # `from_pandas` makes a null of each NaN.
        table[name] = arrow.array(columns[name], from_pandas=True)
    for name in UNITS:
        table[name] = arrow.array(columns[name], mask=columns[name] < 0)
    return arrow.table({name: table[name] for name in COLUMNS})


def _gather(
    chunks: Iterable[pb.BarColumns],
) -> tuple[list[str], "Array", dict[str, "Array"]]:
    """Return the symbols, each row's index in them, and the other columns."""
    np = _import("numpy", "pandas")
    chunks = list(chunks)
    symbols = list(dict.fromkeys(chunk.symbol for chunk in chunks))
    places = {symbol: place for place, symbol in enumerate(symbols)}
    lengths = [len(chunk.time_us) for chunk in chunks]
    codes = np.repeat(
        np.array([places[chunk.symbol] for chunk in chunks], "int32"), lengths
    )
    columns = {"time": _column(chunks, "time_us", "int64", 0)}
    for name in PRICES:
        columns[name] = _column(chunks, name, "float64", np.nan)
    for name, dtype in UNITS.items():
        columns[name] = _column(chunks, name, dtype, -1)
    return symbols, codes, columns


def _column(
    chunks: list[pb.BarColumns], name: str, dtype: str, unknown: float
) -> "Array":
    """Join one column of all chunks; an empty one has no value that is known."""
    import numpy as np

    parts = [np.empty(0, dtype)]
    for chunk in chunks:
        values, length = _array(getattr(chunk, name), dtype), len(chunk.time_us)
        if len(values) not in (0, length):
            raise ValueError(f"{name} has {len(values)} values for {length} bars")
        parts.append(values if len(values) else np.full(length, unknown, dtype))
    return np.concatenate(parts)


def _array(values: Any, dtype: str) -> "Array":
    import numpy as np

    if hasattr(values, "__array__"):
        return np.asarray(values, dtype)
    # Before protobuf 7 a repeated field is a plain sequence.
    return np.fromiter(values, dtype, len(values))


def _import(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ImportError(
            f"this needs {module}: pip install 'quantplane[{extra}]'"
        ) from None
