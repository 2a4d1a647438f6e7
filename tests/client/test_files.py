import csv
import gzip
import math
import random
import tracemalloc
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from quantplane.files import (
    FileProblem,
    Refusal,
    Report,
    parse_columns,
    parse_time,
    read_bars,
    read_quotes,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
EURUSD = DATA / "eurusd-ticks-2020-01-01.csv.gz"
GBPUSD = DATA / "gbpusd-m1-bid-2012.csv.gz"
FUTURE = DATA / "6EH4-m1-2024-01.csv.gz"
TICKS = {
    "columns": {"time": 0, "bid": 1, "ask": 2, "volume": 3},
    "time_format": "%Y%m%d %H%M%S%f",
    "tz": "-05:00",
}
OHLC = {name: name for name in ("open", "high", "low", "close")}
FIRST, LAST = (datetime(year, 1, 1) for year in (1950, 2037))  # noqa: DTZ001
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

unhurried = settings(deadline=None)
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder is absent")


def rows(batches):
    return [row for batch in batches for row in batch]


def real_rows(path):
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def file(tmp_path):
    """Write content to a file and return its path."""

    def write(content, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def quotes(file):
    """Return the quotes and the report of a file with this content."""

    def read(content, **layout):
        report = Report()
        found = read_quotes(file(content), "S", report=report, **layout)
        return rows(found), report

    return read


@pytest.fixture
def bars(file):
    """Return the bars and the report of a file with this content."""

    def read(content, **layout):
        report = Report()
        return rows(read_bars(file(content), "S", report=report, **layout)), report

    return read


# --- real files ---------------------------------------------------------------


@real_data
def test_every_tick_of_a_real_file_is_what_the_csv_module_reads():
    report = Report()
    found = rows(read_quotes(EURUSD, "EURUSD", report=report, **TICKS))
    expected = real_rows(EURUSD)
    assert len(found) == len(expected) == report.read == 9_500
    for quote, (stamp, bid, ask, volume) in zip(found, expected, strict=True):
        time = datetime.strptime(f"{stamp} -0500", "%Y%m%d %H%M%S%f %z")
        assert quote.time.ToDatetime(UTC) == time
        assert (quote.bid, quote.ask) == (float(bid), float(ask))
        assert quote.HasField("volume") and quote.volume == int(volume)
        assert not (quote.HasField("last") or quote.HasField("bid_size"))


@real_data
def test_the_first_real_tick_has_its_known_values():
    quote = next(read_quotes(EURUSD, "EURUSD", **TICKS))[0]
    assert quote.symbol == "EURUSD"
    assert quote.time.ToJsonString() == "2020-01-01T22:00:00.065Z"
    assert (quote.bid, quote.ask) == (1.121200, 1.121720)


@real_data
def test_every_bar_of_a_real_file_with_offsets_is_what_the_csv_module_reads():
    found = rows(read_bars(GBPUSD, "GBPUSD", {"time": "timestamp", **OHLC}))
    expected = real_rows(GBPUSD)[1:]
    assert len(found) == 30_117
    for bar, (stamp, *prices) in zip(found, expected, strict=True):
        assert bar.time.ToDatetime(UTC) == datetime.fromisoformat(stamp)
        assert [bar.open, bar.high, bar.low, bar.close] == [float(p) for p in prices]


@real_data
def test_every_bar_of_a_real_file_without_offsets_is_taken_as_utc():
    columns = {"time": "timestamp_utc", "volume": "volume", **OHLC}
    found = rows(read_bars(FUTURE, "6EH4", columns))
    expected = real_rows(FUTURE)[1:]
    assert len(found) == 29_996
    for bar, (stamp, *_, close, volume) in zip(found, expected, strict=True):
        assert bar.time.ToDatetime() == datetime.fromisoformat(stamp)
        assert (bar.close, bar.volume) == (float(close), int(volume))


@real_data
def test_a_parquet_file_gives_the_bars_of_the_csv_file_it_was_made_of(tmp_path):
    header, *body = real_rows(FUTURE)
    table = pyarrow.table(dict(zip(header, zip(*body, strict=True), strict=True)))
    schema = pyarrow.schema(
        [("timestamp_utc", pyarrow.timestamp("s"))]
        + [(name, pyarrow.float64()) for name in OHLC]
        + [("volume", pyarrow.int64())]
    )
    path = tmp_path / "bars.parquet"
    parquet.write_table(table.cast(schema), path)
    columns = {"time": "timestamp_utc", "volume": "volume", **OHLC}
    report = Report()
    found = rows(read_bars(path, "6EH4", columns, report=report))
    assert found == rows(read_bars(FUTURE, "6EH4", columns))
    assert (report.read, report.refused, report.progress) == (29_996, 0, 1.0)


@real_data
def test_rows_come_in_lists_of_at_most_a_thousand():
    sizes = [len(batch) for batch in read_quotes(EURUSD, "EURUSD", **TICKS)]
    assert sizes == [1_000] * 9 + [500]


@real_data
def test_the_progress_grows_to_the_whole_file():
    report = Report()
    seen = [
        report.progress for _ in read_quotes(EURUSD, "EURUSD", report=report, **TICKS)
    ]
    assert seen == sorted(seen) and 0 < seen[4] <= 1 and report.progress == 1.0


@real_data
def test_the_reason_for_a_wrong_format_of_times_comes_before_any_row():
    words = "none of the first 100 rows can be read; line 1: time '20200101 17"
    with pytest.raises(FileProblem, match=words):
        next(read_quotes(EURUSD, "EURUSD", TICKS["columns"], time_format="%Y-%m-%d"))


def test_a_long_file_is_read_in_bounded_memory(file):
    line = "2024-01-01T00:00:00,1.5,1.6\n"
    path = file("time,bid,ask\n" + line * 60_000)
    batches = read_quotes(path, "S")
    next(batches)
    tracemalloc.start()
    try:
        assert sum(map(len, batches)) == 59_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# --- cells --------------------------------------------------------------------


def test_columns_are_found_by_the_names_of_the_fields(quotes):
    found, _ = quotes("other,ask,time,bid\nx,2,2024-01-01,1\n")
    assert (found[0].bid, found[0].ask) == (1, 2)


def test_an_empty_cell_is_absent(quotes):
    found, _ = quotes("time,bid,ask,last\n2024-01-01,1.5,,  \n")
    assert found[0].bid == 1.5
    assert not (found[0].HasField("ask") or found[0].HasField("last"))


def test_a_nan_cell_is_absent(bars):
    found, report = bars("time,close,open,volume\n2024-01-01,1,NaN,nan\n")
    assert not (found[0].HasField("open") or found[0].HasField("volume"))
    assert report.refused == 0


def test_a_zero_is_present(quotes):
    found, _ = quotes("time,bid,volume\n2024-01-01,0,0\n")
    assert found[0].HasField("bid") and found[0].HasField("volume")


def test_a_whole_number_may_have_a_decimal_point(quotes):
    found, _ = quotes("time,bid,bid_size,volume\n2024-01-01,1,417.0,1e3\n")
    assert (found[0].bid_size, found[0].volume) == (417, 1_000)


def test_the_largest_volume_is_read_exactly(quotes):
    found, _ = quotes(f"time,bid,volume\n2024-01-01,1,{2**63 - 1}\n")
    assert found[0].volume == 2**63 - 1


def test_a_byte_order_mark_is_no_part_of_the_first_name(quotes):
    found, _ = quotes(b"\xef\xbb\xbftime,bid\n2024-01-01,1\n")
    assert len(found) == 1


def test_a_utf_16_file_is_read(quotes):
    found, _ = quotes("time,bid\n2024-01-01,1\n".encode("utf-16"))
    assert len(found) == 1


def test_blank_lines_are_passed_over_and_counted_in_line_numbers(quotes):
    found, report = quotes("\ntime,bid\n\n2024-01-01,1\n  \n2024-01-01,x\n")
    assert len(found) == 1
    assert report.refusals == [Refusal(6, "bid 'x' is not a number")]


def test_lines_may_end_as_on_windows(quotes):
    found, report = quotes("time,bid\r\n2024-01-01,1\r\n2024-01-02,2")
    assert [q.bid for q in found] == [1, 2] and report.refused == 0


def test_cells_may_be_quoted(quotes):
    found, _ = quotes('"time","no,te","bid"\n"2024-01-01","a,""b","1.5"\n')
    assert found[0].bid == 1.5


def test_a_stray_quote_spoils_its_own_line_only(quotes):
    found, report = quotes('time,bid\n2024-01-01,"1\n2024-01-02,2\n')
    assert [q.bid for q in found] == [2]
    assert report.refusals[0].line == 2
    assert "stray quote" in report.refusals[0].reason


def test_a_byte_that_is_no_utf_8_spoils_its_own_row_only(quotes):
    found, report = quotes(b"time,bid\n2024-01-01,\xff\n2024-01-02,2\n")
    assert [q.bid for q in found] == [2]
    assert [r.line for r in report.refusals] == [2]


@pytest.mark.parametrize("option", ["tab", "\\t", "\t"])
def test_the_delimiter_may_be_a_tab(quotes, option):
    found, _ = quotes("time\tbid\n2024-01-01\t1\n", delimiter=option)
    assert len(found) == 1


def test_the_close_is_the_middle_of_bid_and_ask_where_no_column_is(bars):
    found, report = bars(
        "time,bid,ask\n2024-01-01,1.25,1.75\n2024-01-02,1,\n2024-01-03,1e308,1e308\n"
    )
    assert [bar.close for bar in found] == [1.5]
    assert (found[0].bid, found[0].ask) == (1.25, 1.75)
    assert [r.line for r in report.refusals] == [3, 4]


def test_a_close_that_is_missing_is_not_made_up_where_a_column_has_it(bars):
    found, report = bars("time,close,bid,ask\n2024-01-01,,1,2\n2024-01-02,3,1,2\n")
    assert [bar.close for bar in found] == [3]
    assert report.refusals == [Refusal(2, "close is missing")]


def test_columns_by_number_mean_that_there_is_no_header(quotes):
    found, _ = quotes("2024-01-01,x,1\n", columns={"time": 0, "bid": "2"})
    assert found[0].bid == 1


def test_a_number_and_a_name_may_be_mixed_where_there_is_a_header(quotes):
    found, _ = quotes("when,bid\n2024-01-01,1\n", columns={"time": 0, "bid": "bid"})
    assert found[0].bid == 1


# --- refused rows -------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2024-01-01,1,2", "has 3 cells, not 4"),
        ("2024-01-01,1", "has 2 cells, not 4"),
        ("2024-01-01,1,2,3,4", "has 5 cells, not 4"),
        ("yesterday,1,2,3", "time 'yesterday' is not an ISO time: see --time-format"),
        ("2024-02-30,1,2,3", "time '2024-02-30' is not an ISO time: see --time-format"),
        (",1,2,3", "time is missing"),
        ("2024-01-01,,,3", "bid, ask and last are missing"),
        ("2024-01-01,nan,,3", "bid, ask and last are missing"),
        ('2024-01-01,"1,5",2,3', "bid '1,5' is not a number"),
        ("2024-01-01,1,inf,3", "ask 'inf' is not finite"),
        ("2024-01-01,1,-1e999,3", "ask '-1e999' is not finite"),
        ("2024-01-01,1,2,3.5", "bid_size '3.5' is not a whole number"),
        ("2024-01-01,1,2,-1", "bid_size '-1' lies outside 0 to 2,147,483,647"),
        ("2024-01-01,1,2,2147483648",
         "bid_size '2147483648' lies outside 0 to 2,147,483,647"),
        ("2024-01-01,1,2,1e400", "bid_size '1e400' is not finite"),
        ("1899-12-31T23:59:59.999999,1,2,3",
         "time '1899-12-31T23:59:59.999999' lies outside 1900-01-01 to one day "
         "from now"),
        ("0001-01-01,1,2,3",
         "time '0001-01-01' lies outside 1900-01-01 to one day from now"),
        ("9999-12-31,1,2,3",
         "time '9999-12-31' lies outside 1900-01-01 to one day from now"),
        ("2024-01-01,1,2," + "9" * 100,
         f"bid_size '{'9' * 57}...' lies outside 0 to 2,147,483,647"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_line_and_reason(quotes, row, reason):
    found, report = quotes(
        f"time,bid,ask,bid_size\n2024-01-01,1,2,3\n{row}\n2024-01-02,1,2,3\n"
    )
    assert len(found) == 2
    assert report.refusals == [Refusal(3, reason)]
    assert (report.read, report.refused) == (3, 1)


def test_half_a_line_at_the_end_is_refused(quotes):
    found, report = quotes("time,bid,ask\n2024-01-01,1,2\n2024-01-0")
    assert len(found) == 1
    assert report.refusals == [Refusal(3, "has 1 cells, not 3")]


def test_times_from_1900_to_one_day_ahead_are_taken(quotes):
    soon = datetime.now(UTC) + timedelta(hours=23)
    found, report = quotes(f"time,bid\n1900-01-01,1\n{soon.isoformat()},1\n")
    assert len(found) == 2 and report.refused == 0
    assert found[0].time.seconds == -2_208_988_800


def test_only_the_first_twenty_refusals_are_kept_and_all_are_counted(quotes):
    bad = "".join(f"2024-01-01,x{n}\n" for n in range(500))
    found, report = quotes(f"time,bid\n2024-01-01,1\n{bad}")
    assert len(found) == 1
    assert [r.line for r in report.refusals] == list(range(3, 23))
    assert (report.read, report.refused) == (501, 500)


def test_a_short_file_whose_rows_are_all_bad_is_told_line_by_line(quotes):
    found, report = quotes("time,bid\nx,1\ny,2\n")
    assert found == []
    assert [r.line for r in report.refusals] == [2, 3]


def test_a_cut_gzip_file_gives_what_is_there_and_says_so(tmp_path):
    lines = [f"2024-01-01,{random.random()}\n" for _ in range(5_000)]
    whole = gzip.compress(("time,bid\n" + "".join(lines)).encode())
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    report = Report()
    found = rows(read_quotes(path, "S", report=report))
    assert 1_000 < len(found) < 4_000
    assert [q.bid for q in found] == [float(line[11:]) for line in lines[: len(found)]]
    assert report.refused == 1
    assert report.refusals[0].line == len(found) + 2
    assert "nothing can be read from here on" in report.refusals[0].reason


def test_a_line_without_end_ends_the_reading(quotes):
    found, report = quotes("time,bid\n2024-01-01,1\n" + "9" * 200_000)
    assert len(found) == 1
    assert report.refused == 1 and "65,536" in report.refusals[0].reason


# --- refused files ------------------------------------------------------------


def problem(path, **layout):
    with pytest.raises(FileProblem) as raised:
        next(read_quotes(path, layout.pop("symbol", "S"), **layout))
    return str(raised.value)


@pytest.mark.parametrize(
    ("header", "columns", "words"),
    [
        ("when,bid", None, "no column is time; the file has the columns when, bid"),
        ("time,price", None, "no column is bid, ask or last"),
        ("time,bid", {"time": "time"}, "no column is bid, ask or last"),
        ("time,bid", {"time": "Time", "bid": "bid"}, "'Time' for time is not there"),
        ("time,bid,bid", {"time": "time", "bid": "bid"}, "'bid' for bid comes twice"),
        ("time,bid", {"time": "time", "close": "bid"}, "there is no field 'close'"),
        ("a,b", {"time": 0, "bid": 2}, "no column 2 for bid; the 2 columns"),
        ("20240101,1.5", None, "looks like a row"),
        ("20240101,1.5", {"time": 0}, "the file has 2 columns, numbered from 0"),
    ],
)
def test_a_wrong_mapping_is_refused_as_a_whole(file, header, columns, words):
    path = file(f"{header}\n2024-01-01,1\n")
    assert words in problem(path, columns=columns)


def test_a_bar_file_without_close_and_without_both_sides_is_refused(file):
    with pytest.raises(FileProblem, match="no column is close"):
        next(read_bars(file("time,bid\n2024-01-01,1\n"), "S"))


@pytest.mark.parametrize(
    ("delimiter", "words"),
    [
        (";", "found 1 column, `;` looks like the delimiter: pass --delimiter ';'"),
        ("|", "found 1 column, `|` looks like the delimiter: pass --delimiter '|'"),
        ("\t", "found 1 column, tab looks like the delimiter: pass --delimiter tab"),
    ],
)
def test_another_delimiter_is_recognised(file, delimiter, words):
    assert problem(file(f"time{delimiter}bid\n2024-01-01{delimiter}1\n")) == words


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_a_delimiter_that_cannot_be_one_is_refused(file, delimiter):
    assert "--delimiter" in problem(file("time,bid\n"), delimiter=delimiter)


@pytest.mark.parametrize(
    "content", ["", "\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)]
)
def test_an_empty_file_is_refused(file, content):
    assert problem(file(content)) == "the file is empty"


def test_a_file_with_a_header_alone_has_no_rows(quotes):
    assert quotes("time,bid\n") == ([], Report(progress=1.0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04....", "a zip archive or an Excel workbook"),
        (b"BZh91AY....", "compressed by bzip2"),
        (b"\xfd7zXZ\x00...", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd...", "compressed by zstd"),
        (b"\x00\x01,\x02\x03,", "not text"),
        (b"\x1f\x8b\x08broken", "damaged"),
        (b"PAR1 and no more", "damaged"),
    ],
)
def test_a_file_that_is_no_table_is_refused(file, content, words):
    assert words in problem(file(content))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert problem(tmp_path / "no.csv").endswith("no.csv: No such file or directory")


def test_a_folder_is_refused(tmp_path):
    assert "Is a directory" in problem(tmp_path)


@pytest.mark.parametrize("symbol", ["", " S", "S ", "a\nb", "x" * 65])
def test_a_symbol_that_the_server_would_refuse_is_refused(file, symbol):
    assert "symbol" in problem(file("time,bid\n"), symbol=symbol)


@pytest.mark.parametrize(
    "time_format", ["isoo", "%Q%Y", "%Y %Y", "%H:%M", "", "%Y-%m-%d%"]
)
def test_a_format_that_gives_no_times_is_refused(file, time_format):
    path = file("time,bid\n2024-01-01,1\n")
    assert "--time-format" in problem(path, time_format=time_format)


@pytest.mark.parametrize("tz", ["", "Mars/Phobos", "-24:00", "UTC5", "../../etc"])
def test_a_zone_that_does_not_exist_is_refused(file, tz):
    assert "--tz" in problem(file("time,bid\n2024-01-01,1\n"), tz=tz)


def test_columns_are_parsed_from_the_command_line():
    assert parse_columns("time=0, bid=Bid price ,ask=a=b") == {
        "time": "0",
        "bid": "Bid price",
        "ask": "a=b",
    }


@pytest.mark.parametrize("text", ["", "time", "time=", "=0", "time=0,", "bid=0,bid=1"])
def test_columns_that_make_no_mapping_are_refused(text):
    with pytest.raises(FileProblem, match="--columns"):
        parse_columns(text)


# --- times --------------------------------------------------------------------


def nanoseconds(moment):
    since = moment - EPOCH
    whole = since.days * 86_400 + since.seconds
    return whole * 10**9 + since.microseconds * 1_000


FIXED_WIDTH = [
    "%Y%m%d %H%M%S%f",
    "%Y%m%d%H%M%S",
    "%d.%m.%Y %H:%M:%S.%f",
    "%m/%d/%Y %H:%M",
    "%Y-%m-%dT%H:%M:%S.%fZ",
    "%H:%M:%S %d/%m/%Y",
    "%S.%f|%Y-%m-%d",
    "%Y%m%d",
]
OTHER = ["%d %b %Y %I:%M:%S %p", "%y%m%d %H%M", "%Y-%j %H", "%Y-%m-%d %H:%M:%S%z"]


@unhurried
@given(
    st.datetimes(FIRST, LAST),
    st.sampled_from(FIXED_WIDTH + OTHER),
)
def test_a_time_is_what_strptime_reads(moment, pattern):
    text = moment.replace(tzinfo=UTC).strftime(pattern)
    expected = datetime.strptime(text, pattern)  # noqa: DTZ007
    assert parse_time(text, pattern) == nanoseconds(
        expected if expected.tzinfo else expected.replace(tzinfo=UTC)
    )


@unhurried
@given(
    st.text("0123456789 :./-TZ", max_size=24),
    st.sampled_from([pattern for pattern in FIXED_WIDTH if "%f" not in pattern]),
)
def test_any_text_is_a_time_just_where_it_is_one_for_strptime(text, pattern):
    check_like_strptime(text, pattern)


@unhurried
@given(
    st.datetimes(FIRST, LAST),
    st.sampled_from(FIXED_WIDTH),
    st.integers(0, 7),  # a place in every text, lest a fraction grow beyond strptime
    st.text("0123456789 ", max_size=1),
)
def test_a_spoilt_time_is_a_time_just_where_it_is_one_for_strptime(
    moment, pattern, place, spoilt
):
    text = moment.strftime(pattern)
    check_like_strptime(text[:place] + spoilt + text[place + 1 :], pattern)


def check_like_strptime(text, pattern):
    try:
        expected = datetime.strptime(text, pattern).replace(tzinfo=UTC)
    except ValueError:
        with pytest.raises(ValueError, match="does not match"):
            parse_time(text, pattern)
    else:
        assert parse_time(text, pattern) == nanoseconds(expected)


@unhurried
@given(st.datetimes(timezones=st.timezones() | st.none()), st.sampled_from(" T"))
def test_an_iso_time_is_what_datetime_reads(moment, between):
    text = moment.isoformat(between)
    expected = datetime.fromisoformat(text)
    assert parse_time(text) == nanoseconds(
        expected if expected.tzinfo else expected.replace(tzinfo=UTC)
    )


@pytest.mark.parametrize(
    ("text", "time_format"),
    [
        ("20200101 170000065", "%Y%m%d %H%M%S%f"),
        ("2020-01-01T17:00:00.065", "iso"),
        ("20200101T170000.065", "iso"),
        ("2020-01-01 17:00:00,065", "iso"),
        ("2020-01-01T19:00:00.065+02:00", "iso"),
        ("2020-01-01T17:00:00.065Z", "iso"),
        ("1577898000.065", "s"),
        ("1577898000065", "ms"),
        ("1577898000065000", "us"),
        ("1577898000065000000", "ns"),
        ("1.577898000065E9", "s"),
        ("01 Jan 2020 05:00:00.065 PM", "%d %b %Y %I:%M:%S.%f %p"),
    ],
)
def test_one_moment_has_many_spellings(text, time_format):
    assert parse_time(text, time_format) == 1_577_898_000_065_000_000


@pytest.mark.parametrize(
    ("text", "time_format"),
    [
        ("2020-01-01T17:00:00.123456789", "iso"),
        ("2020-01-01T17:00:00.123456789Z", "iso"),
        ("2020-01-01T18:00:00,123456789+01:00", "iso"),
        ("20200101T170000.123456789", "iso"),
        ("20200101 170000123456789", "%Y%m%d %H%M%S%f"),
        ("123456789 2020-01-01 17", "%f %Y-%m-%d %H"),
        ("1577898000.123456789", "s"),
        ("1577898000123.456789", "ms"),
        ("1577898000123456.789", "us"),
    ],
)
def test_nanoseconds_are_kept(text, time_format):
    assert parse_time(text, time_format) == 1_577_898_000_123_456_789


@pytest.mark.parametrize(
    ("text", "extra"),
    [("2020-01-01T17:00:00.1234567", 700), ("2020-01-01T17:00:00.000000001", 1)],
)
def test_a_fraction_may_have_any_number_of_digits(text, extra):
    assert parse_time(text) % 1_000 == extra


@pytest.mark.parametrize(
    "text", ["", "1.2.3", "x", "NaN", "inf", "0x10", "1e999999999"]
)
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_what_is_no_number_is_no_time_since_1970(text, unit):
    with pytest.raises(ValueError):
        parse_time(text, unit)


@pytest.mark.parametrize(
    ("tz", "hours"),
    [
        ("UTC", 0), ("utc", 0), ("GMT", 0), ("Z", 0), ("-05:00", -5), ("+0530", 5.5),
        ("UTC-5", -5), ("utc+05:30", 5.5), ("GMT+1", 1), ("+9", 9), ("Etc/GMT+5", -5),
        ("America/New_York", -5), ("Asia/Kolkata", 5.5),
    ],
)  # fmt: skip
def test_a_time_without_zone_is_taken_in_the_zone_of_the_file(tz, hours):
    noon = nanoseconds(datetime(2020, 1, 1, 12, tzinfo=UTC))
    assert parse_time("2020-01-01T12:00", tz=tz) == noon - hours * 3_600 * 10**9


def test_a_named_zone_has_its_summer_time():
    summer = parse_time("2020-07-01T12:00", tz="America/New_York")
    assert summer == nanoseconds(datetime(2020, 7, 1, 16, tzinfo=UTC))


def test_a_time_with_an_offset_does_not_care_for_the_zone_of_the_file():
    assert parse_time("2020-01-01T12:00Z", tz="Asia/Tokyo") == parse_time(
        "2020-01-01T12:00"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2020-11-01T01:30", "comes twice in America/New_York"),
        ("2020-03-08T02:30", "comes never in America/New_York"),
    ],
)
def test_a_time_that_a_change_of_clocks_makes_unsure_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_time(text, tz="America/New_York")


@unhurried
@given(st.datetimes(FIRST, LAST))
def test_a_time_in_a_named_zone_is_what_zoneinfo_says(moment):
    here = moment.replace(tzinfo=ZoneInfo("Europe/Berlin"))
    if here.utcoffset() == here.replace(fold=1).utcoffset():
        found = parse_time(moment.isoformat(), tz="Europe/Berlin")
        assert found == nanoseconds(here.astimezone(UTC))


# --- Parquet ------------------------------------------------------------------


@pytest.fixture
def parquet_quotes(tmp_path):
    """Return the quotes and the report of a Parquet file with these columns."""

    def read(table, **layout):
        path, report = tmp_path / "rows.parquet", Report()
        parquet.write_table(pyarrow.table(table), path)
        return rows(read_quotes(path, "S", report=report, **layout)), report

    return read


STAMP = 1_577_898_000_123_456_789


@pytest.mark.parametrize(
    ("unit", "kept"), [("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1)]
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_parquet_timestamps_of_every_unit_keep_their_precision(
    parquet_quotes, unit, kept, zone
):
    times = pyarrow.array([STAMP // kept], pyarrow.timestamp(unit, zone))
    found, _ = parquet_quotes({"time": times, "bid": [1.0]}, tz="America/New_York")
    assert found[0].time.ToNanoseconds() == STAMP // kept * kept


def test_parquet_timestamps_without_zone_are_taken_in_the_zone_of_the_file(
    parquet_quotes,
):
    times = pyarrow.array([STAMP], pyarrow.timestamp("ns"))
    found, _ = parquet_quotes({"time": times, "bid": [1.0]}, tz="America/New_York")
    assert found[0].time.ToNanoseconds() == STAMP + 5 * 3_600 * 10**9


def test_parquet_dates_and_texts_are_times(parquet_quotes):
    for times in (
        [date(2024, 1, 2)],
        ["2024-01-02"],
        pyarrow.array(["2024-01-02"]).dictionary_encode(),
    ):
        found, _ = parquet_quotes({"time": times, "bid": [1.0]})
        assert found[0].time.ToDatetime(UTC) == datetime(2024, 1, 2, tzinfo=UTC)


def test_parquet_numbers_are_times_in_the_unit_that_is_given(parquet_quotes):
    found, _ = parquet_quotes({"time": [STAMP], "bid": [1.0]}, time_format="ns")
    assert found[0].time.ToNanoseconds() == STAMP


def test_parquet_numbers_without_a_unit_are_refused(parquet_quotes):
    with pytest.raises(FileProblem, match="--time-format s, ms, us or ns"):
        parquet_quotes({"time": [STAMP], "bid": [1.0]})


@unhurried
@given(bid=st.floats(allow_nan=False, allow_infinity=False))
def test_parquet_prices_are_read_bit_for_bit(tmp_path_factory, bid):
    path = tmp_path_factory.mktemp("bits") / "rows.parquet"
    parquet.write_table(pyarrow.table({"time": ["2024-01-01"], "bid": [bid]}), path)
    quote = rows(read_quotes(path, "S"))[0]
    assert quote.bid == bid and math.copysign(1, quote.bid) == math.copysign(1, bid)


def test_parquet_nulls_and_nans_are_absent(parquet_quotes):
    found, report = parquet_quotes(
        {
            "time": ["2024-01-01", "2024-01-02", None],
            "bid": [1.0, float("nan"), 1.0],
            "last": [None, 2.0, 2.0],
            "bid_size": pyarrow.array([None, 7, 8], pyarrow.int32()),
            "volume": [417.0, None, 1.0],
        }
    )
    assert [q.HasField("bid") for q in found] == [True, False]
    assert [q.HasField("bid_size") for q in found] == [False, True]
    assert found[0].volume == 417
    assert report.refusals == [Refusal(3, "time is missing")]
    assert report.unit == "row"


def test_parquet_decimals_and_narrow_floats_are_prices(parquet_quotes):
    bid = pyarrow.array(["1.10"]).cast(pyarrow.decimal128(10, 4))
    ask = pyarrow.array([1.1], pyarrow.float32())
    found, _ = parquet_quotes({"time": ["2024-01-01"], "bid": bid, "ask": ask})
    assert found[0].bid == 1.1
    assert found[0].ask == ask[0].as_py()


def test_bad_parquet_rows_are_refused_by_their_number(parquet_quotes):
    times = ["2024-01-01"] * 12_000
    bids = [1.0] * 12_000
    bids[11_000] = float("inf")
    found, report = parquet_quotes({"time": times, "bid": bids})
    assert len(found) == 11_999
    assert report.refusals == [Refusal(11_001, "bid 'inf' is not finite")]


def test_parquet_columns_go_by_name_or_number(parquet_quotes):
    data = {"when": ["2024-01-01"], "price": [1.5]}
    for columns in ({"time": "when", "last": "price"}, {"time": 0, "last": 1}):
        found, _ = parquet_quotes(data, columns=columns)
        assert found[0].last == 1.5


def test_one_parquet_column_may_be_two_fields(parquet_quotes):
    columns = {"time": "time", "bid": "price", "ask": "price"}
    found, _ = parquet_quotes({"time": ["2024-01-01"], "price": [1.5]}, columns=columns)
    assert (found[0].bid, found[0].ask) == (1.5, 1.5)


@pytest.mark.parametrize("column", [[[1.0]], [{"a": 1}], [date(2024, 1, 1)]])
def test_a_parquet_column_of_another_kind_is_refused(parquet_quotes, column):
    with pytest.raises(FileProblem, match="the column 'bid' for bid is"):
        parquet_quotes({"time": ["2024-01-01"], "bid": column})


def test_a_parquet_file_without_rows_has_no_quotes(parquet_quotes):
    empty = pyarrow.array([], pyarrow.float64())
    found, report = parquet_quotes(
        {"time": pyarrow.array([], pyarrow.timestamp("us")), "bid": empty}
    )
    assert (found, report.read) == ([], 0)
