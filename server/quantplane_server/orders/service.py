"""OrderService: what strategies ask; BrokerService is in broker.py."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from quantplane import v1 as pb
from quantplane.v1 import orders_pb2_grpc as rpc
from quantplane_server.db import Connection, Database
from quantplane_server.errors import (
    InvalidRequest,
    QuantplaneError,
    ResultTooLarge,
    UnknownOrder,
    UnknownSignal,
)
from quantplane_server.log import Logs
from quantplane_server.orders import checks, lifecycle, queries
from quantplane_server.orders.commands import (
    Change,
    Command,
    Done,
    Outcome,
    Replace,
    Submit,
)
from quantplane_server.orders.streams import OrderStream
from quantplane_server.orders.writer import Writer
from quantplane_server.origin import Origin
from quantplane_server.pages import begin, token_behind
from quantplane_server.portfolio import queries as portfolio
from quantplane_server.principal import bound, may_see
from quantplane_server.rpc.interceptor import Context, Serialised
from quantplane_server.rpc.trace import origin
from quantplane_server.signals import queries as signals
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens

PAGE = 1_000  # where a request names no page_size
MAX_LINEAGE = 10_000  # orders, and executions


class OrderService(rpc.OrderServiceServicer):
    """Commands go to the writer, the rest is read."""

    def __init__(
        self,
        db: Database,
        writer: Writer,
        logs: Logs,
        tokens: Tokens,
        streams: Streams,
    ) -> None:
        self._db = db
        self._writer = writer
        self._logs = logs
        self._tokens = tokens
        self._streams = streams

    # --- Commands ---

    async def SubmitOrder(
        self, request: pb.SubmitOrderRequest, context: Context
    ) -> pb.SubmitOrderResponse:
        checks.check_new_order(request.order)
        submit = Submit(request.order, origin(context), bool(bound()))
        done = await self._do(submit)
        return pb.SubmitOrderResponse(order=done.order, duplicate=done.duplicate)

    async def SubmitOrders(
        self, request: pb.SubmitOrdersRequest, context: Context
    ) -> pb.SubmitOrdersResponse:
        checks.check_batch(request.orders, "orders")
        came = origin(context)
        commands = [submit_or_error(order, came) for order in request.orders]
        return pb.SubmitOrdersResponse(results=await do_each(self._writer, commands))

    async def ValidateOrder(
        self, request: pb.ValidateOrderRequest, context: Context
    ) -> pb.ValidateOrderResponse:
        checks.check_new_order(request.order)
        submit = Submit(request.order, confined=bool(bound()))
        notional = await self._writer.validate(submit)
        return pb.ValidateOrderResponse(notional=notional)

    async def CancelOrder(
        self, request: pb.CancelOrderRequest, context: Context
    ) -> pb.CancelOrderResponse:
        checks.check_cancel(request)
        order = await self._named(request)
        report = pb.OrderReport(
            order_id=order.order_id, type=pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED
        )
        change = Change(report, origin(context), version=request.version)
        return pb.CancelOrderResponse(order=(await self._do(change)).order)

    async def ReplaceOrder(
        self, request: pb.ReplaceOrderRequest, context: Context
    ) -> pb.ReplaceOrderResponse:
        checks.check_replace(request)
        order = await self._named(request)
        replace = Replace(order.order_id, order.strategy_id, request, origin(context))
        return pb.ReplaceOrderResponse(order=(await self._do(replace)).order)

    async def _do(self, command: Command) -> Done:
        (outcome,) = await self._writer.do([command])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    # --- Reading ---

    async def GetOrder(
        self, request: pb.GetOrderRequest, context: Context
    ) -> pb.GetOrderResponse:
        checks.check_get_order(request)
        return pb.GetOrderResponse(order=await self._named(request))

    async def ListOrders(
        self, request: pb.ListOrdersRequest, context: Context
    ) -> pb.ListOrdersResponse:
        checks.check_list_orders(request)
        limit = request.page_size or PAGE
        start, place = begin(self._tokens, request)
        async with self._db.connection() as conn:
            rows = await queries.page(conn, request, start, place, limit + 1)
        response = pb.ListOrdersResponse(orders=rows[:limit])
        if len(rows) > limit:
            last = rows[limit - 1]
            response.next_page_token = token_behind(
                self._tokens, request, last.created_at, last.order_id
            )
        return response

    async def ListExecutions(
        self, request: pb.ListExecutionsRequest, context: Context
    ) -> pb.ListExecutionsResponse:
        checks.check_list_executions(request)
        limit = request.page_size or PAGE
        start, place = begin(self._tokens, request)
        async with self._db.connection() as conn:
            rows = await portfolio.list_executions(
                conn, request.filter, request.order_id, start, place, limit + 1
            )
        response = pb.ListExecutionsResponse(executions=rows[:limit])
        if len(rows) > limit:
            last = rows[limit - 1]
            response.next_page_token = token_behind(
                self._tokens, request, last.time, last.execution_id
            )
        return response

    async def GetLineage(
        self, request: pb.GetLineageRequest, context: Context
    ) -> pb.GetLineageResponse:
        checks.check_lineage(request)
        async with self._db.transaction("repeatable_read", readonly=True) as conn:
            signal, orders = await _origin(conn, request)
            ids = [order.order_id for order in orders]
            executions = await portfolio.executions_of(conn, ids, MAX_LINEAGE + 1)
        for what, count in (("orders", len(orders)), ("executions", len(executions))):
            if count > MAX_LINEAGE:
                raise ResultTooLarge(MAX_LINEAGE, what)
        traces = [signal.trace_id] if signal else []
        traces = [*traces, *(order.trace_id for order in orders)]
        traces = list(dict.fromkeys(filter(None, traces)))
        return pb.GetLineageResponse(
            signal=signal, orders=orders, executions=executions, trace_ids=traces
        )

    async def GetOrderLifecycle(
        self, request: pb.GetOrderLifecycleRequest, context: Context
    ) -> pb.GetOrderLifecycleResponse:
        return pb.GetOrderLifecycleResponse(transitions=lifecycle.TRANSITIONS)

    async def WatchOrders(
        self, request: pb.WatchOrdersRequest, context: Context
    ) -> AsyncIterator[Serialised]:
        checks.check_watch_orders(request)
        stream = OrderStream(self._db, self._logs, self._tokens, request)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message

    async def _named(self, request: Any) -> pb.Order:
        """Return the order that a request names. Raises UnknownOrder, also where it is
        not the caller's to see."""
        async with self._db.connection() as conn:
            if request.WhichOneof("id") == "order_id":
                name, metadata = request.order_id, {"order_id": request.order_id}
                order = await queries.order(conn, name)
            else:
                key = request.client_order_id.client_order_id
                name, metadata = repr(key), {"client_order_id": key}
                order = await _of_client(conn, request.client_order_id)
        if order is None or not may_see(order.strategy_id):
            raise UnknownOrder(name, **metadata)
        return order


