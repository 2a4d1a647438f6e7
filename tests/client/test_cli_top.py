"""The command that shows how a server is doing."""

import asyncio
import json
import os
import pty
import signal
from asyncio.subprocess import PIPE
from contextlib import AsyncExitStack

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from quantplane import v1 as pb
from quantplane.tables.status import (
    Change,
    Sample,
    slowest,
    status_json,
    status_line,
    status_view,
)
from quantplane_server.main import serving
from tests.client.commands import cells, interrupt, invoke, lines_of
from tests.client.test_cli import COMMAND
from tests.market_data import until

START_S = 1_700_000_000
STATES = list(pb.SubscriptionState.values())


def lag(seconds):
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def stream(id=1, **fields):
    made = pb.Subscription(
        **{
            "id": id,
            "method": "quantplane.v1.MarketDataService/StreamQuotes",
            "username": "jane",
            "key_id": "402da5db-a466-4d46-a963-a56457bf68ce",
            "peer": "ipv6:%5B::1%5D:51234",
            "state": pb.SUBSCRIPTION_STATE_LIVE,
            "keys": 12,
        }
        | fields
    )
    made.start_time.FromSeconds(START_S)
    return made


def status(at_s=60, **fields):
    made = pb.GetServerStatusResponse(
        **{
            "server_id": "desk-1:4711",
            "streams": 1,
            "max_streams": 10_000,
            "backends": [
                pb.BackendStatus(name=name, up=True) for name in ("bus", "db")
            ],
            "pools": [pb.PoolStatus(name="db", size=3, in_use=2, max_size=10)],
            "bus": pb.BusStatus(unrecorded_bytes=1_500_000, recorder_lag=lag(0.25)),
        }
        | fields
    )
    made.start_time.FromSeconds(START_S)
    made.server_time.FromSeconds(START_S + at_s)
    return made


def change(streams=(), before=None, **fields):
    return Change(before, Sample(status(**fields), streams))


def drawn(shown, width=160, height=None, silent=""):
    console = Console(width=width, height=height or 100, color_system=None)
    view = status_view(shown, "desk:50051", width, height, silent)
    with console.capture() as captured:
        console.print(view)
    return captured.get().splitlines()


# --- What is shown ------------------------------------------------------------


def test_a_stream_is_a_row_with_whose_it_is_and_how_far_behind():
    slow = stream(
        state=pb.SUBSCRIPTION_STATE_STALLED, lag=lag(2.5), pending_bytes=4_200_000,
        pending_entries=17, conflated_count=1_234, responses=20, acknowledged=4,
        max_unacknowledged=16,
    )  # fmt: skip
    *_, head, _, row = drawn(change([slow]))
    assert dict(zip(cells(head), cells(row), strict=True)) == {
        "id": "1", "method": "StreamQuotes", "who": "jane", "key": "402da5db",
        "from": "[::1]:51234", "state": "stalled", "keys": "12", "lag": "2.5 s",
        "pending": "4.2 MB", "entries": "17", "conflated": "1,234", "out": "-",
        "sent": "-", "unread": "16/16", "open": "60 s",
    }  # fmt: skip


def test_streams_come_with_the_slowest_first():
    streams = [
        stream(1), stream(2, lag=lag(3)), stream(3, pending_bytes=10),
        stream(4, lag=lag(900)), stream(5),
    ]  # fmt: skip
    ids = [each.id for each in slowest(Sample(status(), streams))]
    assert ids == [4, 2, 3, 1, 5]


def test_rates_are_of_what_grew_between_two_samples():
    first = Sample(
        status(10, quotes_accepted=100, responses=50, response_bytes=1_000),
        [stream(1, responses=10, response_bytes=100)],
    )
    shown = change(
        [stream(1, responses=30, response_bytes=10_100), stream(2, responses=6)],
        before=first, at_s=12, quotes_accepted=2_500, responses=50,
        response_bytes=3_000,
    )  # fmt: skip
    assert shown.rate("quotes_accepted") == 1_200
    assert shown.rate("responses") == 0
    assert shown.rates_of(shown.now.subscriptions[0]) == (10, 5_000)
    assert shown.rates_of(shown.now.subscriptions[1]) == (3, 0)
    text = "\n".join(drawn(shown))
    for figure in ("1,200/s", "1.0 kB/s", "10/s", "5.0 kB/s"):
        assert figure in text


def test_there_are_no_rates_between_two_processes():
    other = Sample(status(10, server_id="desk-1:4712"), [stream()])
    shown = change([stream()], before=other)
    assert shown.rate("responses") is None
    assert shown.rates_of(stream()) == (None, None)


def test_what_is_wrong_is_said_in_words():
    down = pb.BackendStatus(name="db", problem="all 10 connections are in use")
    down.change_time.FromSeconds(START_S + 40)
    shown = change(backends=[down])
    assert "db, for 20 s: all 10 connections are in use" in drawn(shown)
    assert status_line(shown).endswith("down: db")
    assert status_line(change()).endswith("all up")


