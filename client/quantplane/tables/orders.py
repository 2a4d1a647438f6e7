"""Orders, executions and where they come from, as text."""

from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from quantplane import v1 as pb
from quantplane.tables.rows import coloured, console_of, print_rows
from quantplane.tables.signals import signal_words
from quantplane.tables.text import milliseconds, money, number, printable, word

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

SHORT = 12  # characters at the end of an id: a UUIDv7 begins with its time


def print_orders(out: IO[str], orders: Sequence[pb.Order]) -> None:
    dispensable = ("client id", "tif", "time", "avg price", "strategy")
    print_rows(out, [_order_row(order) for order in orders], dispensable)


def _order_row(order: pb.Order) -> dict[str, str]:
    average = order.avg_fill_price if order.HasField("avg_fill_price") else None
    return {
        "time": milliseconds(order.created_at),
        "order": order.order_id,
        "strategy": order.strategy_id,
        "client id": order.client_order_id,
        "symbol": order.symbol,
        "side": word(pb.Side, order.side),
        "quantity": number(order.quantity),
        "type": _type(order),
        "tif": word(pb.TimeInForce, order.time_in_force),
        "status": word(pb.OrderStatus, order.status),
        "filled": number(order.filled_quantity),
        "avg price": "" if average is None else number(average),
        "note": _note(order),
    }


def order_line(event: pb.OrderEvent) -> str:
    """Return the event as a line; one without a type tells that the order is live."""
    order, execution = event.order, event.execution
    if event.HasField("execution"):
        price = number(execution.price)
    else:
        price = number(order.price) if order.HasField("price") else "-"
    told = word(pb.OrderEventType, event.type) if event.type else "live"
    reason = _joined(event.code, event.text) if event.type else _note(order)
    return (
        f"{milliseconds(event.time if event.type else order.updated_at)}  "
        f"{printable(order.order_id[-SHORT:])}  {printable(order.symbol):<10} "
        f"{word(pb.Side, order.side):<4} {told:<17} "
        f"{word(pb.OrderStatus, order.status):<9} "
        f"{_progress(order):>13} {price:>10}  {printable(reason)}"
    ).rstrip()


def _progress(order: pb.Order) -> str:
    return f"{number(order.filled_quantity)}/{number(order.quantity)}"


def _type(order: pb.Order) -> str:
    """Return "limit 10.5", "stop 9", "stop 9 limit 8.5" or "market"."""
    return _terms(order) or word(pb.OrderType, order.order_type)


def _terms(order: "pb.Order | pb.Terms") -> str:
    stop = f"stop {number(order.stop_price)}" if order.HasField("stop_price") else ""
    limit = f"limit {number(order.price)}" if order.HasField("price") else ""
    return f"{stop} {limit}".strip()


def _note(order: pb.Order) -> str:
    """Return what is out of the ordinary."""
    notes = [_joined(order.reject_code, order.error_message)]
    match order.pending_request:
        case pb.PENDING_REQUEST_CANCEL:
            notes.append("cancel requested")
        case pb.PENDING_REQUEST_REPLACE:
            wanted = order.pending_terms
            terms = f"{number(wanted.quantity)} {_terms(wanted)}".strip()
            notes.append(f"replace requested: {terms}")
    if order.outcome_unknown:
        notes.append("outcome unknown")
    if order.overfill_quantity:
        notes.append(f"overfilled by {number(order.overfill_quantity)}")
    return "; ".join(filter(None, notes))


def _joined(code: str, text: str) -> str:
    return ": ".join(filter(None, (code, text)))


# --- executions ---------------------------------------------------------------


def print_executions(out: IO[str], executions: Sequence[pb.Execution]) -> None:
    rows = [_execution_row(execution) for execution in executions]
    print_rows(out, rows, ("venue", "strategy", "commission", "order"))


def _execution_row(execution: pb.Execution) -> "dict[str, str | Text]":
    realized = execution.realized_pnl
    return {
        "time": milliseconds(execution.time),
        "order": execution.order_id,
        "strategy": execution.strategy_id,
        "symbol": execution.symbol,
        "side": word(pb.Side, execution.side),
        "quantity": number(execution.quantity),
        "price": number(execution.price),
        "commission": money(execution.commission),
        "venue": execution.venue,
        "position": number(execution.position_quantity),
        "realised": coloured(money(realized), realized),
        "note": ", ".join(_flags(execution)),
    }


def _flags(execution: pb.Execution) -> Iterator[str]:
    if execution.ref_execution_id:
        yield "reversal" if execution.quantity < 0 else "correction"
    if execution.late:
        yield "late"


# --- lineage ------------------------------------------------------------------


def print_lineage(out: IO[str], lineage: pb.GetLineageResponse) -> None:
    """Print a tree: the signal, its orders, their executions; then the trace ids."""
    console = console_of(out)
    for tree in _trees(lineage):
        console.print(tree)
    traces = ", ".join(map(printable, lineage.trace_ids)) or "none"
    console.print(f"trace ids: {traces}", markup=False, highlight=False)


def _trees(lineage: pb.GetLineageResponse) -> "Iterator[Tree]":
    from rich.text import Text
    from rich.tree import Tree

    orders = {order.order_id: Tree(_order_words(order)) for order in lineage.orders}
    for execution in lineage.executions:
        orders[execution.order_id].add(_execution_words(execution))
    if not lineage.HasField("signal"):
        yield from orders.values()
        return
    tree = Tree(Text(signal_words(lineage.signal)))
    tree.children.extend(orders.values())
    yield tree


def _order_words(order: pb.Order) -> "Text":
    from rich.text import Text

    name = printable(f"{order.strategy_id}/{order.client_order_id}")
    text = (
        f"order {printable(order.order_id)}  {milliseconds(order.created_at)}  {name}  "
        f"{word(pb.Side, order.side)} {number(order.quantity)} "
        f"{printable(order.symbol)} {_type(order)}  "
        f"{word(pb.OrderStatus, order.status)} {_progress(order)}"
    )
    note = _note(order)
    return Text(f"{text}  {printable(note)}" if note else text)


def _execution_words(execution: pb.Execution) -> "Text":
    from rich.text import Text

    realized = execution.realized_pnl
    flags = "".join(f"  {flag}" for flag in _flags(execution))
    return Text.assemble(
        f"{milliseconds(execution.time)}  {word(pb.Side, execution.side)} "
        f"{number(execution.quantity)} @ {number(execution.price)}"
        f"  position {number(execution.position_quantity)}, realised ",
        coloured(money(realized), realized),
        flags,
    )
