"""Option chains read from files."""

import random
from datetime import UTC, date, datetime, timedelta

import pyarrow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from quantplane import v1 as pb
from quantplane.files import CONTRACT_VALUES, FileProblem, Refusal, Report, read_chains
from tests.client.test_files import DATA, real_data, real_rows, unhurried

TSLA = DATA / "options-tsla-20221024.csv.gz"
COLUMNS = {"expiration": "expire_date", "implied_vol": "imp_vol"}
CLOSE = "2022-10-24T20:00"
CALL, PUT = pb.OPTION_TYPE_CALL, pb.OPTION_TYPE_PUT
HEADER = "time,expiration,strike,option_type,bid"


@pytest.fixture
def file(tmp_path):
    """Write content to a file and return its path."""

    def write(content, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode())
        return path

    return write


@pytest.fixture
def chains(file):
    """Return the chains and the report of a file with this content."""

    def read(content, **layout):
        report = Report()
        return list(read_chains(file(content), "A", report=report, **layout)), report

    return read


@pytest.fixture
def contract(chains):
    """Return the only contract of a file with these columns and this row."""

    def read(header, row, **layout):
        (chain,), report = chains(f"{header}\n{row}\n", time=CLOSE, **layout)
        assert report.refused == 0
        (contract,) = chain.contracts
        return contract

    return read


def problem(path, **layout):
    underlying = layout.pop("underlying", "A")
    with pytest.raises(FileProblem) as raised:
        next(read_chains(path, underlying, **layout))
    return str(raised.value)


def bids(chain):
    return [contract.bid for contract in chain.contracts]


@real_data
def test_every_contract_of_a_real_file_is_what_the_csv_module_reads():
    report = Report()
    (chain,) = read_chains(TSLA, "TSLA", COLUMNS, time=CLOSE, report=report)
    header, *expected = real_rows(TSLA)
    assert len(chain.contracts) == len(expected) == report.read == 5_470
    assert (chain.underlying, chain.partial, report.refused) == ("TSLA", False, 0)
    assert chain.time.ToDatetime(UTC) == datetime(2022, 10, 24, 20, tzinfo=UTC)
    header[0] = header[0].removeprefix("\ufeff")
    for contract, cells in zip(chain.contracts, expected, strict=True):
        row = dict(zip(header, cells, strict=True))
        assert contract.expiration == row["expire_date"]
        assert contract.strike == float(row["strike"])
        assert contract.option_type == (CALL if row["option_type"] == "CALLS" else PUT)
        for name in CONTRACT_VALUES:
            cell = row.get("imp_vol" if name == "implied_vol" else name, "")
            assert contract.HasField(name) == bool(cell)
            assert getattr(contract, name) == float(cell or 0)


# --- cells --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *((text, CALL) for text in ("call", "CALLS", "Call", "c", "C", " calls ")),
        *((text, PUT) for text in ("put", "PUTS", "Puts", "p", "P")),
    ],
)
def test_an_option_type_has_many_spellings(contract, text, found):
    row = f"2022-10-28,100,{text},1"
    assert contract("expiration,strike,option_type,bid", row).option_type == found


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2022-10-28", "iso"),
        ("20221028", "iso"),
        ("2022-10-28 16:00:00", "iso"),
        ("2022-10-28T00:00:00Z", "iso"),
        ("10/28/2022", "%m/%d/%Y"),
        ("28 Oct 22", "%d %b %y"),
        ("221028", "%y%m%d"),
    ],
)
def test_one_expiration_has_many_spellings(contract, text, pattern):
    columns, row = "expiration,strike,option_type,bid", f"{text},100,c,1"
    found = contract(columns, row, expiration_format=pattern)
    assert found.expiration == "2022-10-28"


def test_every_value_is_read_and_an_empty_one_is_unknown(contract):
    columns = ",".join(("expiration", "strike", "option_type", *CONTRACT_VALUES))
    full = contract(columns, "2022-10-28,212.5,p,1,2,3,417.0,5,.25,-.5,.01,-9,8,-7")
    assert [getattr(full, name) for name in CONTRACT_VALUES] == [
        1, 2, 3, 417, 5, 0.25, -0.5, 0.01, -9, 8, -7,
    ]  # fmt: skip
    empty = contract(columns, "2022-10-28,212.5,p,,nan, ,,,,,,,,")
    assert not any(empty.HasField(name) for name in CONTRACT_VALUES)


def test_a_zero_is_known(contract):
    found = contract("expiration,strike,option_type,bid,volume", "2022-10-28,1,c,0,0.0")
    assert found.HasField("bid") and found.HasField("volume")


