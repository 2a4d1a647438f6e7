"""The portfolio as text."""

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from quantplane import v1 as pb
from quantplane.tables.rows import (
    Ends,
    add_row,
    coloured,
    console_of,
    fitted,
    print_rows,
    print_table,
    room_of,
    table_of,
)
from quantplane.tables.text import milliseconds, money, number

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

DISPENSABLE = ("marked", "opened by", "avg cost", "mark")
LABEL, AMOUNT = 14, 18  # characters


def print_portfolio(
    out: IO[str], summary: pb.PortfolioSummary, positions: Iterable[pb.Position]
) -> None:
    console_of(out).print(portfolio_view(summary, positions, room_of(out)))


def portfolio_view(
    summary: pb.PortfolioSummary, positions: Iterable[pb.Position], room: int
) -> "Group":
    """Return the summary and the open positions, in so many characters."""
    from rich.console import Group
    from rich.text import Text

    rows = [_position_row(position) for position in positions if position.quantity]
    table = fitted(rows, room, DISPENSABLE) if rows else Text("no open positions")
    return Group(*_summary(summary), Text(), table)


def _summary(summary: pb.PortfolioSummary) -> "list[Text]":
    from rich.text import Text

    figures = [
        [("total value", _amount(summary.total_value))],
        [
            ("cash", _amount(summary.cash)),
            ("positions", _amount(summary.positions_value)),
        ],
        [
            ("P&L", _gain(summary.total_pnl)),
            ("realised", _gain(summary.realized_pnl)),
            ("unrealised", _gain(summary.unrealized_pnl)),
        ],
        [
            ("exposure gross", _amount(summary.total_exposure)),
            ("net", _amount(summary.net_exposure)),
        ],
    ]
    lines = [
        Text("   ").join(Text(f"{name:<{LABEL}}").append(value) for name, value in line)
        for line in figures
    ]
    return [Text(_heading(summary)), *lines]


def _heading(summary: pb.PortfolioSummary) -> str:
    heading = f"as of {_time(summary)}, open positions: {summary.n_positions:,}"
    if not summary.n_unmarked:
        return heading
    return f"{heading}, without a quote and marked at cost: {summary.n_unmarked:,}"


def _time(summary: pb.PortfolioSummary) -> str:
    return milliseconds(summary.time) if summary.HasField("time") else "-"


def _amount(value: float) -> "Text":
    from rich.text import Text

    return Text(f"{money(value):>{AMOUNT}}")


def _gain(value: float) -> "Text":
    return coloured(f"{money(value):>{AMOUNT}}", value)


def portfolio_line(summary: pb.PortfolioSummary) -> str:
    return (
        f"{_time(summary)}  value {money(summary.total_value)}  "
        f"cash {money(summary.cash)}  P&L {money(summary.total_pnl)} "
        f"(realised {money(summary.realized_pnl)}, "
        f"unrealised {money(summary.unrealized_pnl)})  "
        f"exposure gross {money(summary.total_exposure)} "
        f"net {money(summary.net_exposure)}  positions {summary.n_positions:,}"
    )


def _position_row(position: pb.Position) -> "dict[str, str | Text]":
    marked = position.HasField("mark_time")
    unrealized, realized = position.unrealized_pnl, position.realized_pnl
    return {
        "symbol": position.symbol,
        "quantity": number(position.quantity),
        "avg cost": number(position.average_cost),
        "mark": number(position.mark),
        "value": money(position.value),
        "unrealised": coloured(money(unrealized), unrealized),
        "realised": coloured(money(realized), realized),
        "opened by": position.strategy_id,
        "marked": milliseconds(position.mark_time) if marked else "at cost",
    }


class TableSnapshots:
    """Prints a table, without the middle of a long one."""

    def __init__(self) -> None:
        self._ends: Ends[pb.PortfolioSnapshot] = Ends()

    def add(self, snapshot: pb.PortfolioSnapshot) -> None:
        self._ends.add(snapshot)

    def print(self, out: IO[str]) -> None:
        names = "time", "total value", "cash", "positions", "P&L", "realised"
        table = table_of([*names, "unrealised", "gross", "net", "open"], wrap=True)
        for snapshot in self._ends:
            cells = _snapshot_cells(snapshot) if snapshot else ["..."] * 10
            add_row(table, *cells)
        if self._ends.hidden:
            table.caption = (
                f"{self._ends.hidden:,} of {self._ends.count:,} snapshots are left "
                "out; --json has all"
            )
        print_table(out, table)


def _snapshot_cells(snapshot: pb.PortfolioSnapshot) -> "list[str | Text]":
    return [
        milliseconds(snapshot.time),
        money(snapshot.total_value),
        money(snapshot.cash),
        money(snapshot.positions_value),
        coloured(money(snapshot.total_pnl), snapshot.total_pnl),
        coloured(money(snapshot.realized_pnl), snapshot.realized_pnl),
        coloured(money(snapshot.unrealized_pnl), snapshot.unrealized_pnl),
        money(snapshot.total_exposure),
        money(snapshot.net_exposure),
        str(snapshot.n_positions),
    ]


def print_drifts(out: IO[str], drifts: Sequence[pb.Drift]) -> None:
    print_rows(
        out,
        [
            {
                "key": drift.key,
                "column": drift.column,
                # All digits: what differs may be small.
                "stored": repr(drift.stored),
                "recomputed": repr(drift.recomputed),
            }
            for drift in drifts
        ],
    )
