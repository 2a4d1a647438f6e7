"""Reports on their way to the server."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

from quantplane import Client
from quantplane import v1 as pb
from quantplane.retry import answered
from quantplane.tracing import caused_by
from quantplane_server.paper.book import Report

logger = logging.getLogger(__name__)

BATCH = 1_000  # reports, in one call
CAUSES = 10_000  # commands that are remembered


class Cause(NamedTuple):
    """The call that gave a command."""

    trace_id: str
    span_id: str


class Outbox:
    """Keeps each report until the server has answered it.

    An order's reports arrive in order, and so do all executions. What is added while
    a call is under way goes with the next one.
    """

    LIMIT = 10_000  # reports; beyond them `room` waits

    def __init__(self, client: Client) -> None:
        self._client = client
        self._reports: dict[int, Report] = {}
        self._causes: dict[str, Cause] = {}  # by order, of its last command
        self._numbers = count()
        self._changed = asyncio.Event()

    def add(self, reports: Iterable[Report]) -> None:
        self._reports.update(zip(self._numbers, reports, strict=False))
        self._tell()

    def caused(self, command: pb.BrokerCommand) -> None:
        """Have later reports of an order belong to the trace of its last command."""
        order_id = command.order.order_id
        self._causes.pop(order_id, None)
        if command.span_id:
            self._causes[order_id] = Cause(command.trace_id, command.span_id)
        if len(self._causes) > CAUSES:
            del self._causes[next(iter(self._causes))]

    async def room(self) -> None:
        """Wait until there are fewer reports than the limit."""
        while len(self._reports) >= self.LIMIT:
            await self._changed.wait()

    async def empty(self) -> None:
        """Wait until every report is answered."""
        while self._reports:
            await self._changed.wait()

    async def run(self) -> None:
        """Send for ever. Raises AioRpcError if the server refuses a whole call."""
        broker = self._client.broker
        while True:
            while not self._reports:
                await self._changed.wait()
            if numbers := sendable(self._reports, pb.OrderReport):
                request = pb.ReportOrderEventsRequest(reports=self._these(numbers))
                with caused_by(self._causes_of(numbers)):
                    response = await answered(broker.ReportOrderEvents, request)
                self._settle(numbers, response.results)
            if numbers := sendable(self._reports, pb.ExecutionReport):
                fills = pb.ReportExecutionsRequest(reports=self._these(numbers))
                with caused_by(self._causes_of(numbers)):
                    booked = await answered(broker.ReportExecutions, fills)
                self._settle(numbers, booked.results)

    def _causes_of(self, numbers: Iterable[int]) -> list[Cause]:
        orders = (self._reports[number].order_id for number in numbers)
        return [self._causes[order] for order in orders if order in self._causes]

    def _these(self, numbers: Sequence[int]) -> Any:
        return [self._reports[number] for number in numbers]

    def _settle(
        self, numbers: Sequence[int], results: Iterable[pb.OrderResult]
    ) -> None:
        for number, result in zip(numbers, results, strict=True):
            report = self._reports.pop(number)
            if result.reason:
                what = pb.OrderEventType.Name(report.type)
                what = what.removeprefix("ORDER_EVENT_TYPE_")
                order = report.order_id
                logger.warning("%s of %s was refused: %s", what, order, result.message)
        self._tell()

    def _tell(self) -> None:
        """Wake everyone who waits for a change."""
        self._changed.set()
        self._changed.clear()


def sendable(reports: dict[int, Report], kind: type[Report]) -> list[int]:
    """Return the numbers of those of a kind that wait for none of the other."""
    waiting: set[str] = set()  # orders
    chosen: list[int] = []
    for number, report in reports.items():
        if isinstance(report, kind) and report.order_id not in waiting:
            chosen.append(number)
            if len(chosen) == BATCH:
                break
        elif kind is pb.ExecutionReport and isinstance(report, kind):
            break  # later ones would overtake it
        else:
            waiting.add(report.order_id)
    return chosen
