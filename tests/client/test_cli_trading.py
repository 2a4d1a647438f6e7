"""The commands of signals, orders and the portfolio."""

import asyncio
import os
import pty
import signal
from contextlib import asynccontextmanager

import asyncpg
import grpc
import pytest
from google.protobuf.json_format import Parse
from typer.testing import CliRunner

from quantplane import v1 as pb
from quantplane.cli import app
from quantplane.ids import new_id
from tests.client.commands import WAIT_S, cells, interrupt, invoke, lines_of
from tests.client.test_cli import COMMAND, NOWHERE, running
from tests.orders import (
    BUY,
    MARKET,
    STOP,
    STOP_LIMIT,
    UNKNOWN_ID,
    fill,
    get,
    open_order,
    report,
    submit,
)

# --- without a server ---------------------------------------------------------


def test_help_names_the_commands_of_trading():
    shown = CliRunner().invoke(app, ["--help"])
    for command in ("signals", "orders", "portfolio", "lineage"):
        assert f"  {command} " in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("orders", "submit", "A", "buy", "1", "--strategy", "s", "--wait"),
        ("signals", "watch"),
        ("portfolio", "--watch"),
        ("portfolio", "audit"),
    ],
    ids=" ".join,
)
async def test_a_server_that_does_not_answer_is_told_with_its_cure(arguments):
    failed = await invoke(NOWHERE, *arguments)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == (
        "quantplane: no server answers at 127.0.0.1:1; "
        "start one with `quantplane-server up`, or set --target\n"
    )


SUBMIT = ("orders", "submit", "A", "buy", "1", "--strategy", "s")
PUBLISH = ("signals", "publish", "A", "long", "--strategy", "s")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("orders", "submit", "A", "buy", "1"), "--strategy"),
        (("orders", "submit", "A", "hold", "1", "--strategy", "s"),
         "'hold' is not one of buy, sell"),
        (("orders", "submit", "A", "buy", "many", "--strategy", "s"), "quantity"),
        ((*SUBMIT, "--tif", "ever"), "'ever' is not one of day, gtc, ioc, fok"),
        ((*SUBMIT, "--limit", "low"), "--limit"),
        ((*SUBMIT, "--dry-run", "--wait"), "use one of --dry-run and --wait"),
        (("orders", "cancel", "7"), "'7' is not an order id or STRATEGY/CLIENT"),
        (("orders", "replace", "s/c"), "use --quantity, --limit or --stop"),
        (("orders", "list", "--status", "dead"), "'dead' is not one of pending, open"),
        (("orders", "list", "--limit", "0"), "--limit"),
        (("orders", "list", "--start", "soon"), "'soon' is not an ISO time"),
        (("orders", "executions", "--order", "7"), "'7' is not an order id or"),
        (("signals", "publish", "A", "up", "--strategy", "s"),
         "'up' is not one of long, short, exit-long, exit-short"),
        ((*PUBLISH, "--expires", "soon"), "'soon' is not an ISO time"),
        ((*PUBLISH, "--expires", "999999999w"), "is beyond all calendars"),
        ((*PUBLISH, "--id", "7"), "'7' is not a UUID"),
        (("signals", "cancel", "7"), "'7' is not a UUID"),
        (("signals", "list", "--status", "open"), "'open' is not one of active"),
        (("portfolio", "--json", "audit"), "options go behind `portfolio audit`"),
        (("portfolio", "--target", "x:1", "snapshots"), "options go behind"),
        (("portfolio", "snapshots", "--end", "x"), "'x' is not an ISO time"),
        (("lineage", "7"), "'7' is not the id of a signal or an order"),
    ],
)  # fmt: skip
def test_a_wrong_usage_ends_with_code_2(arguments, words):
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 2
    assert words.lower() in " ".join(failed.output.lower().split())


# --- orders -------------------------------------------------------------------


async def test_an_orders_type_follows_from_its_prices(client, call):
    expected = {
        "": {"order_type": MARKET},
        "--limit -1.5 --tif gtc": {
            "order_type": pb.ORDER_TYPE_LIMIT,
            "price": -1.5,
            "time_in_force": pb.TIME_IN_FORCE_GTC,
        },
        "--stop 9": {"order_type": STOP, "stop_price": 9.0},
        "--stop 9 --limit 8": {
            "order_type": STOP_LIMIT,
            "stop_price": 9.0,
            "price": 8.0,
        },
    }
    for options, fields in expected.items():
        (told,) = await call(*SUBMIT, *options.split(), kind=pb.Order)
        assert {name: getattr(told, name) for name in fields} == fields
        assert (told.symbol, told.side, told.quantity) == ("A", BUY, 1)
        assert told == await get(client, told)


