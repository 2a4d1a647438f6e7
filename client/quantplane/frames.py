"""Bars and option chains as data frames.

The columns of a frame, their order and their types never depend on the data: names
are categories, times are in UTC with microseconds, expirations are dates, prices and
Greeks are float64, units are integers. What is unknown is null (for floats in pandas:
NaN).
"""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

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
CHAIN_COLUMNS = tuple(
    "underlying time expiration strike option_type bid ask last_price volume "
    "open_interest implied_vol delta gamma theta vega rho".split()
)


class Categories(NamedTuple):
    """A column of names."""

    names: list[str]
    codes: "Array"  # each row's index in them, as int32


# Of numpy, datetime64[us] is a time in UTC, datetime64[D] a date; NaN is unknown among
# floats, and -1 among integers.
Columns = dict[str, "Categories | Array"]


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
    """Return bars as a DataFrame; units are of the nullable types Int64 and Int32."""
    return _to_pandas(_bars, chunks)


def to_polars(chunks: Iterable[pb.BarColumns]) -> "polars.DataFrame":
    """Return bars as a DataFrame; `symbol` is a Categorical."""
    return _to_polars(_bars, chunks)


def to_arrow(chunks: Iterable[pb.BarColumns]) -> "pyarrow.Table":
    """Return bars as a Table; `symbol` is a dictionary of strings."""
    return _to_arrow(_bars, chunks)


def chains_to_pandas(chains: Iterable[pb.OptionChain]) -> "pandas.DataFrame":
    """Return the contracts of all chains as a DataFrame.

    `expiration` is datetime64[s], at midnight; `option_type` is call or put, a
    category; `volume` and `open_interest` are of the nullable type Int32. `time` is
    when the row was quoted.
    """
    return _to_pandas(_contracts, chains)


def chains_to_polars(chains: Iterable[pb.OptionChain]) -> "polars.DataFrame":
    """Return the contracts of all chains as a DataFrame; `expiration` is a Date."""
    return _to_polars(_contracts, chains)


def chains_to_arrow(chains: Iterable[pb.OptionChain]) -> "pyarrow.Table":
    """Return the contracts of all chains as a Table; `expiration` is a date32."""
    return _to_arrow(_contracts, chains)


# --- from columns to frames ---------------------------------------------------


def _to_pandas(gather: Any, messages: Iterable[Any]) -> "pandas.DataFrame":
    pd = _import("pandas", "pandas")

    def series(column: Any) -> Any:
        if isinstance(column, Categories):
            names = pd.Index(column.names, dtype="str")
            return pd.Categorical.from_codes(column.codes, categories=names)
        match str(column.dtype):
            case "datetime64[us]":
                return pd.DatetimeIndex(column).tz_localize("UTC")
            case "datetime64[D]":
                return column.astype("datetime64[s]")
            case "float64":
                return column
        return pd.arrays.IntegerArray(column, column < 0)

    columns = gather(messages)
    frame = {name: series(column) for name, column in columns.items()}
    return pd.DataFrame(frame, copy=False)


def _to_polars(gather: Any, messages: Iterable[Any]) -> "polars.DataFrame":
    pl = _import("polars", "polars")

    def series(column: Any) -> Any:
        if isinstance(column, Categories):
            return pl.Series(column.names, dtype=pl.Categorical).gather(column.codes)
        match str(column.dtype):
            case "datetime64[us]":
                return pl.Series(column.view("int64")).cast(pl.Datetime("us", "UTC"))
            case "datetime64[D]":
                return pl.Series(column.astype("int32")).cast(pl.Date)
            case "float64":
                return pl.Series(column, nan_to_null=True)
        units = pl.Series(column)
        return units.set(units < 0, None)

    columns = gather(messages)
    frame: polars.DataFrame = pl.DataFrame(
        {name: series(column) for name, column in columns.items()}
    )
    return frame


def _to_arrow(gather: Any, messages: Iterable[Any]) -> "pyarrow.Table":
    arrow = _import("pyarrow", "cli")

    def array(column: Any) -> Any:
        if isinstance(column, Categories):
            names = arrow.array(column.names, arrow.string())
            return arrow.DictionaryArray.from_arrays(column.codes, names)
        match str(column.dtype):
            case "datetime64[us]":
                return arrow.array(column.view("int64")).view(
                    arrow.timestamp("us", "UTC")
                )
            case "datetime64[D]":
                return arrow.array(column.astype("int32")).view(arrow.date32())
            case "float64":
                # `from_pandas` makes a null of each NaN.
                return arrow.array(column, from_pandas=True)
        return arrow.array(column, mask=column < 0)

    columns = gather(messages)
    return arrow.table({name: array(column) for name, column in columns.items()})


# --- from messages to columns -------------------------------------------------


def _bars(chunks: Iterable[pb.BarColumns]) -> Columns:
    """Join the chunks' columns, without a loop over rows."""
    np = _import("numpy", "pandas")
    chunks = list(chunks)
    lengths = [len(chunk.time_us) for chunk in chunks]
    columns: Columns = {
        "symbol": _categories([chunk.symbol for chunk in chunks], lengths),
        "time": _column(chunks, "time_us", "int64", 0).view("datetime64[us]"),
    }
    for name in PRICES:
        columns[name] = _column(chunks, name, "float64", np.nan)
    for name, dtype in UNITS.items():
        columns[name] = _column(chunks, name, dtype, -1)
    return {name: columns[name] for name in COLUMNS}


def _categories(names: list[str], lengths: list[int]) -> Categories:
    """Return a column of each name as many times as its length says."""
    import numpy as np

    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    codes = np.array([places[name] for name in names], "int32")
    return Categories(list(places), np.repeat(codes, lengths))


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


def _contracts(chains: Iterable[pb.OptionChain]) -> Columns:
    np = _import("numpy", "pandas")
    chains = list(chains)
    contracts = [contract for chain in chains for contract in chain.contracts]
    times = [
        (contract if contract.HasField("time") else chain).time.ToMicroseconds()
        for chain in chains
        for contract in chain.contracts
    ]
    types = [contract.option_type - pb.OPTION_TYPE_CALL for contract in contracts]
    columns: Columns = {
        "underlying": _categories(
            [chain.underlying for chain in chains],
            [len(chain.contracts) for chain in chains],
        ),
        "time": np.array(times, "datetime64[us]"),
        "expiration": np.array([c.expiration for c in contracts], "datetime64[D]"),
        "strike": np.array([c.strike for c in contracts], "float64"),
        "option_type": Categories(["call", "put"], np.array(types, "int32")),
    }
    for name in CHAIN_COLUMNS:
        if name in ("volume", "open_interest"):
            columns[name] = _values(contracts, name, "int32", -1)
        elif name not in columns:
            columns[name] = _values(contracts, name, "float64", np.nan)
    return columns


def _values(
    contracts: list[pb.OptionQuote], name: Any, dtype: str, unknown: float
) -> "Array":
    import numpy as np

    values = [getattr(c, name) if c.HasField(name) else unknown for c in contracts]
    return np.array(values, dtype)


def _import(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ImportError(
            f"this needs {module}: pip install 'quantplane[{extra}]'"
        ) from None