def submit_or_error(order: pb.NewOrder, came: Origin) -> Submit | QuantplaneError:
    try:
        checks.check_new_order(order, at="")
    except InvalidRequest as error:
        return error
    return Submit(order, came, bool(bound()))


async def do_each(
    writer: Writer, commands: Sequence[Command | QuantplaneError]
) -> list[pb.OrderResult]:
    """Do the commands that are sound; return what came of each, in order."""
    sound = [each for each in commands if not isinstance(each, Exception)]
    outcomes = iter(await writer.do(sound))
    return [
        _result(each if isinstance(each, Exception) else next(outcomes))
        for each in commands
    ]


def _result(outcome: Outcome) -> pb.OrderResult:
    if isinstance(outcome, Done):
        return pb.OrderResult(order=outcome.order, duplicate=outcome.duplicate)
    if isinstance(outcome, QuantplaneError):
        return pb.OrderResult(reason=outcome.reason, message=str(outcome))
    raise outcome


async def _of_client(conn: Connection, id: pb.ClientOrderId) -> pb.Order | None:
    name = (id.strategy_id, id.client_order_id)
    key = (await queries.keys_of(conn, [name])).get(name)
    if key is None:
        return None
    orders = await queries.orders_at(conn, {key.order_id: key.created_at})
    return orders.get(key.order_id)


async def _origin(
    conn: Connection, request: pb.GetLineageRequest
) -> tuple[pb.Signal | None, list[pb.Order]]:
    """Return the signal, if there is one, and its orders: what the caller may see."""
    signal_id = request.signal_id
    if request.WhichOneof("id") == "order_id":
        order = await queries.order(conn, request.order_id)
        if order is None or not may_see(order.strategy_id):
            raise UnknownOrder(request.order_id, order_id=request.order_id)
        if not order.signal_id:
            return None, [order]
        signal_id = order.signal_id
    signal = (await signals.find(conn, [signal_id])).get(signal_id)
    if signal and not may_see(signal.strategy_id):
        signal = None
    if signal is None and request.WhichOneof("id") == "signal_id":
        raise UnknownSignal(signal_id)
    orders = await queries.of_signal(conn, signal_id, MAX_LINEAGE + 1)
    return signal, [order for order in orders if may_see(order.strategy_id)]
