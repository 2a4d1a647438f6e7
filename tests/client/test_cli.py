import asyncio
import csv
import json
import os
import pty
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import grpc
import pytest

from quantplane import Client
from quantplane import v1 as pb
from quantplane.cli import Pace, Tally, store_bars
from quantplane.errors import reason_of
from quantplane.files import Report
from quantplane.publish import QuotePublisher
from quantplane.tables import event_lines
from tests.client import refuse, serving, silence, until
from tests.client.commands import invoke
from tests.client.test_files import EURUSD, FUTURE, real_data, real_rows
from tests.client.test_publish import told

COMMAND = Path(sys.executable).with_name("quantplane")
Code = grpc.StatusCode
NOWHERE = "127.0.0.1:1"
TICKS = (
    "--columns", "time=0,bid=1,ask=2,volume=3",
    "--time-format", "%Y%m%d %H%M%S%f", "--tz", "-05:00",
)  # fmt: skip
FUTURE_COLUMNS = (
    "--columns",
    "time=timestamp_utc,open=open,high=high,low=low,close=close,volume=volume",
)


class Output:
    """What a command has printed and how it ended."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out.decode(), err.decode()
        self.lines = self.out.splitlines()


@asynccontextmanager
async def running(target, *arguments):
    """Run the command; kill it if it outlives the block."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, *map(str, arguments), stdout=PIPE, stderr=PIPE,
        env={**os.environ, "QUANTPLANE_TARGET": target},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(target, *arguments):
    async with running(target, *arguments) as process:
        out, err = await process.communicate()
    assert "Traceback" not in err.decode()
    return Output(process.returncode, out, err)


@pytest.fixture
def symbol():
    return f"S-{uuid4().hex[:12]}"


@pytest.fixture
def file(tmp_path):
    def write(content, name="rows.csv"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


def minutes(count, header="time,close"):
    """Return a file of one bar a minute, of 2024-01-01."""
    rows = (
        f"2024-01-01T{minute // 60:02}:{minute % 60:02},{minute}.25\n"
        for minute in range(count)
    )
    return f"{header}\n" + "".join(rows)


# --- without a server ---------------------------------------------------------


async def test_help_names_every_command():
    shown = await run(NOWHERE, "--help")
    assert shown.code == 0
    for command in ("import", "replay", "quotes", "bars", "symbols"):
        assert f"  {command} " in shown.out


@pytest.mark.parametrize(
    "arguments",
    [("symbols",), ("bars", "ES"), ("quotes", "watch", "ES")],
    ids=lambda arguments: arguments[0],
)
async def test_a_server_that_does_not_answer_is_told_with_its_cure(arguments):
    failed = await run(NOWHERE, *arguments)
    assert failed.code == 1
    assert failed.out == ""
    assert failed.err == (
        "quantplane: no server answers at 127.0.0.1:1; "
        "start one with `quantplane-server up`, or set --target\n"
    )


async def test_the_target_may_be_an_option(file):
    failed = await run("", "symbols", "--target", NOWHERE)
    assert "no server answers at 127.0.0.1:1" in failed.err


async def test_rows_older_than_the_retention_are_stored_with_a_warning(
    server, symbol, file
):
    old = file("time,close\n1999-12-31,1.5\n2024-01-01,2.5\n")
    done = await run(server.target, "import", "bars", old, "--symbol", symbol)
    assert done.code == 0
    assert "2 stored" in done.out
    assert "removes rows of market_data" in done.err and "docs/schema.md" in done.err
    young = file("time,close\n2024-01-01,2.5\n")
    done = await run(server.target, "import", "bars", young, "--symbol", symbol)
    assert not done.err


async def test_a_file_that_can_not_be_used_is_told_before_a_server_is_sought(file):
    path = file("when;close\n2024-01-01;1\n")
    failed = await run(NOWHERE, "import", "bars", path, "--symbol", "ES")
    assert failed.code == 2
    assert failed.err == (
        "quantplane: found 1 column, `;` looks like the delimiter: "
        "pass --delimiter ';'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "bars", "no.csv", "--symbol", "ES"), "No such file"),
        (("import", "bars", __file__, "--symbol", "E", "--tz", "Mars"), "no column"),
        (("import", "quotes", __file__, "--symbol", "E", "--columns", "x"), "FIELD="),
        (("import", "bars", __file__), "--symbol"),
        (("replay", __file__, "--symbol", "E", "--speed", "-1"), "--speed"),
        (("bars", "ES", "--start", "soon"), "'soon' is not an ISO time"),
        (("bars", "ES", "--interval", "1 minute"), "'1 minute' is not a length"),
        (("bars", "ES", "--csv", "--json"), "use one of --csv and --json"),
        (("quotes", "watch"), "symbols"),
        (("quotes", "watch", "ES", "--count", "0"), "--count"),
    ],
)
async def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = await run(NOWHERE, *arguments)
    assert failed.code == 2
    assert words.lower() in failed.err.lower()