async def test_an_order_is_shown_as_a_table(client, call):
    head, _, row = await call(*SUBMIT, "--limit", "10.5", "--id", "mine")
    (order,) = (await client.order.ListOrders(pb.ListOrdersRequest())).orders
    assert cells(head)[1:] == [
        "order", "strategy", "client id", "symbol", "side", "quantity", "type", "tif",
        "status", "filled",
    ]  # fmt: skip
    assert cells(row)[1:] == [
        order.order_id, "s", "mine", "A", "buy", "1", "limit 10.5", "day", "pending",
        "0",
    ]  # fmt: skip


async def test_a_duplicate_is_said_to_be_one(client, server, call):
    await call(*SUBMIT, "--id", "mine")
    again = await invoke(server.target, *SUBMIT, "--id", "mine", "--json")
    assert again.exit_code == 0
    assert again.stderr == (
        "a duplicate: s/mine was submitted before, and this is what it is now\n"
    )
    (order,) = (await client.order.ListOrders(pb.ListOrdersRequest())).orders
    assert Parse(again.stdout, pb.Order()) == order


async def test_a_dry_run_does_nothing(client, call):
    assert await call(*SUBMIT, "--limit", "1500", "--dry-run") == [
        "it would be accepted; notional 1,500.00"
    ]
    assert await call(*SUBMIT, "--dry-run") == [
        "it would be accepted; there is no price to tell its notional from"
    ]
    listed = await client.order.ListOrders(pb.ListOrdersRequest())
    assert not listed.orders


async def test_a_refusal_is_one_line(server):
    failed = await invoke(
        server.target, "orders", "submit", "A", "buy", "0", "--strategy", " s"
    )
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("quantplane: INVALID_FIELD: ")
    for field in ("order.quantity: ", "order.strategy_id: "):
        assert field in failed.stderr
    assert failed.stderr.count("\n") == 1


async def test_an_order_is_cancelled_by_its_id_or_by_its_name(client, call):
    first, second = await open_order(client), await open_order(client)
    names = [first.order_id.upper(), f"s/{second.client_order_id}"]
    for name in names:
        (told,) = await call("orders", "cancel", name, kind=pb.Order)
        assert told.pending_request == pb.PENDING_REQUEST_CANCEL
        assert told == await get(client, told)


async def test_an_order_is_replaced(client, call):
    order = await open_order(client)
    name = f"s/{order.client_order_id}"
    *_, row = await call("orders", "replace", name, "--quantity", "12", "--limit", 99)
    assert cells(row)[-1] == "replace requested: 12 limit 99"
    terms = (await get(client, order)).pending_terms
    assert (terms.quantity, terms.price) == (12, 99)


async def test_an_unknown_order_is_told_in_one_line(server):
    for arguments in (
        ("orders", "cancel", UNKNOWN_ID),
        ("orders", "executions", "--order", "s/nothing"),
    ):
        failed = await invoke(server.target, *arguments)
        assert failed.exit_code == 1
        assert failed.stderr.startswith("quantplane: UNKNOWN_ORDER: ")


async def test_orders_are_listed_by_what_they_are(client, call):
    filled = await open_order(client, symbol="A")
    await fill(client, filled, 10)
    opened = await open_order(client, symbol="B", strategy_id="t")
    pending = await submit(client, symbol="C")
    expected = {
        "": [pending, opened, filled],
        "--limit 2": [pending, opened],
        "--status live": [pending, opened],
        "--status filled --status open": [opened, filled],
        "--symbol A --symbol C": [pending, filled],
        "--strategy t": [opened],
        "--start 2100-01-01": [],
        "--end 2001-01-01": [],
    }
    for options, orders in expected.items():
        listed = await call("orders", "list", *options.split(), kind=pb.Order)
        ids = [order.order_id for order in listed]
        assert ids == [order.order_id for order in orders], options