def test_a_byte_order_mark_and_quoted_cells_are_read(contract):
    columns = '\ufeff"expiration","strike",option_type,bid'
    assert contract(columns, '"2022-10-28","100","CALLS","1.5"').bid == 1.5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("x,100,c,1,1,1", "expiration 'x' is not such a date: see --expiration-format"),
        ("2022-02-30,100,c,1,1,1",
         "expiration '2022-02-30' is not such a date: see --expiration-format"),
        ("2022-10-23,100,c,1,1,1",
         "expiration 2022-10-23 lies before its chain of 2022-10-24"),
        (",100,c,1,1,1", "expiration is missing"),
        ("2022-10-28,,c,1,1,1", "strike is missing"),
        ("2022-10-28,0,c,1,1,1", "strike '0' is not above 0"),
        ("2022-10-28,-5,c,1,1,1", "strike '-5' is not above 0"),
        ("2022-10-28,inf,c,1,1,1", "strike 'inf' is not finite"),
        ("2022-10-28,100,,1,1,1", "option_type is missing"),
        ("2022-10-28,100,cap,1,1,1", "option_type 'cap' is neither call nor put"),
        ("2022-10-28,100,c,x,1,1", "bid 'x' is not a number"),
        ("2022-10-28,100,c,1,1.5,1", "volume '1.5' is not a whole number"),
        ("2022-10-28,100,c,1,-1,1", "volume '-1' lies outside 0 to 2,147,483,647"),
        ("2022-10-28,100,c,1,1,-0.1", "implied_vol '-0.1' lies below 0"),
        ("2022-10-28,90.0,C,1,1,1", "has the contract and the time of line 2"),
        ("2022-10-28,100,c,1", "has 4 cells, not 6"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_line_and_the_rest_read(chains, row, reason):
    (chain,), report = chains(
        "expiration,strike,option_type,bid,volume,implied_vol\n"
        f"2022-10-28,90,c,1,1,1\n{row}\n2022-10-28,110,c,1,1,1\n",
        time=CLOSE,
    )
    assert [contract.strike for contract in chain.contracts] == [90, 110]
    assert report.refusals == [Refusal(3, reason)]
    assert (report.read, report.refused) == (3, 1)


def test_a_contract_may_expire_on_the_day_of_its_chain(chains):
    _, report = chains(f"{HEADER}\n2022-10-28T23:59Z,2022-10-28,100,c,1\n")
    assert report.refused == 0


# --- columns ------------------------------------------------------------------


def test_columns_that_are_not_named_are_found_by_the_names_of_the_fields(contract):
    header, row = "strike,expiry,option_type,bid,delta", "100,2022-10-28,c,1.5,0.5"
    found = contract(header, row, columns={"expiration": "expiry"})
    assert (found.bid, found.delta) == (1.5, 0.5)


def test_a_column_that_is_named_goes_before_the_one_of_the_fields_name(contract):
    header, row = "expiration,strike,option_type,bid,best", "2022-10-28,100,c,1,2"
    assert contract(header, row, columns={"bid": "best"}).bid == 2


def test_columns_by_number_mean_that_there_is_no_header(chains):
    columns = {"expiration": 0, "strike": 1, "option_type": "2", "ask": 3}
    (chain,), _ = chains("2022-10-28,100,p,1.5\n", columns=columns, time=CLOSE)
    assert chain.contracts[0].ask == 1.5


def test_a_time_for_the_whole_file_goes_before_the_column_of_times(chains):
    (chain,), _ = chains(f"{HEADER}\nsoon,2022-10-28,100,c,1\n", time=CLOSE)
    assert chain.time.ToJsonString() == "2022-10-24T20:00:00Z"


def test_a_time_for_the_whole_file_is_in_the_zone_of_the_file(chains):
    content = f"{HEADER}\n,2022-10-28,100,c,1\n"
    (chain,), _ = chains(content, time="2022-10-24T16:00", tz="America/New_York")
    assert chain.time.ToJsonString() == "2022-10-24T20:00:00Z"


@pytest.mark.parametrize(
    ("header", "layout", "words"),
    [
        ("strike,option_type,bid", {"time": CLOSE}, "no column is expiration; the"),
        ("expiration,option_type,bid", {"time": CLOSE}, "no column is strike; the"),
        ("expiration,strike,bid", {"time": CLOSE}, "no column is option_type; the"),
        ("expiration,strike,option_type,bid", {}, "no column is time, and --time does"),
        ("expiration,strike,option_type,Bid", {"time": CLOSE},
         "no column is bid, ask or any other value; the file has the columns"),
        (HEADER, {"columns": {"time": "when"}}, "'when' for time is not there"),
        (HEADER, {"columns": {"iv": "bid"}}, "there is no field 'iv'"),
        (HEADER, {"time": "soon"}, "--time 'soon' is not an ISO time"),
        (HEADER, {"time": " "}, "--time is empty"),
        (HEADER, {"time": "9999-01-01"}, "--time '9999-01-01' lies outside"),
        (HEADER, {"time": CLOSE, "tz": "Mars"}, "--tz 'Mars' is no zone"),
        (HEADER, {"expiration_format": "%d"},
         "--expiration-format '%d' is neither iso, nor a pattern of strptime with a"),
        (HEADER, {"expiration_format": "%Y %Y"}, "--expiration-format '%Y %Y' repeats"),
        (HEADER, {"underlying": " A"}, "underlying ' A' is not 1 to 64 printable"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused_as_a_whole(
    file, header, layout, words
):
    assert words in problem(file(f"{header}\n"), **layout)


def test_a_wrong_time_is_told_before_any_chain(file):
    rows = "".join(f"2022-10-28,{strike},c,1\n" for strike in range(1, 200))
    path = file(f"expiration,strike,option_type,bid\n{rows}")
    assert problem(path, time="2023-01-01") == (
        "none of the first 100 rows can be read; line 2: expiration 2022-10-28 lies "
        "before its chain of 2023-01-01"
    )


# --- chains -------------------------------------------------------------------


def test_rows_of_one_time_are_one_chain_in_the_order_of_the_file(chains):
    found, report = chains(
        f"{HEADER}\n"
        "2022-10-26,2022-10-28,100,c,1\n"
        "2022-10-25T20:00-04:00,2022-10-28,100,p,2\n"
        "2022-10-24,2022-10-28,100,c,3\n"
        "2022-10-26,2022-10-28,110,c,4\n"
    )
    assert [chain.time.ToJsonString() for chain in found] == [
        "2022-10-26T00:00:00Z",
        "2022-10-24T00:00:00Z",
    ]
    assert [bids(chain) for chain in found] == [[1, 2, 4], [3]]
    assert report.refused == 0


def test_times_that_are_one_to_the_database_are_one_chain(chains):
    found, _ = chains(
        f"{HEADER}\n"
        "2022-10-24T20:00:00.000001002,2022-10-28,100,c,1\n"
        "2022-10-24T20:00:00.000001999,2022-10-28,110,c,2\n"
        "2022-10-24T20:00:00.000002,2022-10-28,100,c,3\n"
    )
    assert [bids(chain) for chain in found] == [[1, 2], [3]]


def test_partial_chains_say_so(chains):
    found, _ = chains(f"{HEADER}\n2022-10-24,2022-10-28,100,c,1\n", partial=True)
    assert [chain.partial for chain in found] == [True]


def rows_of(stamps):
    """Return a file of one contract for each stamp, a day of October 2022."""
    return f"{HEADER}\n" + "".join(
        f"2022-10-{day:02},2022-10-31,{strike},c,{strike}\n"
        for strike, day in enumerate(stamps, 1)
    )


def test_a_chain_of_too_many_contracts_is_told_with_its_cures(file):
    path = file(rows_of([24] * 20_001))
    assert problem(path) == (
        "the chain of 2022-10-24T00:00:00Z has more than 20,000 contracts: if the rows "
        "are of several times, name the column that has them (--columns time=COLUMN) "
        "in place of --time; otherwise store it in parts with --partial"
    )


def test_a_chain_of_the_most_contracts_is_one(chains):
    found, _ = chains(rows_of([23] * 20_000 + [24] * 20_000))
    assert [len(chain.contracts) for chain in found] == [20_000, 20_000]
    assert not any(chain.partial for chain in found)


def test_a_partial_chain_of_too_many_contracts_comes_in_parts(chains):
    found, _ = chains(rows_of([24] * 20_001), partial=True)
    assert [len(chain.contracts) for chain in found] == [20_000, 1]
    assert all(chain.partial for chain in found)


def test_rows_of_one_time_that_lie_far_apart_come_as_a_rest(chains, monkeypatch):
    monkeypatch.setattr("quantplane.files.options.CHAIN_CONTRACTS", 3)
    found, _ = chains(rows_of([21, 21, 22, 23, 21]))
    assert [(bids(chain), chain.partial) for chain in found] == [
        ([1, 2], False), ([3], False), ([4], False), ([5], True),
    ]  # fmt: skip


@unhurried
@given(
    stamps=st.lists(st.integers(1, 6), max_size=30),
    most=st.integers(1, 8),
    partial=st.booleans(),
)
@example(stamps=[1, 2, 2, 1], most=3, partial=False)
def test_what_is_stored_of_a_file_does_not_depend_on_the_order_of_its_rows(
    tmp_path_factory, stamps, most, partial
):
    path = tmp_path_factory.mktemp("order") / "rows.csv"
    path.write_text(rows_of(stamps))
    stored, too_large = {}, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantplane.files.options.CHAIN_CONTRACTS", most)
        try:
            for chain in read_chains(path, "A", partial=partial):
                assert 0 < len(chain.contracts) <= most
                day = chain.time.ToDatetime().day
                kept = stored.get(day, set()) if chain.partial else set()
                stored[day] = kept | {int(each.strike) for each in chain.contracts}
        except FileProblem:
            too_large = True
    if too_large:
        assert not partial and max(map(stamps.count, stamps)) > most
    else:
        assert stored == {
            day: {strike for strike, other in enumerate(stamps, 1) if other == day}
            for day in stamps
        }


def test_whole_chains_of_too_many_times_are_refused(file, monkeypatch):
    monkeypatch.setattr("quantplane.files.options.CHAIN_CONTRACTS", 1)
    monkeypatch.setattr("quantplane.files.options.MOST_TIMES", 3)
    path = file(rows_of(range(1, 7)))
    with pytest.raises(FileProblem, match="more than 3 times: split it"):
        list(read_chains(path, "A"))
    assert len(list(read_chains(path, "A", partial=True))) == 6


# --- Parquet ------------------------------------------------------------------


@pytest.fixture
def parquet_chains(tmp_path):
    """Return the chains and the report of a Parquet file with these columns."""

    def read(table, **layout):
        path, report = tmp_path / "rows.parquet", Report()
        parquet.write_table(pyarrow.table(table), path)
        return list(read_chains(path, "A", report=report, **layout)), report

    return read


def expirations(column):
    return {
        "expiration": column,
        "strike": [100.0],
        "option_type": ["call"],
        "bid": [1.0],
    }


MIDNIGHT = datetime(2022, 10, 28)  # noqa: DTZ001
EVENING = datetime(2022, 10, 28, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([date(2022, 10, 28)]),
        pyarrow.array([MIDNIGHT], pyarrow.timestamp("ns")),
        pyarrow.array([MIDNIGHT + timedelta(hours=16)], pyarrow.timestamp("s")),
        pyarrow.array([EVENING], pyarrow.timestamp("us", "UTC")),
        pyarrow.array([EVENING], pyarrow.timestamp("us", "America/New_York")),
        pyarrow.array([date(2022, 10, 28)], pyarrow.date64()),
        pyarrow.array(["2022-10-28"]),
        pyarrow.array(["2022-10-28"]).dictionary_encode(),
        pyarrow.array([20221028]),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_expirations_of_every_type_are_dates(parquet_chains, column):
    (chain,), _ = parquet_chains(expirations(column), time=CLOSE)
    assert chain.contracts[0].expiration == "2022-10-28"


def test_a_parquet_expiration_has_the_date_of_its_own_zone(parquet_chains):
    night = pyarrow.array(
        [datetime(2022, 10, 29, 2, tzinfo=UTC)],
        pyarrow.timestamp("s", "America/New_York"),
    )
    (chain,), _ = parquet_chains(expirations(night), time=CLOSE)
    assert chain.contracts[0].expiration == "2022-10-28"


def test_parquet_nulls_and_nans_are_unknown_and_bad_rows_refused(parquet_chains):
    (chain,), report = parquet_chains(
        {
            "time": pyarrow.array([EVENING] * 3, pyarrow.timestamp("us", "UTC")),
            "expiration": [date(2022, 10, 28), date(2022, 10, 28), None],
            "strike": [1, 2, 3],
            "option_type": ["C", "P", "C"],
            "bid": [1.0, float("nan"), 1.0],
            "volume": [None, 417.0, 1.0],
            "open_interest": pyarrow.array([0, None, 1], pyarrow.int32()),
        }
    )
    known = [
        [each.HasField(name) for name in ("bid", "volume", "open_interest")]
        for each in chain.contracts
    ]
    assert known == [[True, False, True], [False, True, False]]
    assert report.refusals == [Refusal(3, "expiration is missing")]
    assert report.unit == "row"
    assert chain.time.ToDatetime(UTC) == EVENING


@real_data
def test_a_parquet_file_gives_the_chain_of_the_csv_file_it_was_made_of(tmp_path):
    header, *body = real_rows(TSLA)
    header[0] = header[0].removeprefix("\ufeff")
    random.Random(7).shuffle(body)
    columns = dict(zip(header, zip(*body, strict=True), strict=True))
    numbers = ("strike", "bid", "ask", "last_price", "volume", "open_interest")
    for name in (*numbers, "imp_vol"):
        columns[name] = [float(cell) if cell else None for cell in columns[name]]
    columns["expire_date"] = list(map(date.fromisoformat, columns["expire_date"]))
    path = tmp_path / "chain.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    (found,), (expected,) = (
        read_chains(each, "TSLA", COLUMNS, time=CLOSE) for each in (path, TSLA)
    )

    def ordered(chain):
        key = lambda c: (c.expiration, c.strike, c.option_type)  # noqa: E731
        return sorted(chain.contracts, key=key)

    assert ordered(found) == ordered(expected)
