"""Streams of the log of orders: events for whoever watches, commands for brokers."""

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from quantplane import v1 as pb
from quantplane_server.db import Connection
from quantplane_server.errors import ResultTooLarge
from quantplane_server.fanout import varint
from quantplane_server.log import Entry
from quantplane_server.log_stream import LogStream
from quantplane_server.orders import queries
from quantplane_server.origin import SERVER

MAX_LIVE = 100_000  # orders in a snapshot
CHUNK = 500  # of them in a response
EVENTS = b"\x12"  # the tag of the field `events`

COMMANDS = {
    pb.ORDER_EVENT_TYPE_CREATED: pb.BROKER_COMMAND_TYPE_NEW,
    pb.ORDER_EVENT_TYPE_CANCEL_REQUESTED: pb.BROKER_COMMAND_TYPE_CANCEL,
    pb.ORDER_EVENT_TYPE_REPLACE_REQUESTED: pb.BROKER_COMMAND_TYPE_REPLACE,
}
REQUESTS = {
    pb.PENDING_REQUEST_CANCEL: pb.BROKER_COMMAND_TYPE_CANCEL,
    pb.PENDING_REQUEST_REPLACE: pb.BROKER_COMMAND_TYPE_REPLACE,
}


class OrderLogStream(LogStream):
    """What both have in common: the filter and the live orders."""

    log = "orders"

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        *_, request = parts
        self._filter: pb.OrderFilter = request.filter
        self._strategies = frozenset(request.filter.strategy_ids)
        self._symbols = frozenset(request.filter.symbols)

    def wants(self, event: pb.OrderEvent) -> bool:
        order = event.order
        return (not self._strategies or order.strategy_id in self._strategies) and (
            not self._symbols or order.symbol in self._symbols
        )

    async def live(self, conn: Connection) -> list[Sequence[pb.Order]]:
        """Return the live orders by parts that a response can hold."""
        orders = await queries.live(conn, self._filter, MAX_LIVE + 1)
        if len(orders) > MAX_LIVE:
            raise ResultTooLarge(MAX_LIVE, "live orders")
        return [orders[n : n + CHUNK] for n in range(0, len(orders), CHUNK)]


class OrderStream(OrderLogStream):
    """The server's side of WatchOrders."""

    response = pb.WatchOrdersResponse

    async def snapshot(self, conn: Connection) -> Sequence[Message]:
        return [self.response(orders=orders) for orders in await self.live(conn)]

    def data(self, entries: Sequence[Entry]) -> bytes:
        wires = [entry.wire for entry in entries]
        return b"".join(EVENTS + varint(len(wire)) + wire for wire in wires)


class CommandStream(OrderLogStream):
    """The server's side of WatchBrokerCommands."""

    response = pb.WatchBrokerCommandsResponse

    async def snapshot(self, conn: Connection) -> Sequence[Message]:
        return [
            self.response(commands=map(outstanding, orders))
            for orders in await self.live(conn)
        ]

    def wants(self, event: pb.OrderEvent) -> bool:
        return super().wants(event) and bool(command_of(event))

    def data(self, entries: Sequence[Entry]) -> bytes:
        commands = [
            pb.BrokerCommand(
                type=kind,
                order=event.order,
                revision=event.revision,
                trace_id=event.trace_id,
                span_id=event.span_id,
            )
            for event in (entry.message for entry in entries)
            if (kind := command_of(event))
        ]
        return self.response(commands=commands).SerializeToString()


def command_of(event: pb.OrderEvent) -> pb.BrokerCommandType.ValueType | None:
    """Return what an event means to a broker, if anything."""
    if event.type == pb.ORDER_EVENT_TYPE_EXPIRED and event.actor == SERVER.actor:
        return pb.BROKER_COMMAND_TYPE_EXPIRE
    return COMMANDS.get(event.type)


def outstanding(order: pb.Order) -> pb.BrokerCommand:
    """Return what a live order needs from its broker now."""
    kind = REQUESTS.get(order.pending_request)
    if not kind:
        kind = pb.BROKER_COMMAND_TYPE_WORKING
        if order.status == pb.ORDER_STATUS_PENDING:
            kind = pb.BROKER_COMMAND_TYPE_NEW
    return pb.BrokerCommand(type=kind, order=order, trace_id=order.trace_id)