async def test_a_list_says_that_it_has_more_or_nothing(client, server):
    await submit(client)
    await submit(client)
    some = await invoke(server.target, "orders", "list", "--limit", 1)
    assert (
        some.stderr == "more orders are like that: these are the latest; see --limit\n"
    )
    none = await invoke(server.target, "orders", "list", "--symbol", "NONE")
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "no orders are like that\n"


async def test_executions_are_listed_by_order(client, call):
    first, second = await open_order(client), await open_order(client)
    await fill(client, first, 4)
    await fill(client, second, 5, price=101)
    listed = await call("orders", "executions", kind=pb.Execution)
    assert sorted(execution.quantity for execution in listed) == [4, 5]
    name = f"s/{second.client_order_id}"
    *_, row = await call("orders", "executions", "--order", name)
    assert cells(row)[1:7] == [second.order_id, "s", "A", "buy", "5", "101"]


async def test_a_watcher_sees_the_live_orders_and_then_their_events(client, server):
    order = await open_order(client)
    short = order.order_id[-12:]
    async with running(server.target, "orders", "watch") as watching:
        (live,) = await lines_of(watching, 1)
        assert live.split()[1:] == [
            short, "A", "buy", "live", "open", "0/10", "100",
        ]  # fmt: skip
        await fill(client, order, 4, price=99.5)
        await report(client, order, "CANCELLED", code="HALT", text="halted")
        trade, cancelled = await lines_of(watching, 2)
        assert trade.split()[4:] == ["trade", "open", "4/10", "99.5"]
        assert cancelled.split()[4:] == [
            "cancelled", "cancelled", "4/10", "100", "HALT:", "halted",
        ]  # fmt: skip
        assert await interrupt(watching) == ("", "")


async def test_every_json_line_of_a_watch_is_an_event(client, server):
    order = await submit(client, symbol="A")
    await submit(client, symbol="B")
    arguments = ("orders", "watch", "--json", "--symbol", "A", "--strategy", "s")
    async with running(server.target, *arguments) as watching:
        (line,) = await lines_of(watching, 1)
        assert Parse(line, pb.OrderEvent()) == pb.OrderEvent(order=order)
        await report(client, order, "ACKNOWLEDGED")
        (line,) = await lines_of(watching, 1)
        event = Parse(line, pb.OrderEvent())
        assert event.type == pb.ORDER_EVENT_TYPE_ACKNOWLEDGED
        assert event.order == await get(client, order)


async def listed_order(client):
    """Return the only order, once it is there."""
    async with asyncio.timeout(WAIT_S):
        request = pb.WatchOrdersRequest()
        async with client.follow(client.order.WatchOrders, request) as stream:
            async for response in stream:
                for event in response.events:
                    return event.order
                for order in response.orders:
                    return order
    raise AssertionError


async def test_an_order_is_waited_for_until_it_is_filled(client, server):
    async with running(server.target, *SUBMIT, "--limit", 9, "--wait") as waiting:
        order = await listed_order(client)
        await report(client, order, "ACKNOWLEDGED")
        await fill(client, order, 0.25, price=9)
        await fill(client, order, 0.75, price=9)
        async with asyncio.timeout(WAIT_S):
            out, err = await waiting.communicate()
    assert (waiting.returncode, err) == (0, b"")
    assert [line.split()[4:7] for line in out.decode().splitlines()[3:]] == [
        ["created", "pending", "0/1"],
        ["acknowledged", "open", "0/1"],
        ["trade", "open", "0.25/1"],
        ["trade", "filled", "1/1"],
    ]


async def test_a_wait_that_ends_without_the_fill_has_exit_code_1(client, server):
    async with running(server.target, *SUBMIT, "--wait", "--json") as waiting:
        order = await listed_order(client)
        await report(client, order, "REJECTED", code="NO", text="closed")
        async with asyncio.timeout(WAIT_S):
            out, _ = await waiting.communicate()
    assert waiting.returncode == 1
    first, *events = out.decode().splitlines()
    assert Parse(first, pb.Order()) == order
    last = Parse(events[-1], pb.OrderEvent())
    assert (last.type, last.code) == (pb.ORDER_EVENT_TYPE_REJECTED, "NO")


async def test_a_wait_for_an_order_that_is_over_ends_at_once(client, server, call):
    (order,) = await call(*SUBMIT, "--id", "mine", kind=pb.Order)
    await report(client, order, "ACKNOWLEDGED")
    await fill(client, order, 1)
    again = await invoke(server.target, *SUBMIT, "--id", "mine", "--wait")
    assert again.exit_code == 0
    assert again.stderr.startswith("a duplicate: ")


