"""What holds of the paper broker whatever it is told, and whenever it is killed."""

from collections import defaultdict
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantplane import v1 as pb
from quantplane_server.paper.book import Book, Commission, Report
from tests.paper import command, order, quote, said

BUY, SELL = pb.SIDE_BUY, pb.SIDE_SELL
IMMEDIATE = (pb.TIME_IN_FORCE_IOC, pb.TIME_IN_FORCE_FOK)
TOLERANCE = 1e-9

prices = st.integers(97, 103).map(float)
sometimes = st.one_of(st.none(), st.none(), prices)
mostly = st.one_of(prices, prices, prices, st.none())
sizes = st.integers(0, 12)
indexes = st.integers(0, 30)
quantities = st.sampled_from([0.1, 0.3, 1.0, 2.5, 7.0, 20.0])
lasting = st.sampled_from(pb.TimeInForce.values()[1:])
sides = st.sampled_from([BUY, SELL])
new = st.tuples(st.just("new"), sides, quantities, sometimes, sometimes, lasting)
see = st.tuples(st.just("see"), mostly, mostly, sizes, sizes)
other = st.one_of(
    st.tuples(st.just("cancel"), indexes),
    st.tuples(st.just("replace"), indexes, quantities, prices),
    st.tuples(st.just("expire"), indexes),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("kill"), st.integers(0, 6)),
)
step = st.sampled_from([new, see, see, other]).flatmap(lambda kind: kind)
steps = st.lists(step, min_size=10, max_size=40)
# An order's cancellation is lost, and its fill is not.
CUT_IOC = [
    ("new", BUY, 20.0, None, None, pb.TIME_IN_FORCE_IOC),
    ("see", 99.0, 101.0, 5, 5),
    ("kill", 3),
]
thorough = settings(max_examples=120, deadline=None)


class Server:
    """Keeps orders as reports tell them; checks each report when it arrives."""

    def __init__(self) -> None:
        self.orders: dict[str, pb.Order] = {}
        self.over: set[str] = set()
        self.fills: dict[str, dict[str, pb.ExecutionReport]] = defaultdict(dict)
        self.quotes: dict[int, pb.Quote] = {}

    def arrives(self, report: Report) -> None:
        told = self.orders[report.order_id]
        if isinstance(report, pb.ExecutionReport):
            self._fill(told, report)
            return
        match said(report):
            case "SUBMITTED":
                told.submitted_at.FromSeconds(1)
            case "ACKNOWLEDGED":
                assert told.broker_order_id in ("", report.broker_order_id)
                told.broker_order_id = report.broker_order_id
            case "TRIGGERED":
                shown = self.quotes[report.time.ToNanoseconds()]
                reached = shown.ask >= told.stop_price, shown.bid <= told.stop_price
                assert reached[told.side == SELL]
                told.triggered_at.CopyFrom(report.time)
            case "REPLACED":
                assert told.pending_terms.quantity >= told.filled_quantity
                told.quantity = told.pending_terms.quantity
                if told.HasField("price"):
                    told.price = told.pending_terms.price
                told.ClearField("pending_request")
            case "CANCELLED":
                assert told.order_id not in self.over, "it ends once"
                self.over.add(told.order_id)
            case _:
                told.ClearField("pending_request")
        if _left(told) == 0:
            self.over.add(told.order_id)

    def _fill(self, told: pb.Order, fill: pb.ExecutionReport) -> None:
        booked = self.fills[told.order_id]
        if fill.broker_exec_id in booked:
            assert fill == booked[fill.broker_exec_id]
            return
        assert told.order_id not in self.over, "nothing fills after the end"
        number, _, at_ns = fill.broker_exec_id.partition("@")
        named = self.quotes[int(at_ns)]
        assert int(number) == len(booked) + 1
        assert fill.time == named.time
        assert fill.price == (named.ask if told.side == BUY else named.bid)
        if told.HasField("price"):
            within = fill.price <= told.price, fill.price >= told.price
            assert within[told.side == SELL], "never through the limit"
        if told.HasField("stop_price"):
            assert told.HasField("triggered_at")
        assert 0 < fill.quantity <= _left(told), "never beyond the quantity"
        if told.time_in_force == pb.TIME_IN_FORCE_FOK:
            assert fill.quantity == told.quantity
        if told.time_in_force in IMMEDIATE:
            assert not booked, "at one quote or not at all"
        booked[fill.broker_exec_id] = fill
        told.filled_quantity += fill.quantity
        if _left(told) == 0:
            self.over.add(told.order_id)

    def snapshot(self) -> list[tuple[pb.BrokerCommand, int]]:
        """Return what a broker that starts now is told, and the fills of each order."""
        return [
            (command(_state(told), told, revision=0), len(self.fills[order_id]))
            for order_id, told in self.orders.items()
            if order_id not in self.over
        ]