def test_a_server_that_does_not_answer_is_shown_as_it_was():
    (title, *_) = drawn(change([stream()]), silent="does not answer")
    assert "does not answer" in title


def test_a_feed_that_is_held_back_shows_why():
    held = stream(
        method="quantplane.v1.MarketDataService/PublishQuotes", feed="demo",
        state=pb.SUBSCRIPTION_STATE_HELD, hold=pb.HOLD_REASON_BUS_FULL,
    )  # fmt: skip
    *_, row = drawn(change([held]))
    assert cells(row)[1] == "PublishQuotes demo"
    assert "held bus-full" in cells(row)


def test_what_a_terminal_would_obey_is_not_printed():
    nasty = stream(username="\x1b[2J", feed="\x07")
    assert not {"\x1b", "\x07"} & set("".join(drawn(change([nasty]))))


@given(
    st.integers(30, 200), st.integers(14, 60), st.integers(0, 80),
    st.sampled_from(STATES),
)  # fmt: skip
def test_the_screen_is_never_left(width, height, count, state):
    streams = [stream(n, state=state, lag=lag(n)) for n in range(count)]
    lines = drawn(change(streams), width, height)
    assert all(len(line) <= width for line in lines)
    if width >= 60:
        assert len(lines) <= height


def test_json_has_the_status_the_rates_and_the_streams():
    told = json.loads(status_json(change([stream(7)])))
    assert told["status"]["server_id"] == "desk-1:4711"
    assert told["per_second"]["quotes_accepted"] is None
    assert [each["id"] for each in told["subscriptions"]] == ["7"]


# --- With a server ------------------------------------------------------------


@pytest.fixture
async def watched(client):
    """An open stream."""
    call = client.order.WatchOrders(pb.WatchOrdersRequest())
    await until(aiter(call), "snapshot_complete")
    yield
    call.cancel()


async def test_once_shows_the_server_and_its_streams(server, call, watched):
    title, *lines = await call("top", "--once")
    assert server.target in title
    assert cells(lines[-1])[1:3] == ["WatchOrders", "test"]


async def test_once_as_json_has_rates(call, watched):
    (line,) = await call("top", "--once", "--json")
    told = json.loads(line)
    assert told["status"]["streams"] == 1
    assert told["per_second"]["responses"] == 0
    (only,) = told["subscriptions"]
    assert only["method"] == "quantplane.v1.OrderService/WatchOrders"


async def test_streams_are_shown_however_many_pages_these_are(
    server, client, call, monkeypatch
):
    monkeypatch.setattr("quantplane_server.admin.service.MAX_PAGE", 2)
    calls = [client.order.WatchOrders(pb.WatchOrdersRequest()) for _ in range(5)]
    for each in calls:
        await until(aiter(each), "snapshot_complete")
    (line,) = await call("top", "--once", "--json")
    assert len(json.loads(line)["subscriptions"]) == 5
    for each in calls:
        each.cancel()


async def test_who_may_not_see_it_is_told(server, monkeypatch):
    monkeypatch.setenv("QUANTPLANE_API_KEY", "qp_" + 43 * "x")
    failed = await invoke(server.target, "top", "--once")
    assert failed.exit_code == 1
    assert "QUANTPLANE_API_KEY" in failed.stderr


def command(target, **more):
    return {
        "env": {**os.environ, "QUANTPLANE_TARGET": target, **more.pop("env", {})},
        **more,
    }


async def test_in_a_pipe_a_line_comes_each_second_and_a_server_may_go(settings):
    async with AsyncExitStack() as stack:
        async with serving(settings) as target:
            top = await asyncio.create_subprocess_exec(
                COMMAND, "top", **command(target, stdout=PIPE, stderr=PIPE)
            )
            stack.callback(_kill, top)
            for line in await lines_of(top, 2):
                assert cells(line)[-1] == "all up"
        async with asyncio.timeout(60):
            while b"does not answer" not in await top.stderr.readline():
                pass
        again = settings.model_copy(update={"listen": target})
        async with serving(again):
            # One may have been on its way when the server went.
            await lines_of(top, 3)
            await interrupt(top)


def _kill(process):
    if process.returncode is None:
        process.kill()


async def test_a_terminal_is_drawn_on_again_and_again(server, watched):
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    top = await asyncio.create_subprocess_exec(
        COMMAND,
        "top",
        **command(server.target, stdout=theirs, stderr=theirs, env=terminal),
    )
    os.close(theirs)
    seen = b""
    while seen.count(b"WatchOrders") < 2:
        seen += await asyncio.to_thread(os.read, ours, 65_536)
    top.send_signal(signal.SIGINT)
    assert await top.wait() == 130
    os.close(ours)
    assert b"\x1b[?1049h" in seen  # a screen of its own