def test_a_missing_package_is_told_with_its_cure():
    code = "import sys; sys.modules['typer'] = None; import quantplane.cli"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "the command quantplane needs typer: pip install 'quantplane[cli]'\n"
    )


# --- importing ----------------------------------------------------------------


@real_data
async def test_a_real_file_of_bars_is_stored_bit_for_bit(server, symbol):
    stored = await run(
        server.target, "import", "bars", FUTURE, "--symbol", symbol, *FUTURE_COLUMNS
    )
    assert stored.out == "29,996 rows read, 29,996 stored, 0 refused\n"
    assert (stored.code, stored.err) == (0, "")
    listed = await run(server.target, "bars", symbol, "--csv")
    rows = list(csv.DictReader(listed.lines))
    for row, expected in zip(rows, real_rows(FUTURE)[1:], strict=True):
        time = datetime.fromisoformat(expected[0]).replace(tzinfo=UTC)
        assert datetime.fromisoformat(row["time"]) == time
        prices = [float(row[name]) for name in ("open", "high", "low", "close")]
        assert prices == [float(price) for price in expected[1:5]]
        assert row["volume"] == expected[5]
        assert row["vwap"] == row["bid"] == row["ask_size"] == ""


@real_data
async def test_a_real_file_of_quotes_is_stored_and_watched_bit_for_bit(server, symbol):
    stored = await run(
        server.target, "import", "quotes", EURUSD, "--symbol", symbol, *TICKS
    )
    assert stored.out == "9,500 rows read, 9,500 stored, 0 refused\n"
    assert stored.code == 0
    assert len(stored.err.splitlines()) <= 1  # they may be older than the retention
    watched = await run(
        server.target, "quotes", "watch", symbol, "--start", "2020-01-01",
        "--lossless", "--json", "--count", 9_500,
    )  # fmt: skip
    assert watched.code == 0
    quotes = [json.loads(line) for line in watched.lines]
    assert quotes[0] == {
        "symbol": symbol,
        "time": "2020-01-01T22:00:00.065000000Z",
        "bid": 1.1212,
        "ask": 1.12172,
        "bid_size": None,
        "ask_size": None,
        "last": None,
        "volume": 0,
    }
    expected = [(float(bid), float(ask)) for _, bid, ask, _ in real_rows(EURUSD)]
    assert [(quote["bid"], quote["ask"]) for quote in quotes] == expected


async def test_refused_rows_are_listed_and_the_others_stored(server, symbol, file):
    path = file("time,close\n2024-01-01,1\n2024-01-02,x\n2024-01-03\n2024-01-04,4\n")
    stored = await run(server.target, "import", "bars", path, "--symbol", symbol)
    assert stored.code == 1
    assert stored.out == "4 rows read, 2 stored, 2 refused\n"
    assert stored.err == (
        "line 3: close 'x' is not a number\nline 4: has 1 cells, not 2\n"
    )
    listed = await run(server.target, "bars", symbol, "--json")
    assert [json.loads(line)["close"] for line in listed.lines] == [1, 4]


