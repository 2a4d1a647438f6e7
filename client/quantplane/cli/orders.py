"""Commands of orders."""

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantplane.cli.parameters import (
    EndOption,
    JsonOption,
    OrderArgument,
    RowsOption,
    StartOption,
    StrategyFilter,
    SymbolFilter,
    TargetOption,
    enum_of,
    id_of,
    order_of,
    time_of,
)
from quantplane.cli.running import FAILED, fail, run, say
from quantplane.cli.showing import show, show_page, watch

if TYPE_CHECKING:
    from quantplane import v1 as pb
    from quantplane.client import Client
    from quantplane.follow import Follower

LimitOption = Annotated[
    float | None,
    typer.Option("--limit", metavar="P", help="The price to trade at or better."),
]
StopOption = Annotated[
    float | None,
    typer.Option("--stop", metavar="P", help="The price that triggers it."),
]


def submit(
    symbol: Annotated[str, typer.Argument(help="What to trade.")],
    side: Annotated[str, typer.Argument(metavar="buy|sell")],
    quantity: Annotated[float, typer.Argument(help="In units of the instrument.")],
    strategy: Annotated[str, typer.Option(help="Whose order it is.")],
    limit: LimitOption = None,
    stop: StopOption = None,
    tif: Annotated[
        str, typer.Option(metavar="day|gtc|ioc|fok", help="How long it is good.")
    ] = "day",
    signal: Annotated[
        str | None, typer.Option(metavar="ID", help="What it acts on.")
    ] = None,
    client_order_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="CLIENT_ORDER_ID",
            help="Its name; the same again never trades twice.",
            show_default="a new one",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it, and do nothing.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow it; exit code 1 unless it is filled.")
    ] = False,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Submit an order: market, limit, stop or stop limit, by the prices it has."""
    from quantplane import v1 as pb
    from quantplane.ids import new_id

    if dry_run and wait:
        raise typer.BadParameter("use one of --dry-run and --wait")
    types = {
        (False, False): pb.ORDER_TYPE_MARKET,
        (True, False): pb.ORDER_TYPE_LIMIT,
        (False, True): pb.ORDER_TYPE_STOP,
        (True, True): pb.ORDER_TYPE_STOP_LIMIT,
    }
    order = pb.NewOrder(
        client_order_id=client_order_id or new_id(),
        strategy_id=strategy,
        signal_id=signal or "",
        symbol=symbol,
        side=enum_of(pb.Side, side, "SIDE"),
        order_type=types[limit is not None, stop is not None],
        quantity=quantity,
        price=limit,
        stop_price=stop,
        time_in_force=enum_of(pb.TimeInForce, tif, "--tif"),
    )

    async def work(client: "Client") -> None:
        if dry_run:
            await _validate(client, order, as_json)
        elif wait:
            await _submit_and_wait(client, order, as_json)
        else:
            await _submit(client, order, as_json)

    run(target, work)


def cancel(
    order: OrderArgument, as_json: JsonOption = False, target: TargetOption = None
) -> None:
    """Ask the broker to cancel an order."""
    from quantplane import v1 as pb

    request = pb.CancelOrderRequest(**order_of(order))

    async def work(client: "Client") -> None:
        _show((await client.order.CancelOrder(request)).order, as_json)

    run(target, work)


def replace(
    order: OrderArgument,
    quantity: Annotated[
        float | None, typer.Option(metavar="Q", help="In all, what is filled included.")
    ] = None,
    limit: LimitOption = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Ask the broker to change the quantity or the prices of an open order."""
    from quantplane import v1 as pb

    if quantity is limit is stop is None:
        raise typer.BadParameter("use --quantity, --limit or --stop")
    request = pb.ReplaceOrderRequest(
        **order_of(order), quantity=quantity, price=limit, stop_price=stop
    )

    async def work(client: "Client") -> None:
        _show((await client.order.ReplaceOrder(request)).order, as_json)

    run(target, work)