class Broker:
    """A book whose reports are on their way until they are delivered."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.last: pb.Quote | None = None
        self.start()

    def start(self) -> None:
        self.book = Book(Commission())
        self.used: dict[tuple[int, int], float] = defaultdict(float)
        self.waiting: list[Report] = []
        for told, fills in self.server.snapshot():
            self._keep(self.book.take(told, fills))
        if self.last is not None:
            self.see(self.last)

    def see(self, shown: pb.Quote) -> None:
        self.last = shown
        self.server.quotes[shown.time.ToNanoseconds()] = shown
        self._keep(self.book.see(shown))

    def take(self, told: pb.BrokerCommand) -> None:
        self._keep(self.book.take(told))

    def deliver(self) -> None:
        for report in self.waiting:
            self.server.arrives(report)
        self.waiting.clear()

    def kill(self, delivered: int) -> None:
        """Lose the answers to so many reports, and all other reports; start again."""
        for report in self.waiting[:delivered]:
            self.server.arrives(report)
        self.start()

    def _keep(self, reports: list[Report]) -> None:
        for report in reports:
            if isinstance(report, pb.ExecutionReport):
                self._use(report)
        self.waiting += reports

    def _use(self, fill: pb.ExecutionReport) -> None:
        at_ns = fill.time.ToNanoseconds()
        named = self.server.quotes[at_ns]
        size = named.ask_size if fill.side == BUY else named.bid_size
        self.used[at_ns, fill.side] += fill.quantity
        assert not size or self.used[at_ns, fill.side] <= size + TOLERANCE


def _left(told: pb.Order) -> float:
    left = told.quantity - told.filled_quantity
    return left if left > TOLERANCE * told.quantity else 0.0


def _state(told: pb.Order) -> str:
    match told.pending_request:
        case pb.PENDING_REQUEST_CANCEL:
            return "CANCEL"
        case pb.PENDING_REQUEST_REPLACE:
            return "REPLACE"
    return "WORKING" if told.broker_order_id else "NEW"


def _submit(server: Server, broker: Broker, terms: Any) -> None:
    side, quantity, price, stop, lasts = terms
    made = order(
        len(server.orders) + 1,
        side=side,
        quantity=quantity,
        price=price,
        stop_price=stop,
        time_in_force=lasts,
    )
    server.orders[made.order_id] = made
    broker.take(command("NEW", made))


def _ask(server: Server, broker: Broker, kind: str, index: int, *terms: float) -> None:
    live = [told for key, told in server.orders.items() if key not in server.over]
    if not live:
        return
    told = live[index % len(live)]
    if kind == "expire":
        server.over.add(told.order_id)
        broker.waiting = [r for r in broker.waiting if r.order_id != told.order_id]
    elif kind == "cancel":
        told.pending_request = pb.PENDING_REQUEST_CANCEL
    elif told.pending_request or not told.broker_order_id:
        return
    else:
        told.pending_request = pb.PENDING_REQUEST_REPLACE
        quantity, price = terms
        told.pending_terms.CopyFrom(pb.Terms(quantity=quantity))
        if told.HasField("price"):
            told.pending_terms.price = price
    broker.take(command(kind.upper(), told))


@thorough
@given(steps)
@example(CUT_IOC)
def test_fills_are_within_every_limit_and_no_kill_doubles_or_loses_one(
    plan: list[Any],
):
    server = Server()
    broker = Broker(server)
    for number, (kind, *rest) in enumerate(plan):
        match kind:
            case "new":
                _submit(server, broker, rest)
            case "see":
                bid, ask, bid_size, ask_size = rest
                shown = quote(number, bid, ask, bid_size=bid_size, ask_size=ask_size)
                broker.see(shown)
            case "deliver":
                broker.deliver()
            case "kill":
                broker.kill(*rest)
            case _:
                _ask(server, broker, kind, *rest)
    broker.kill(len(broker.waiting))
    _everything_ends(server, broker)


def _everything_ends(server: Server, broker: Broker) -> None:
    """Show a market that every order can trade in: none may be left."""
    for number, price in ((100, 1e6), (101, -1e6), (102, 1e6), (103, -1e6)):
        broker.see(quote(number, price, price))
        broker.deliver()
    assert server.over == server.orders.keys()
    for told in server.orders.values():
        if told.time_in_force == pb.TIME_IN_FORCE_FOK and server.fills[told.order_id]:
            assert told.filled_quantity == told.quantity


@thorough
@given(steps)
def test_equal_commands_and_quotes_give_equal_reports(plan: list[Any]):
    assert _reports(plan) == _reports(plan)


def _reports(plan: list[Any]) -> list[Report]:
    server = Server()
    broker = Broker(server)
    for number, (kind, *rest) in enumerate(plan):
        if kind == "new":
            _submit(server, broker, rest)
        elif kind == "see":
            bid, ask, *_ = rest
            broker.see(quote(number, bid, ask))
    return broker.waiting