async def test_only_twenty_refusals_are_listed_and_all_are_counted(
    server, symbol, file
):
    path = file(minutes(1) + "x,1\n" * 50)
    stored = await run(server.target, "import", "bars", path, "--symbol", symbol)
    assert stored.out == "51 rows read, 1 stored, 50 refused\n"
    assert len(stored.err.splitlines()) == 21
    assert stored.err.endswith("... and 30 more\n")


async def test_an_import_done_again_changes_nothing(server, symbol, file):
    path = file(minutes(100))
    for _ in range(2):
        stored = await run(server.target, "import", "bars", path, "--symbol", symbol)
        assert stored.out == "100 rows read, 100 stored, 0 refused\n"
    listed = await run(server.target, "bars", symbol, "--csv")
    assert len(listed.lines) == 101


async def test_what_bars_prints_as_csv_can_be_imported(server, symbol, file):
    path = file(minutes(50))
    await run(server.target, "import", "bars", path, "--symbol", symbol)
    listed = await run(server.target, "bars", symbol, "--csv")
    again = file(listed.out, "again.csv")
    stored = await run(server.target, "import", "bars", again, "--symbol", symbol + "2")
    assert stored.code == 0
    copied = await run(server.target, "bars", symbol + "2", "--csv")
    assert copied.out == listed.out.replace(symbol, symbol + "2")


async def test_a_file_without_rows_stores_nothing(server, symbol, file):
    stored = await run(
        server.target, "import", "quotes", file("time,bid\n"), "--symbol", symbol
    )
    assert (stored.code, stored.out) == (0, "0 rows read, 0 stored, 0 refused\n")


async def test_an_import_fails_whose_rows_the_bus_has_lost(monkeypatch, file):
    monkeypatch.setattr(QuotePublisher, "MAX_KEPT_BATCHES", 0)

    async def answers(request, context):
        yield pb.ListSymbolsResponse()

    async def knows_nothing_of_it(requests, context):
        await anext(requests)
        yield pb.PublishQuotesResponse(next_batch=2)
        await silence()

    scripts = answers, told(1, accepted_through=1), knows_nothing_of_it
    async with serving(*scripts) as (client, _):
        command = ("import", "quotes", file("time,bid\n2024-01-01,1\n"))
        stored = await invoke(client.target, *command, "--symbol", "S")
    assert "1 rows read, 0 stored, 0 refused, 1 not stored" in stored.output
    assert stored.exit_code == 1


# --- bars over a broken connection --------------------------------------------


def batches(count):
    time = {"seconds": 1_700_000_000}
    bars = [pb.Bar(symbol="S", time=time, close=float(row)) for row in range(count)]
    return iter([[bar] for bar in bars])


async def test_bars_that_may_not_be_stored_are_sent_again():
    received = []

    async def cut(requests, context):
        async for request in requests:
            if request.batch == 4:
                yield pb.PublishBarsResponse(durable_through=2)
                await asyncio.sleep(0.1)  # or the client may not get to read it
                return

    async def rest(requests, context):
        async for request in requests:
            received.append((request.batch, request.bars[0].close))
            yield pb.PublishBarsResponse(durable_through=request.batch)

    tally = Tally(Report())
    async with serving(cut, rest) as (client, _):
        await store_bars(client, batches(30), tally)
    assert received == [(batch, float(batch + 1)) for batch in range(1, 29)]
    assert tally.done == 30


async def test_no_more_than_eight_batches_of_bars_wait_for_their_answer():
    seen = []

    async def silent(requests, context):
        async for request in requests:
            seen.append(request.batch)
        yield pb.PublishBarsResponse()

    async with serving(silent) as (client, _):
        storing = asyncio.create_task(store_bars(client, batches(30), Tally(Report())))
        await until(lambda: len(seen) == 8)
        await asyncio.sleep(0.1)
        storing.cancel()
    assert seen == list(range(1, 9))