def list_orders(
    strategy: StrategyFilter = None,
    symbol: SymbolFilter = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            metavar="pending|open|filled|cancelled|rejected|expired|live",
            help="Only these; live is pending or open. May be repeated.",
        ),
    ] = None,
    signal: Annotated[
        str | None, typer.Option(metavar="ID", help="Only those that act on it.")
    ] = None,
    start: StartOption = None,
    end: EndOption = None,
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List orders, the latest first."""
    from quantplane import v1 as pb
    from quantplane.tables import print_orders

    request = pb.ListOrdersRequest(
        filter=pb.OrderFilter(strategy_ids=strategy, symbols=symbol),
        statuses=_statuses(status or []),
        signal_id=signal or "",
        start_time=time_of(start, "--start"),
        end_time=time_of(end, "--end"),
        page_size=limit,
    )

    async def work(client: "Client") -> None:
        page = await client.order.ListOrders(request)
        show_page(page, "orders", print_orders, as_json)

    run(target, work)


def watch_orders(
    strategy: StrategyFilter = None,
    symbol: SymbolFilter = None,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Print the live orders, then every event of orders as it comes, one a line.

    With --json each line is an OrderEvent; a live order's has only the order. Ctrl-C
    ends it.
    """
    from quantplane import v1 as pb

    request = pb.WatchOrdersRequest(
        filter=pb.OrderFilter(strategy_ids=strategy, symbols=symbol)
    )

    def events(response: pb.WatchOrdersResponse) -> list[Any]:
        live = (pb.OrderEvent(order=order) for order in response.orders)
        return [*live, *response.events]

    async def work(client: "Client") -> None:
        stream = client.follow(client.order.WatchOrders, request)
        await watch(stream, events, _line_of(as_json))

    run(target, work)


def executions(
    order: Annotated[
        str | None,
        typer.Option(metavar="ORDER", help="As of `orders cancel`; only its own."),
    ] = None,
    strategy: StrategyFilter = None,
    symbol: SymbolFilter = None,
    start: StartOption = None,
    end: EndOption = None,
    limit: RowsOption = 50,
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """List executions, the latest first."""
    from quantplane import v1 as pb
    from quantplane.tables import print_executions

    name = order_of(order) if order is not None else None
    request = pb.ListExecutionsRequest(
        filter=pb.OrderFilter(strategy_ids=strategy, symbols=symbol),
        start_time=time_of(start, "--start"),
        end_time=time_of(end, "--end"),
        page_size=limit,
    )

    async def work(client: "Client") -> None:
        if name is not None:
            request.order_id = await _order_id(client, name)
        page = await client.order.ListExecutions(request)
        show_page(page, "executions", print_executions, as_json)

    run(target, work)


def lineage(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="Of a signal or an order; or STRATEGY/CLIENT_ORDER_ID."
        ),
    ],
    as_json: JsonOption = False,
    target: TargetOption = None,
) -> None:
    """Show what came of a signal, or what an order came from."""
    if "/" in name:
        key = order_of(name)
    else:
        key = {"signal_id": id_of(name, "ID", "the id of a signal or an order")}
    run(target, lambda client: _show_lineage(client, key, as_json))


# --- working ------------------------------------------------------------------


async def _validate(client: "Client", order: "pb.NewOrder", as_json: bool) -> None:
    from quantplane import v1 as pb
    from quantplane.tables import message_json, money

    response = await client.order.ValidateOrder(pb.ValidateOrderRequest(order=order))
    if as_json:
        print(message_json(response))
    elif response.HasField("notional"):
        print(f"it would be accepted; notional {money(response.notional)}")
    else:
        print("it would be accepted; there is no price to tell its notional from")


def _statuses(texts: list[str]) -> list[Any]:
    from quantplane import v1 as pb

    statuses: list[Any] = []
    for text in texts:
        if text == "live":
            statuses += [pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN]
        else:
            statuses.append(enum_of(pb.OrderStatus, text, "--status"))
    return statuses