# --- orders, where something goes wrong ---------------------------------------


class ScriptedOrders(pb.OrderServiceServicer, pb.MarketDataServiceServicer):
    """Has the unary methods of a test; plays its streams in turn."""

    def __init__(self, streams=(), **methods):
        self._streams = list(streams)
        vars(self).update(methods)

    async def ListSymbols(self, request, context):
        return pb.ListSymbolsResponse()

    async def WatchOrders(self, request, context):
        for response in self._streams.pop(0):
            yield response
        if not self._streams:
            await asyncio.Event().wait()


@asynccontextmanager
async def scripted(*streams, **methods):
    server = grpc.aio.server()
    service = ScriptedOrders(streams, **methods)
    pb.add_OrderServiceServicer_to_server(service, server)
    pb.add_MarketDataServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_submission_without_an_answer_tells_how_to_learn_what_became_of_it():
    async def lost(request, context):
        await context.abort(grpc.StatusCode.CANCELLED, "cut")

    async with scripted(SubmitOrder=lost) as target:
        failed = await invoke(target, *SUBMIT, "--id", "mine")
    assert failed.exit_code == 1
    assert failed.stderr == (
        "it may have been accepted: do the same with --id mine, which never trades "
        "twice\nquantplane: CANCELLED: cut\n"
    )