async def test_bars_that_the_server_refuses_end_the_import_with_its_reason():
    async def refusing(requests, context):
        async for request in requests:
            if any(bar.close == 5 for bar in request.bars):
                await refuse(context, Code.INVALID_ARGUMENT, "INVALID_FIELD")
            yield pb.PublishBarsResponse(durable_through=request.batch)

    tally = Tally(Report())
    async with serving(*[refusing] * 10) as (client, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await store_bars(client, batches(30), tally)
    assert reason_of(raised.value) == "INVALID_FIELD"
    assert tally.done <= 5


async def test_an_import_gives_up_a_server_that_stays_away(monkeypatch):
    monkeypatch.setattr("quantplane.follow.Backoff.next", lambda backoff: 0)

    async def away(requests, context):
        await refuse(context, Code.UNAVAILABLE)
        yield

    async with serving(*[away] * 10) as (client, server):
        with pytest.raises(grpc.aio.AioRpcError):
            await store_bars(client, batches(3), Tally(Report()))
        assert len(server.requests) == 8


# --- replaying ----------------------------------------------------------------


@real_data
async def test_a_replay_without_pace_publishes_all_quotes_with_their_times(
    server, symbol
):
    watch = ("quotes", "watch", symbol, "--lossless", "--json", "--count", 9_500)
    async with running(server.target, *watch) as watching:
        said = await watching.stderr.readline()
        assert said.decode() == (
            f"{symbol}: nothing was published yet; is the symbol right?\n"
        )
        replayed = await run(
            server.target, "replay", EURUSD, "--symbol", symbol, "--speed", 0, *TICKS
        )
        assert replayed.out == "9,500 rows read, 9,500 published, 0 refused\n"
        out, _ = await watching.communicate()
    times = [json.loads(line)["time"] for line in out.splitlines()]
    expected = [
        datetime.strptime(f"{stamp} -0500", "%Y%m%d %H%M%S%f %z")
        for stamp, *_ in real_rows(EURUSD)
    ]
    assert [datetime.fromisoformat(time) for time in times] == expected


async def test_a_replay_keeps_the_pace_of_the_file(server, symbol, file):
    path = file("time,bid\n" + "".join(f"{n * 5},{n}\n" for n in range(5)))
    loop = asyncio.get_running_loop()
    replay = (
        server.target, "replay", path, "--symbol", symbol, "--time-format", "s"
    )  # fmt: skip
    began = loop.time()
    await run(*replay, "--speed", 0)
    at_once = loop.time() - began
    began = loop.time()
    await run(*replay, "--speed", 10)
    assert 1.5 < loop.time() - began - at_once < 4  # 20 s of quotes


async def test_a_replay_that_is_interrupted_says_how_far_it_came(server, symbol, file):
    path = file(
        "time,bid\n2024-01-01T00:00,1\n2024-01-01T00:00,2\n2024-01-01T01:00,3\n"
    )
    watch = running(server.target, "quotes", "watch", symbol, "--lossless")
    replay = running(server.target, "replay", path, "--symbol", symbol)
    async with watch as watching:
        await watching.stderr.readline()
        async with replay as replaying:
            for _ in range(2):
                await watching.stdout.readline()
            replaying.send_signal(signal.SIGINT)
            out, err = await replaying.communicate()
        watching.send_signal(signal.SIGINT)
        assert await watching.communicate() == (b"", b"")
    assert out.decode() == "3 rows read, 2 published, 0 refused, 1 not published\n"
    assert (err, replaying.returncode) == (b"", 130)
    assert watching.returncode == 130


def quote(seconds):
    return pb.Quote(symbol="S", time={"seconds": seconds}, bid=1.0)


def test_quotes_are_due_in_the_time_between_them_by_the_speed():
    pace = Pace(100.0)
    quotes = [quote(second) for second in (1_000, 990, 1_000, 1_100, 1_200)]
    assert pace.due(quotes) == 3
    assert 0.9 < pace.delay_s(quotes[3]) < 1
    assert 1.9 < pace.delay_s(quotes[4]) < 2


def test_without_pace_all_quotes_are_due():
    assert Pace(0).due([quote(1_000), quote(2_000)]) == 2


# --- watching and listing -----------------------------------------------------


async def published(server, *quotes):
    async with Client(server.target) as client, client.publish_quotes() as publisher:
        await publisher.send(quotes)
        await publisher.durable()


async def test_a_quote_is_one_line_for_people(server, symbol):
    full = pb.Quote(
        symbol=symbol, time={"seconds": 1_700_000_000, "nanos": 123_456_789},
        bid=0.1 + 0.2, ask=2.5, bid_size=100, ask_size=7, last=2.0, volume=3,
    )  # fmt: skip
    await published(server, full)
    shown = await run(server.target, "quotes", "watch", symbol, "--count", 1)
    assert shown.lines[0].split() == [
        "2023-11-14T22:13:20.123456789Z", symbol, "0.30000000000000004", "2.5",
        "100", "x", "7", "2.0",
    ]  # fmt: skip


async def test_a_json_quote_has_its_nanoseconds_and_its_exact_prices(server, symbol):
    time = {"seconds": 1_700_000_000, "nanos": 7}
    await published(
        server, pb.Quote(symbol=symbol, time=time, bid=0.1 + 0.2, last=-0.0)
    )
    shown = await run(server.target, "quotes", "watch", symbol, "--json", "--count", 1)
    found = json.loads(shown.lines[0])
    assert found["time"] == "2023-11-14T22:13:20.000000007Z"
    assert found["bid"] == 0.1 + 0.2 and found["ask"] is None
    assert str(found["last"]) == "-0.0"


async def test_a_reader_that_goes_away_ends_the_watch_quietly(server, symbol):
    quotes = [
        pb.Quote(symbol=symbol, time={"seconds": 1_700_000_000 + n}, bid=1.0)
        for n in range(2_000)
    ]
    await published(server, *quotes)
    command = f"{COMMAND} quotes watch {symbol} --start 2023-01-01 | head -1"
    process = await asyncio.create_subprocess_shell(
        f"{command}; exit ${{PIPESTATUS[0]}}",
        executable="/bin/bash", stdout=PIPE, stderr=PIPE,
        env={**os.environ, "QUANTPLANE_TARGET": server.target},
    )  # fmt: skip
    out, err = await process.communicate()
    assert out.count(b"\n") == 1
    assert (err, process.returncode) == (b"", 0)


NOTHING_YET = "nothing was published yet; is the symbol right?"


@asynccontextmanager
async def watching_latency(server, symbol, *options):
    """Watch the latency of a symbol that begins to be quoted."""
    watch = ("quotes", "watch", symbol, "--latency", *options)
    async with running(server.target, *watch) as process:
        said = await process.stderr.readline()
        assert said.decode() == f"{symbol}: {NOTHING_YET}\n"
        time = {"seconds": 1_700_000_000}
        await published(server, pb.Quote(symbol=symbol, time=time, bid=1.0))
        yield process


async def test_how_long_quotes_take_is_a_table_instead_of_them(server, symbol):
    async with watching_latency(server, symbol, "--count", 1) as process:
        out, err = await process.communicate()
    assert (err, process.returncode) == (b"", 0)
    rows = [line.split() for line in out.decode().splitlines()]
    legs = ["ms", "feed", "publish", "serve", "deliver", "total"]
    assert [row[0] for row in rows] == legs
    assert [row[-2:] for row in rows[1:]] == 5 * [["1", "0"]]


async def test_how_long_quotes_take_is_told_in_json(server, symbol):
    async with watching_latency(server, symbol, "--json", "--count", 1) as process:
        out, _ = await process.communicate()
    told = json.loads(out)
    assert list(told) == ["feed", "publish", "serve", "deliver", "total"]
    assert 0 < told["publish"]["p50_s"] < told["feed"]["p50_s"]


async def test_a_watch_of_latency_that_is_interrupted_tells_it(server, symbol):
    async with watching_latency(server, symbol) as process:
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert out.decode().split()[:2] == ["ms", "min"]
    assert (err, process.returncode) == (b"", 130)


async def test_how_long_quotes_take_is_drawn_in_place_on_a_terminal(server, symbol):
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    watching = await asyncio.create_subprocess_exec(
        COMMAND, "quotes", "watch", symbol, "--latency", stdout=theirs, stderr=theirs,
        env={**os.environ, "QUANTPLANE_TARGET": server.target, **terminal},
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    while drawn.count(b"negative") < 2:  # drawn again
        drawn += await asyncio.to_thread(os.read, ours, 65_536)
    watching.send_signal(signal.SIGINT)
    assert await watching.wait() == 130
    os.close(ours)
    assert b"\x1b[?25l" in drawn  # the cursor is hidden


def test_a_gap_is_told_in_one_line():
    gap = pb.Gap(
        start_time={"seconds": 1_700_000_000},
        end_time={"seconds": 1_700_000_001, "nanos": 5},
        cause=pb.GAP_CAUSE_BUS_REBUILT,
    )
    assert list(event_lines(pb.StreamEvent(gap=gap))) == [
        "gap from 2023-11-14T22:13:20.000000000Z to 2023-11-14T22:13:21.000000005Z: "
        "bus_rebuilt"
    ]


def test_an_event_that_needs_nobody_is_not_told():
    event = pb.StreamEvent(snapshot_complete=pb.SnapshotComplete())
    assert list(event_lines(event)) == []


@pytest.fixture
async def hundred_minutes(server, symbol, file):
    path = file(minutes(100))
    await run(server.target, "import", "bars", path, "--symbol", symbol)


async def test_a_long_table_shows_its_ends(server, symbol, hundred_minutes):
    shown = await run(server.target, "bars", symbol)
    closes = [line.split()[1] for line in shown.lines if line.startswith(" 2024-")]
    ends = [*range(20), *range(80, 100)]
    assert closes == [f"{minute}.25" for minute in ends]
    assert "60 of 100 bars are left out" in shown.out


async def test_a_table_has_no_empty_columns(server, symbol, hundred_minutes):
    shown = await run(server.target, "bars", symbol, "--end", "2024-01-01T00:40")
    assert shown.lines[0].split() == ["time", "close"]
    assert "left out" not in shown.out


async def test_bars_may_be_of_any_length_and_part(server, symbol, hundred_minutes):
    shown = await run(
        server.target, "bars", symbol, "--json", "--interval", "5m",
        "--start", "2024-01-01T00:10", "--end", "2024-01-01T01:20+00:30",
    )  # fmt: skip
    bars = [json.loads(line) for line in shown.lines]
    assert [bar["close"] for bar in bars] == [14.25, 19.25, 24.25, 29.25, 34.25, 39.25,
                                              44.25, 49.25]  # fmt: skip
    assert bars[0]["time"] == "2024-01-01T00:10:00.000000Z"


async def test_a_time_without_bars_is_told(server, symbol, hundred_minutes):
    shown = await run(server.target, "bars", symbol, "--csv", "--start", "2024-01-02")
    assert shown.code == 0
    assert shown.lines == [
        "symbol,time,open,high,low,close,volume,vwap,bid,ask,bid_size,ask_size"
    ]
    assert shown.err == f"{symbol} has no bars in that time\n"


async def test_an_unknown_symbol_is_told_in_one_line(server, symbol):
    failed = await run(server.target, "bars", symbol, "--csv")
    assert failed.code == 1 and failed.out == ""
    assert failed.err.startswith("quantplane: UNKNOWN_SYMBOL: ")
    assert failed.err.count("\n") == 1


async def test_symbols_are_listed_with_their_first_and_last_time(
    server, symbol, hundred_minutes
):
    shown = await run(server.target, "symbols")
    line = next(line for line in shown.lines if symbol in line)
    assert line.split() == [symbol, "2024-01-01T00:00:00Z", "2024-01-01T01:39:00Z"]


async def test_a_symbol_with_brackets_is_shown_as_it_is(server, symbol, file):
    odd = f"{symbol}[bold]"
    await run(server.target, "import", "bars", file(minutes(1)), "--symbol", odd)
    shown = await run(server.target, "symbols")
    assert odd in shown.out