async def _submit(client: "Client", new: "pb.NewOrder", as_json: bool) -> "pb.Order":
    """Submit the order and show what it is then."""
    import grpc

    from quantplane import v1 as pb
    from quantplane.errors import is_transient

    try:
        response = await client.order.SubmitOrder(pb.SubmitOrderRequest(order=new))
    except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) or is_transient(error):
            say(
                "it may have been accepted: do the same with "
                f"--id {new.client_order_id}, which never trades twice"
            )
        raise
    _show(response.order, as_json)
    if response.duplicate:
        say(
            f"a duplicate: {new.strategy_id}/{new.client_order_id} was submitted "
            "before, and this is what it is now"
        )
    order: pb.Order = response.order
    return order


async def _submit_and_wait(client: "Client", new: "pb.NewOrder", as_json: bool) -> None:
    from quantplane import v1 as pb

    request = pb.WatchOrdersRequest(
        filter=pb.OrderFilter(strategy_ids=[new.strategy_id], symbols=[new.symbol])
    )
    async with client.follow(client.order.WatchOrders, request) as stream:
        # Before the order is submitted, so that no event of it is missed.
        async for response in stream:
            if response.event.HasField("snapshot_complete"):
                break
        order = await _submit(client, new, as_json)
        order = await _until_over(client, stream, order, as_json)
    if order.status != pb.ORDER_STATUS_FILLED:
        raise typer.Exit(FAILED)


async def _until_over(
    client: "Client",
    stream: "Follower[pb.WatchOrdersResponse]",
    order: "pb.Order",
    as_json: bool,
) -> "pb.Order":
    """Print the events of the order until it is over; return it as it is then."""
    from quantplane import v1 as pb
    from quantplane.tables import event_lines

    line = _line_of(as_json)
    gap = False
    while order.status in (pb.ORDER_STATUS_PENDING, pb.ORDER_STATUS_OPEN):
        response = await anext(stream)
        for text in event_lines(response.event):
            say(text)
        events = list(response.events)
        gap |= response.event.HasField("gap")
        if gap and response.event.HasField("snapshot_complete"):
            gap = False
            request = pb.GetOrderRequest(order_id=order.order_id)
            found = await client.order.GetOrder(request)
            events = [pb.OrderEvent(order=found.order)]
        for event in events:
            if event.order.order_id == order.order_id:
                print(line(event), flush=True)
                order = event.order
    return order


async def _show_lineage(client: "Client", key: dict[str, Any], as_json: bool) -> None:
    import grpc

    from quantplane import v1 as pb
    from quantplane.errors import reason_of
    from quantplane.tables import message_json, print_lineage

    if "client_order_id" in key:
        key = {"order_id": await _order_id(client, key)}
    try:
        found = await client.order.GetLineage(pb.GetLineageRequest(**key))
    except grpc.aio.AioRpcError as error:
        if reason_of(error) != "UNKNOWN_SIGNAL":
            raise
        found = await _lineage_of_order(client, key["signal_id"])
    if as_json:
        print(message_json(found))
    else:
        print_lineage(sys.stdout, found)


async def _lineage_of_order(client: "Client", order_id: str) -> Any:
    import grpc

    from quantplane import v1 as pb
    from quantplane.errors import reason_of

    try:
        return await client.order.GetLineage(pb.GetLineageRequest(order_id=order_id))
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "UNKNOWN_ORDER":
            fail(
                f"there is neither a signal nor an order {order_id}; see "
                "`quantplane signals list` and `quantplane orders list`"
            )
        raise


async def _order_id(client: "Client", name: dict[str, Any]) -> str:
    from quantplane import v1 as pb

    if "order_id" in name:
        return str(name["order_id"])
    response = await client.order.GetOrder(pb.GetOrderRequest(**name))
    return str(response.order.order_id)


def _show(order: "pb.Order", as_json: bool) -> None:
    from quantplane.tables import print_orders

    show([order], print_orders, as_json)


def _line_of(as_json: bool) -> Any:
    from quantplane.tables import message_json, order_line

    return message_json if as_json else order_line
