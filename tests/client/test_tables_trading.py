"""Signals, orders, executions and portfolios as text."""

import io
import math

import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane.tables import (
    TableSnapshots,
    message_json,
    money,
    number,
    order_line,
    portfolio_line,
    print_drifts,
    print_executions,
    print_lineage,
    print_orders,
    print_portfolio,
    print_signals,
    printable,
    quote_line,
    signal_line,
    word,
    words,
)

TIME = {"seconds": 1_700_000_000, "nanos": 123_999_000}
STAMP = "2023-11-14T22:13:20.123Z"
ORDER_ID = "018bcfe5-687b-7000-8000-0123456789ab"
SIGNAL_ID = "018bcfe5-687b-7000-8000-00000000abcd"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def order(**fields):
    return pb.Order(
        **{
            "order_id": ORDER_ID,
            "client_order_id": "c-1",
            "strategy_id": "momentum",
            "symbol": "AAPL",
            "side": pb.SIDE_BUY,
            "order_type": pb.ORDER_TYPE_LIMIT,
            "quantity": 100.0,
            "price": 10.5,
            "time_in_force": pb.TIME_IN_FORCE_DAY,
            "status": pb.ORDER_STATUS_OPEN,
            "created_at": TIME,
            "updated_at": TIME,
            **fields,
        }
    )


def execution(**fields):
    return pb.Execution(
        **{
            "execution_id": "e",
            "time": TIME,
            "order_id": ORDER_ID,
            "strategy_id": "momentum",
            "symbol": "AAPL",
            "side": pb.SIDE_BUY,
            "quantity": 40.0,
            "price": 10.25,
            "position_quantity": 40.0,
            "realized_pnl": -1.0,
            "commission": 1.0,
            **fields,
        }
    )


def signal(**fields):
    return pb.Signal(
        **{
            "signal_id": SIGNAL_ID,
            "time": TIME,
            "strategy_id": "momentum",
            "symbol": "AAPL",
            "signal_type": pb.SIGNAL_TYPE_EXIT_LONG,
            "strength": 0.75,
            "confidence": 1.0,
            "status": pb.SIGNAL_STATUS_ACTIVE,
            **fields,
        }
    )