async def test_terminal_escapes_of_a_server_are_told_as_text():
    async def hostile(request, context):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no\x1b[2J\nno")

    async with scripted(SubmitOrder=hostile) as target:
        failed = await invoke(target, *SUBMIT)
    assert failed.stderr == "quantplane: INVALID_ARGUMENT: no\\x1b[2J\\nno\n"


async def test_a_submission_that_is_interrupted_tells_its_id():
    reached = asyncio.Event()

    async def slow(request, context):
        reached.set()
        await asyncio.Event().wait()

    async with (
        scripted(SubmitOrder=slow) as target,
        running(target, *SUBMIT, "--id", "mine") as submitting,
    ):
        await reached.wait()
        out, err = await interrupt(submitting)
    assert out == "" and "--id mine" in err and err.count("\n") == 1


def subscribed(*responses):
    """Return a stream of which the snapshot is empty."""
    complete = pb.StreamEvent(snapshot_complete=pb.SnapshotComplete())
    return [
        pb.WatchOrdersResponse(event=pb.StreamEvent(subscribed=pb.Subscribed())),
        pb.WatchOrdersResponse(event=complete),
        *responses,
    ]


async def test_a_wait_over_a_gap_asks_for_the_order():
    order = pb.Order(order_id=new_id(), symbol="A", status=pb.ORDER_STATUS_OPEN)
    filled = pb.Order(order_id=order.order_id, status=pb.ORDER_STATUS_FILLED)
    gap = pb.WatchOrdersResponse(event=pb.StreamEvent(gap=pb.Gap()))

    async def submitted(request, context):
        return pb.SubmitOrderResponse(order=order)

    async def found(request, context):
        return pb.GetOrderResponse(order=filled)

    streams = [subscribed(gap, *subscribed())]
    async with (
        scripted(*streams, SubmitOrder=submitted, GetOrder=found) as target,
        running(target, *SUBMIT, "--wait") as waiting,
        asyncio.timeout(WAIT_S),
    ):
        out, err = await waiting.communicate()
    assert waiting.returncode == 0
    assert " live " in out.decode().splitlines()[-1]
    assert err.startswith(b"gap from ")


# --- signals ------------------------------------------------------------------


async def test_a_signal_is_published_as_it_is_said(client, call):
    name = new_id()
    (told,) = await call(
        "signals", "publish", "A", "exit-short", "--strategy", "s", "--id", name,
        "--strength", "0.5", "--confidence", "0.25", "--target-price", "12",
        "--stop-loss", "9", "--expires", "2100-01-01T00:00", kind=pb.Signal,
    )  # fmt: skip
    found = await client.signal.GetSignal(pb.GetSignalRequest(signal_id=name))
    assert told == found.signal
    assert told.signal_type == pb.SIGNAL_TYPE_EXIT_SHORT
    assert (told.strength, told.confidence) == (0.5, 0.25)
    assert (told.target_price, told.stop_loss) == (12, 9)
    assert told.expiration.ToJsonString() == "2100-01-01T00:00:00Z"
    assert told.status == pb.SIGNAL_STATUS_ACTIVE


async def test_a_signal_may_expire_in_so_long(call):
    (told,) = await call(*PUBLISH, "--expires", "5m", kind=pb.Signal)
    left_s = told.expiration.ToMilliseconds() / 1e3 - told.time.ToMilliseconds() / 1e3
    assert 295 < left_s < 305
    assert (told.strength, told.confidence) == (1, 1)


async def test_a_signal_is_shown_as_a_table_and_cancelled(call):
    *_, row = await call(*PUBLISH)
    time, name, *rest = cells(row)
    assert time.endswith("Z")
    assert rest == ["s", "A", "long", "1", "1", "active"]
    *_, row = await call("signals", "cancel", name)
    assert cells(row)[-1] == "cancelled"


async def test_signals_are_listed_by_what_they_are(call):
    strong = ("signals", "publish", "A", "long", "--strategy", "s")
    weak = ("signals", "publish", "B", "short", "--strategy", "t", "--strength", "0.1")
    (first,) = await call(*strong, kind=pb.Signal)
    (second,) = await call(*weak, kind=pb.Signal)
    expected = {
        "": [second, first],
        "--limit 1": [second],
        "--symbol A": [first],
        "--strategy t": [second],
        "--type short --type exit-long": [second],
        "--min-strength 0.5": [first],
        "--status active": [second, first],
        "--status executed --status expired": [],
        "--start 2100-01-01": [],
    }
    for options, signals in expected.items():
        listed = await call("signals", "list", *options.split(), kind=pb.Signal)
        assert listed == signals, options


async def test_a_watcher_sees_the_active_signals_and_then_their_events(server, call):
    (first,) = await call(*PUBLISH, kind=pb.Signal)
    async with running(server.target, "signals", "watch", "--type", "long") as watching:
        (active,) = await lines_of(watching, 1)
        assert cells(active)[1:] == [
            first.signal_id, "s", "A", "long", "active", "strength 1, confidence 1",
        ]  # fmt: skip
        await call("signals", "cancel", first.signal_id)
        (cancelled,) = await lines_of(watching, 1)
        assert cells(cancelled)[1:6] == [
            first.signal_id, "s", "A", "long", "cancelled",
        ]  # fmt: skip
        assert await interrupt(watching) == ("", "")


async def test_every_json_line_of_a_watch_of_signals_is_an_event(server, call):
    (signal,) = await call(*PUBLISH, kind=pb.Signal)
    async with running(server.target, "signals", "watch", "--json") as watching:
        (line,) = await lines_of(watching, 1)
    assert Parse(line, pb.SignalEvent()) == pb.SignalEvent(signal=signal)


# --- lineage ------------------------------------------------------------------


@pytest.fixture
async def traced(client, call):
    """A signal, its order and a fill of it."""
    (signal,) = await call(*PUBLISH, kind=pb.Signal)
    order = await open_order(client, signal_id=signal.signal_id)
    await fill(client, order, 4, price=100, commission=1)
    return signal, order


async def test_what_came_of_a_signal_is_a_tree(traced, call):
    signal, order = traced
    root, branch, leaf, traces = await call("lineage", signal.signal_id)
    assert root.startswith(f"signal {signal.signal_id}  ")
    assert "executed" in root
    assert branch.startswith(f"└── order {order.order_id}  ")
    assert branch.endswith("buy 10 A limit 100  open 4/10")
    assert leaf.endswith("buy 4 @ 100  position 4, realised -1.00")
    assert traces.startswith("trace ids: ")


async def test_an_order_leads_to_the_same_by_its_id_or_by_its_name(traced, call):
    signal, order = traced
    tree = await call("lineage", signal.signal_id)
    assert await call("lineage", order.order_id) == tree
    assert await call("lineage", f"s/{order.client_order_id}") == tree
    (told,) = await call("lineage", order.order_id, kind=pb.GetLineageResponse)
    assert [each.order_id for each in told.orders] == [order.order_id]
    assert told.signal.signal_id == signal.signal_id


async def test_a_lineage_of_nothing_is_told_with_a_hint(server):
    failed = await invoke(server.target, "lineage", UNKNOWN_ID)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == (
        f"quantplane: there is neither a signal nor an order {UNKNOWN_ID}; see "
        "`quantplane signals list` and `quantplane orders list`\n"
    )


# --- the portfolio ------------------------------------------------------------


@pytest.fixture
async def position(client):
    """A strategy's position of 4 at 100."""
    order = await open_order(client)
    await fill(client, order, 4, price=100)
    return order


async def test_the_portfolio_is_shown(position, call):
    lines = await call("portfolio")
    assert lines[0].endswith("open positions: 1, without a quote and marked at cost: 1")
    assert cells(lines[-1]) == [
        "A", "4", "100", "100", "400.00", "0.00", "0.00", "s", "at cost",
    ]  # fmt: skip


async def test_the_portfolio_of_one_strategy_is_shown(position, client, call):
    request = pb.GetPortfolioRequest(strategy_id="s")
    found = await client.portfolio.GetPortfolio(request)
    options = ("--strategy", "s")
    assert await call("portfolio", *options, kind=pb.GetPortfolioResponse) == [found]
    assert found.summary.cash == -400
    lines = await call("portfolio", "--strategy", "nobody")
    assert lines[-1] == "no open positions"


async def test_a_watched_portfolio_is_a_line_for_each_change(position, client, server):
    async with running(server.target, "portfolio", "--watch") as watching:
        (first,) = await lines_of(watching, 1)
        assert first.endswith("exposure gross 400.00 net 400.00  positions 1\n")
        await fill(client, position, 2, price=100)
        async with asyncio.timeout(WAIT_S):
            while "gross 600.00" not in (line := (await lines_of(watching, 1))[0]):
                assert "gross 400.00" in line
        await interrupt(watching)


async def test_a_watched_portfolio_may_be_json(position, server):
    async with running(server.target, "portfolio", "--watch", "--json") as watching:
        (line,) = await lines_of(watching, 1)
    told = Parse(line, pb.WatchPortfolioResponse())
    assert [each.symbol for each in told.positions] == ["A"]
    assert not told.resume_token


async def test_a_watched_portfolio_is_drawn_in_place_on_a_terminal(position, server):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "QUANTPLANE_TARGET": server.target, "TERM": "xterm"}
    watching = await asyncio.create_subprocess_exec(
        COMMAND, "portfolio", "--watch", stdout=theirs, stderr=theirs,
        env={**environment, "COLUMNS": "100", "LINES": "30"},
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    while b"400.00" not in drawn or b"at cost" not in drawn:
        drawn += await asyncio.to_thread(os.read, ours, 65_536)
    watching.send_signal(signal.SIGINT)
    assert await watching.wait() == 130
    os.close(ours)
    assert b"\x1b[?25l" in drawn  # the cursor is hidden


async def test_snapshots_are_listed(position, client, call, server):
    taken = await client.portfolio.TakeSnapshot(pb.TakeSnapshotRequest())
    listed = await call("portfolio", "snapshots", kind=pb.PortfolioSnapshot)
    assert taken.snapshot in listed
    *_, row = await call("portfolio", "snapshots", "--start", "2001-01-01")
    assert cells(row)[-1] == "1"
    none = await invoke(server.target, "portfolio", "snapshots", "--end", "2001-01-01")
    assert (none.exit_code, none.stdout) == (0, "")
    assert none.stderr == "there are no snapshots in that time\n"


async def test_an_audit_that_agrees_says_so(position, server):
    audit = await invoke(server.target, "portfolio", "audit")
    assert (audit.exit_code, audit.stdout) == (0, "")
    assert audit.stderr == "executions: 1, orders: 1, positions: 1; all agree\n"


async def test_an_audit_that_does_not_agree_has_exit_code_1(position, server, dsn):
    connection = await asyncpg.connect(dsn)
    await connection.execute("UPDATE positions SET quantity = 5 WHERE symbol = 'A'")
    await connection.close()
    failed = await invoke(server.target, "portfolio", "audit")
    assert failed.exit_code == 1
    assert ["A", "positions.quantity", "5.0", "4.0"] in [
        cells(line) for line in failed.stdout.splitlines()
    ]
    assert failed.stderr.endswith("; not what the executions give: 1\n")
    told = await invoke(server.target, "portfolio", "audit", "--json")
    assert told.exit_code == 1
    assert Parse(told.stdout, pb.AuditPositionsResponse()).drifts
