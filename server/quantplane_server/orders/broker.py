"""BrokerService: what gateways follow and report."""

from collections.abc import AsyncIterator

from quantplane import v1 as pb
from quantplane.v1 import broker_pb2_grpc as rpc
from quantplane_server.db import Database
from quantplane_server.errors import InvalidRequest, QuantplaneError
from quantplane_server.log import Logs
from quantplane_server.orders import checks
from quantplane_server.orders.commands import Change, Fill
from quantplane_server.orders.service import do_each
from quantplane_server.orders.streams import CommandStream
from quantplane_server.orders.writer import Writer
from quantplane_server.origin import Origin
from quantplane_server.rpc.interceptor import Context, Serialised
from quantplane_server.rpc.trace import origin
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens


class BrokerService(rpc.BrokerServiceServicer):
    """A report that is wrong holds up none of the others."""

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

    async def WatchBrokerCommands(
        self, request: pb.WatchBrokerCommandsRequest, context: Context
    ) -> AsyncIterator[Serialised]:
        checks.check_watch_commands(request)
        stream = CommandStream(self._db, self._logs, self._tokens, request)
        with self._streams.held(stream):
            async for message in stream.messages():
                yield message

    async def ReportOrderEvents(
        self, request: pb.ReportOrderEventsRequest, context: Context
    ) -> pb.ReportOrderEventsResponse:
        checks.check_batch(request.reports, "reports")
        came = origin(context)
        commands = [_change(report, came) for report in request.reports]
        results = await do_each(self._writer, commands)
        return pb.ReportOrderEventsResponse(results=results)

    async def ReportExecutions(
        self, request: pb.ReportExecutionsRequest, context: Context
    ) -> pb.ReportExecutionsResponse:
        checks.check_batch(request.reports, "reports")
        came = origin(context)
        commands = [_fill(report, came) for report in request.reports]
        results = await do_each(self._writer, commands)
        return pb.ReportExecutionsResponse(results=results)


def _change(report: pb.OrderReport, came: Origin) -> Change | QuantplaneError:
    try:
        checks.check_report(report)
    except InvalidRequest as error:
        return error
    return Change(report, came)


def _fill(report: pb.ExecutionReport, came: Origin) -> Fill | QuantplaneError:
    try:
        checks.check_execution(report)
    except InvalidRequest as error:
        return error
    return Fill(report, came)