def shown(printing, *arguments, out=None):
    """Return the lines that are printed, without the rule below the heading."""
    out = out or io.StringIO()
    printing(out, *arguments)
    return [line for line in out.getvalue().splitlines() if line.strip(" ─")]


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# --- values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1 + 0.2, "0.3"),
        (0.1000000001, "0.1"),
        (100.0, "100"),
        (-0.0, "0"),
        (-1e-9, "-0.000000001"),
        (0.00001234567, "0.00001234567"),
        (12_345_678.25, "12345678.25"),
        (999_999.9999, "999999.9999"),
        (1e15, "1000000000000000"),
        (1e-300, "1e-300"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_number_has_its_digits_and_no_noise(value, text):
    assert number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_never_far_from_its_value(value):
    assert float(number(value)) == pytest.approx(value, rel=1e-8, abs=0)


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_a_price_in_ticks_is_shown_exactly(ticks, digits):
    price = ticks / 10**digits
    assert float(number(price)) == price


@pytest.mark.parametrize(
    ("value", "text"),
    [(1_234_567.891, "1,234,567.89"), (-0.001, "0.00"), (-1.5, "-1.50")],
)
def test_money_has_two_digits_and_separators(value, text):
    assert money(value) == text


@given(st.text())
def test_what_is_printable_never_reaches_a_terminal_as_a_command(text):
    assert printable(text).isprintable()
    assert printable(text) == text or not text.isprintable()


def test_escapes_are_shown_as_people_write_them():
    told = printable("a\x1b[2Jb\x9bc\u202ed\r\n")
    assert told == r"a\x1b[2Jb\x9bc\u202ed\r\n"


def test_enums_have_the_words_of_the_command_line():
    assert list(words(pb.SignalType)) == ["long", "short", "exit-long", "exit-short"]
    assert list(words(pb.TimeInForce)) == ["day", "gtc", "ioc", "fok"]
    assert word(pb.Side, pb.SIDE_SELL) == "sell"


def test_a_value_that_a_newer_server_knows_is_shown_by_its_number():
    assert word(pb.OrderStatus, 99) == "99"


@pytest.mark.parametrize(
    "message",
    [
        pb.OrderEvent(revision=2**60, order=order(price=0.1 + 0.2), time=TIME),
        order(error_message="ä\x9b\n\u2028", trace_id=""),
        signal(metadata={"a": [1.5, None, {"b": "c"}]}),
        execution(quantity=-1e-300),
        pb.GetLineageResponse(orders=[order()], executions=[execution()]),
    ],
    ids=lambda message: message.DESCRIPTOR.name,
)
def test_a_message_as_json_is_one_line_that_reads_as_the_same_message(message):
    line = message_json(message)
    assert line.isascii() and line.isprintable()
    assert Parse(line, type(message)()) == message


def test_json_has_the_contracts_field_names_and_every_field():
    line = message_json(pb.Order(client_order_id="c"))
    assert '"client_order_id": "c"' in line
    assert '"filled_quantity": 0.0' in line
    assert '"avg_fill_price"' not in line  # nothing is known of it


# --- orders -------------------------------------------------------------------


def test_orders_are_a_table_without_columns_that_are_empty():
    head, row = shown(print_orders, [order()])
    assert cells(head) == [
        "time", "order", "strategy", "client id", "symbol", "side", "quantity", "type",
        "tif", "status", "filled",
    ]  # fmt: skip
    assert cells(row) == [
        STAMP, ORDER_ID, "momentum", "c-1", "AAPL", "buy", "100", "limit 10.5", "day",
        "open", "0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "prices", "text"),
    [
        (pb.ORDER_TYPE_MARKET, {}, "market"),
        (pb.ORDER_TYPE_LIMIT, {"price": -0.05}, "limit -0.05"),
        (pb.ORDER_TYPE_STOP, {"stop_price": 9.0}, "stop 9"),
        (pb.ORDER_TYPE_STOP_LIMIT, {"price": 8.5, "stop_price": 9.0},
         "stop 9 limit 8.5"),
    ],
)  # fmt: skip
def test_an_orders_type_tells_its_prices(kind, prices, text):
    wanted = order(order_type=kind, **{"price": None, **prices})
    assert cells(shown(print_orders, [wanted])[1])[7] == text


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"reject_code": "RISK_MAX", "error_message": "too much"},
         "RISK_MAX: too much"),
        ({"error_message": "closed"}, "closed"),
        ({"pending_request": pb.PENDING_REQUEST_CANCEL}, "cancel requested"),
        ({"pending_request": pb.PENDING_REQUEST_REPLACE,
          "pending_terms": {"quantity": 50.0, "price": 11.0}},
         "replace requested: 50 limit 11"),
        ({"outcome_unknown": True, "overfill_quantity": 2.0},
         "outcome unknown; overfilled by 2"),
    ],
)  # fmt: skip
def test_what_is_out_of_the_ordinary_is_a_note(fields, note):
    head, row = shown(print_orders, [order(**fields)])
    assert (cells(head)[-1], cells(row)[-1]) == ("note", note)


def test_a_table_keeps_terminal_escapes_and_markup_as_text():
    hostile = order(symbol="[red]\x1b[2J", error_message="\x1b]0;title\x07")
    text = "\n".join(shown(print_orders, [hostile]))
    assert r"[red]\x1b[2J" in text and r"\x1b]0;title\x07" in text
    assert "\x1b" not in text


def test_a_quote_line_keeps_terminal_escapes_as_text():
    line = quote_line(pb.Quote(symbol="\x1b[2J", time=TIME))
    assert "\x1b" not in line and r"\x1b[2J" in line


@pytest.mark.parametrize(
    ("width", "hidden"),
    [
        (200, set()),
        (160, {"client id"}),
        (150, {"client id", "tif"}),
        (120, {"client id", "tif", "time"}),
        (100, {"client id", "tif", "time", "avg price", "strategy"}),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns(monkeypatch, width, hidden):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")  # as plain text
    wide = order(client_order_id="c" * 30, avg_fill_price=1.0, filled_quantity=1.0)
    head, row = shown(print_orders, [wide], out=Terminal())
    everything = {
        "time", "order", "strategy", "client id", "symbol", "side", "quantity", "type",
        "tif", "status", "filled", "avg price",
    }  # fmt: skip
    assert set(cells(head)) == everything - hidden
    assert ORDER_ID in row
    assert max(len(head), len(row)) <= width


def test_cells_that_lack_room_go_on_below_and_nothing_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(print_orders, [order()], out=Terminal())
    first_column = "".join(line.split()[0] for line in lines)
    assert first_column.endswith(ORDER_ID)


def test_a_long_note_costs_no_other_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "170")
    monkeypatch.setenv("TERM", "dumb")
    head, *_ = shown(print_orders, [order(error_message="so " * 99)], out=Terminal())
    assert {"time", "strategy", "note"} <= set(cells(head))


def test_an_event_of_an_order_is_a_line():
    event = pb.OrderEvent(
        revision=7, time=TIME, type=pb.ORDER_EVENT_TYPE_TRADE,
        order=order(filled_quantity=40.0), execution=execution(),
    )  # fmt: skip
    assert order_line(event).split() == [
        STAMP, "0123456789ab", "AAPL", "buy", "trade", "open", "40/100", "10.25",
    ]  # fmt: skip


def test_the_line_of_a_rejection_ends_with_its_reason():
    event = pb.OrderEvent(
        revision=7, time=TIME, type=pb.ORDER_EVENT_TYPE_CANCEL_REJECTED,
        order=order(price=None), code="TOO_LATE", text="it is\x1b[2J done",
    )  # fmt: skip
    assert order_line(event).endswith(
        r"cancel-rejected   open              0/100          -  "
        r"TOO_LATE: it is\x1b[2J done"
    )


def test_the_line_of_a_live_order_has_its_last_time_and_its_note():
    later = {"seconds": TIME["seconds"] + 1}
    live = order(updated_at=later, pending_request=pb.PENDING_REQUEST_CANCEL)
    line = order_line(pb.OrderEvent(order=live))
    assert line.startswith("2023-11-14T22:13:21.000Z")
    assert " live " in line and line.endswith("10.5  cancel requested")


def test_executions_tell_what_they_did():
    late = execution(late=True, ref_execution_id="x", quantity=-40.0, venue="XNAS")
    head, first, second = shown(print_executions, [execution(), late])
    assert cells(head) == [
        "time", "order", "strategy", "symbol", "side", "quantity", "price",
        "commission", "venue", "position", "realised", "note",
    ]  # fmt: skip
    assert cells(first) == [
        STAMP, ORDER_ID, "momentum", "AAPL", "buy", "40", "10.25", "1.00", "40",
        "-1.00",
    ]  # fmt: skip
    assert cells(second)[5] == "-40"
    assert cells(second)[-1] == "reversal, late"


# --- signals ------------------------------------------------------------------


def test_signals_are_a_table():
    head, row = shown(print_signals, [signal(target_price=12.0, expiration=TIME)])
    assert cells(head) == [
        "time", "signal", "strategy", "symbol", "type", "strength", "confidence",
        "target", "expires", "status",
    ]  # fmt: skip
    assert cells(row) == [
        STAMP, SIGNAL_ID, "momentum", "AAPL", "exit-long", "0.75", "1", "12", STAMP,
        "active",
    ]  # fmt: skip


def test_an_event_of_a_signal_is_a_line():
    event = pb.SignalEvent(
        revision=1, time=TIME, type=pb.SIGNAL_EVENT_TYPE_PUBLISHED,
        signal=signal(stop_loss=9.0),
    )  # fmt: skip
    assert cells(signal_line(event)) == [
        STAMP, SIGNAL_ID, "momentum", "AAPL", "exit-long", "published",
        "strength 0.75, confidence 1, stop loss 9",
    ]  # fmt: skip


def test_a_signal_that_is_active_already_is_said_to_be():
    assert cells(signal_line(pb.SignalEvent(signal=signal())))[5] == "active"


# --- lineage ------------------------------------------------------------------


def test_a_lineage_is_a_tree_with_its_trace_ids_at_the_end():
    other = order(order_id="other", client_order_id="c-2", status=3, quantity=5.0)
    lineage = pb.GetLineageResponse(
        signal=signal(),
        orders=[order(filled_quantity=40.0), other],
        executions=[
            execution(),
            execution(order_id="other", realized_pnl=1_234.5, late=True),
        ],
        trace_ids=["t1", "t\x1b2"],
    )
    assert shown(print_lineage, lineage) == [
        f"signal {SIGNAL_ID}  {STAMP}  momentum  exit-long AAPL  active  "
        "strength 0.75, confidence 1",
        f"├── order {ORDER_ID}  {STAMP}  momentum/c-1  buy 100 AAPL limit 10.5  "
        "open 40/100",
        f"│   └── {STAMP}  buy 40 @ 10.25  position 40, realised -1.00",
        f"└── order other  {STAMP}  momentum/c-2  buy 5 AAPL limit 10.5  filled 0/5",
        f"    └── {STAMP}  buy 40 @ 10.25  position 40, realised 1,234.50  late",
        r"trace ids: t1, t\x1b2",
    ]


def test_the_lineage_of_an_order_without_a_signal_begins_with_the_order():
    lineage = pb.GetLineageResponse(orders=[order()], executions=[execution()])
    first, second, last = shown(print_lineage, lineage)
    assert first.startswith(f"order {ORDER_ID}")
    assert second.startswith(f"└── {STAMP}")
    assert last == "trace ids: none"


# --- the portfolio ------------------------------------------------------------

SUMMARY = pb.PortfolioSummary(
    time=TIME, total_value=1_001_000.0, cash=990_000.0, positions_value=11_000.0,
    total_pnl=1_000.0, realized_pnl=-250.0, unrealized_pnl=1_250.0,
    total_exposure=13_000.0, net_exposure=11_000.0, n_positions=2, n_unmarked=1,
)  # fmt: skip
POSITIONS = [
    pb.Position(
        symbol="AAPL", quantity=100.0, average_cost=107.5, mark=120.0, value=12_000.0,
        unrealized_pnl=1_250.0, realized_pnl=0.0, mark_time=TIME, strategy_id="m",
    ),
    pb.Position(symbol="FLAT", realized_pnl=-250.0),
    pb.Position(symbol="ODD", quantity=-10.0, average_cost=100.0, mark=100.0,
                value=-1_000.0),
]  # fmt: skip


def test_a_portfolio_is_a_summary_and_its_open_positions():
    lines = shown(print_portfolio, SUMMARY, POSITIONS)
    assert [line.rstrip() for line in lines[:5]] == [
        f"as of {STAMP}, open positions: 2, without a quote and marked at cost: 1",
        "total value         1,001,000.00",
        "cash                  990,000.00   positions              11,000.00",
        "P&L                     1,000.00   realised                 -250.00   "
        "unrealised              1,250.00",
        "exposure gross         13,000.00   net                    11,000.00",
    ]
    assert [cells(line) for line in lines[5:]] == [
        ["symbol", "quantity", "avg cost", "mark", "value", "unrealised", "realised",
         "opened by", "marked"],
        ["AAPL", "100", "107.5", "120", "12,000.00", "1,250.00", "0.00", "m", STAMP],
        ["ODD", "-10", "100", "100", "-1,000.00", "0.00", "0.00", "at cost"],
    ]  # fmt: skip


def test_a_portfolio_may_be_empty():
    lines = shown(print_portfolio, pb.PortfolioSummary(), [])
    assert lines[0] == "as of -, open positions: 0"
    assert lines[-1] == "no open positions"


def test_gains_are_green_and_losses_red_where_there_is_colour(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    print_portfolio(out, SUMMARY, POSITIONS)
    text = out.getvalue()
    assert "\x1b[32m          1,000.00\x1b[0m" in text
    assert "\x1b[31m           -250.00\x1b[0m" in text


def test_a_portfolio_in_a_pipe_has_no_colour(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    print_portfolio(out, SUMMARY, POSITIONS)
    assert "\x1b" not in out.getvalue()


def test_a_change_of_the_portfolio_is_a_line():
    assert portfolio_line(SUMMARY) == (
        f"{STAMP}  value 1,001,000.00  cash 990,000.00  P&L 1,000.00 "
        "(realised -250.00, unrealised 1,250.00)  exposure gross 13,000.00 "
        "net 11,000.00  positions 2"
    )


def test_of_many_snapshots_the_table_shows_the_ends():
    table = TableSnapshots()
    for n in range(50):
        table.add(pb.PortfolioSnapshot(time=TIME, total_value=float(n)))
    lines = shown(table.print)
    values = [cells(line)[1] for line in lines if line.startswith(f" {STAMP}")]
    assert values == [f"{n}.00" for n in [*range(20), *range(30, 50)]]
    assert "10 of 50 snapshots are left out; --json has all" in lines[-1]


def test_drift_is_shown_with_all_digits():
    drift = pb.Drift(
        key="m A\x1b", column="positions.quantity", stored=0.1 + 0.2, recomputed=0.3
    )
    text = io.StringIO()
    print_drifts(text, [drift])
    row = text.getvalue().splitlines()[-1]
    assert cells(row) == [
        r"m A\x1b", "positions.quantity", "0.30000000000000004", "0.3",
    ]  # fmt: skip
