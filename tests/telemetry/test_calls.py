"""Spans of calls: which there are, how they hang together, what they say."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import grpc
import pytest

from quantplane import Client, sync
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.orders import writer
from tests.faults import until
from tests.identity.desk import HASH, PASSWORD
from tests.models import heston
from tests.options import chain
from tests.options import publish as publish_chains
from tests.options import quote as option
from tests.orders import execution, new_order, submit
from tests.reference import configuration, strategy
from tests.signals import signal
from tests.telemetry.receiver import Received, Receiver

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ID = "01890000-0000-7000-8000-000000000001"


def under(flags: str = "01", **more: str) -> Any:
    """Return the metadata of a call that is made in a span of TRACE."""
    header = ("traceparent", f"00-{TRACE}-{SPAN}-{flags}")
    return (header, *more.items())


# --- The tree -----------------------------------------------------------------------


async def test_an_order_has_a_span_for_each_step_of_its_call(
    client: Client, receiver: Receiver, tracer: Any
):
    with tracer.start_as_current_span("decide"):
        await submit(client)
    decide = await receiver.one("decide")
    # Neither is waited for by who is answered.
    await receiver.one("announce orders")
    await receiver.one("OrderService/SubmitOrder", kind="SERVER")
    assert receiver.tree(decide) == (
        "decide",
        [
            (
                "OrderService/SubmitOrder",  # of the client
                [
                    (
                        "OrderService/SubmitOrder",  # of the server
                        [
                            (
                                "write orders",
                                [
                                    "SELECT strategies",
                                    "INSERT order_keys",
                                    ("announce orders", ["PUBLISH"]),
                                ],
                            )
                        ],
                    )
                ],
            )
        ],
    )
    assert {span.trace for span in receiver.spans} == {decide.trace}


async def log_in(client: Client) -> Any:
    request = pb.LoginRequest(username="ann", password=PASSWORD)
    return await client.without_credentials().Login(request)


async def put_ann(settings: Settings) -> None:
    assert settings.postgres_dsn
    conn = await asyncpg.connect(settings.postgres_dsn)
    await conn.execute(
        "INSERT INTO users (username, email, password_hash, role)"
        " VALUES ('ann', 'ann@desk', $1, 'viewer')",
        HASH,
    )
    await conn.close()


Call = Callable[[Client], Awaitable[Any]]
MAIN: dict[str, tuple[Call, list[str], dict[str, Any]]] = {
    # Of each service its main call, some of the spans below it, and what it names.
    "AuthService/Login": (log_in, ["SELECT users"], {}),
    "UserService/ListUsers": (
        lambda client: client.user.ListUsers(pb.ListUsersRequest()),
        ["SELECT users"],
        {},
    ),
    "MarketDataService/GetLatestQuotes": (
        lambda client: client.market_data.GetLatestQuotes(
            pb.GetLatestQuotesRequest(symbols=["A", "B"])
        ),
        ["FCALL quantplane_snapshot"],
        {"symbols": ["A", "B"]},
    ),
    "OptionsService/GetOptionChain": (
        lambda client: client.options.GetOptionChain(
            pb.GetOptionChainRequest(underlying="U")
        ),
        ["SELECT options_chains"],
        {"symbol": "U"},
    ),
    "ModelService/PublishHeston": (
        lambda client: client.model.PublishHeston(
            pb.PublishHestonRequest(parameters=[heston("A")])
        ),
        ["INSERT heston_parameters", "PUBLISH"],
        {"symbol": "A"},
    ),
    "SignalService/PublishSignals": (
        lambda client: client.signal.PublishSignals(
            pb.PublishSignalsRequest(signals=[signal(signal_id=ID)])
        ),
        ["BEGIN", "INSERT signal_keys", "INSERT signals", "COMMIT"],
        {"symbol": "A", "strategy_id": "s", "signal_id": ID},
    ),
    "OrderService/SubmitOrder": (
        submit,
        ["write orders"],
        {"symbol": "A", "strategy_id": "s"},
    ),
    "BrokerService/ReportExecutions": (
        lambda client: client.broker.ReportExecutions(
            pb.ReportExecutionsRequest(
                reports=[execution(pb.Order(order_id=ID, symbol="A"), 1)]
            )
        ),
        [],
        {"symbol": "A", "order_id": ID},
    ),
    "PortfolioService/GetPortfolio": (
        lambda client: client.portfolio.GetPortfolio(pb.GetPortfolioRequest()),
        ["SELECT positions"],
        {},
    ),
    "StrategyService/CreateStrategy": (
        lambda client: client.strategy.CreateStrategy(
            pb.CreateStrategyRequest(strategy=strategy("s"))
        ),
        ["INSERT strategies", "INSERT audit_logs"],
        {"strategy_id": "s"},
    ),
    "ConfigurationService/CreateConfiguration": (
        lambda client: client.configuration.CreateConfiguration(
            pb.CreateConfigurationRequest(configuration=configuration())
        ),
        ["INSERT configurations"],
        {},
    ),
    "AuditService/ListAuditLogs": (
        lambda client: client.audit.ListAuditLogs(pb.ListAuditLogsRequest()),
        ["SELECT audit_logs"],
        {},
    ),
    "AdminService/GetServerInfo": (
        lambda client: client.admin.GetServerInfo(pb.GetServerInfoRequest()),
        ["INFO"],
        {},
    ),
}


@pytest.mark.parametrize("name", MAIN)
async def test_the_main_call_of_a_service_has_its_spans(
    client: Client, receiver: Receiver, tracer: Any, settings: Settings, name: str
):
    call, below, named = MAIN[name]
    await put_ann(settings)
    if name == "OptionsService/GetOptionChain":
        await publish_chains(client, chain(0, option(100), underlying="U"))
    with tracer.start_as_current_span("decide"):
        await call(client)
    root = await receiver.one("decide")
    served = await receiver.one(name, kind="SERVER")
    attributes = served.attributes
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.method"] == f"quantplane.v1.{name}"
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["client.address"] == "127.0.0.1"
    assert attributes["user_agent.original"].startswith("grpc-python")
    if name != "AuthService/Login":
        assert attributes["quantplane.user"] == "test"
        (called,) = receiver.children(root)
        assert (called.name, called.kind, called.service) == (
            name,
            "CLIENT",
            "strategy",
        )
        assert served.parent == called.id
    assert {key: attributes.get(f"quantplane.{key}") for key in named} == named
    children = {child.name for child in receiver.children(served)}
    assert children >= set(below), children
    assert "error.type" not in attributes


async def test_a_statement_says_what_it_does_and_where(
    client: Client, receiver: Receiver
):
    await client.audit.ListAuditLogs(pb.ListAuditLogsRequest())
    statement = await receiver.one("SELECT audit_logs")
    assert statement.kind == "CLIENT"
    attributes = statement.attributes
    assert attributes.pop("db.namespace").startswith("test_")
    assert attributes == {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.collection.name": "audit_logs",
        "db.query.summary": "SELECT audit_logs",
    }


async def test_a_command_of_redis_says_what_it_does(client: Client, receiver: Receiver):
    request = pb.GetLatestQuotesRequest(symbols=["A", "B", "C", "D", "E", "F"])
    await client.market_data.GetLatestQuotes(request)
    command = await receiver.one("FCALL quantplane_snapshot")
    assert command.kind == "CLIENT"
    assert command.attributes.pop("db.operation.batch.size") > 1
    assert command.attributes["db.system.name"] == "redis"
    assert command.attributes["db.operation.name"] == "PIPELINE FCALL"
    assert command.attributes["db.stored_procedure.name"].endswith("_snapshot")


class Gate:
    """Keeps orders from being written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = asyncio.Event()
        self._writer: Any = None
        commit = writer.Writer._commit

        async def held(writer: Any, commands: Any, taken: bool) -> Any:
            self._writer = writer
            await self._open.wait()
            return await commit(writer, commands, taken)

        monkeypatch.setattr(writer.Writer, "_commit", held)

    async def reached(self) -> None:
        await until(lambda: self._writer, "an order to be written")

    async def waiting(self, count: int) -> None:
        """Return once so many orders wait for those that are held."""
        waiting = self._writer._rounds._waiting
        await until(lambda: len(waiting) == count, f"{count} orders to wait")

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


async def test_orders_that_share_a_transaction_share_its_span(
    client: Client, receiver: Receiver, gate: Gate
):
    first = asyncio.create_task(submit(client))
    await gate.reached()
    others = [asyncio.create_task(submit(client)) for _ in range(3)]
    await gate.waiting(3)
    gate.open()
    await asyncio.gather(first, *others)
    calls = await receiver.some("OrderService/SubmitOrder", 4)
    _, together = await receiver.some("write orders", 2)
    assert len({call.trace for call in calls}) == 4
    assert len(together.links) == 2
    assert {together.parent, *together.links} < {call.id for call in calls}
    assert "INSERT order_keys" in [one.name for one in receiver.children(together)]


async def test_an_order_that_is_not_sampled_is_written_in_nobodys_trace(
    client: Client, receiver: Receiver, gate: Gate
):
    first = asyncio.create_task(submit(client))
    await gate.reached()
    request = pb.SubmitOrderRequest(order=new_order())
    silent = client.order.SubmitOrder(request, metadata=under("00"))
    await gate.waiting(1)
    gate.open()
    await asyncio.gather(first, silent)
    await client.auth.WhoAmI(pb.WhoAmIRequest())
    await receiver.one("AuthService/WhoAmI")
    for statement in ("SELECT strategies", "INSERT order_keys"):
        assert len(receiver.named(statement)) == 1


async def test_who_waits_for_a_connection_shows_it(
    client: Client, receiver: Receiver, settings: Settings
):
    assert settings.pool_size < 100
    request = pb.ListAuditLogsRequest()
    await asyncio.gather(*(client.audit.ListAuditLogs(request) for _ in range(100)))
    waited = await receiver.one("wait for a connection")
    calls = await receiver.some("AuditService/ListAuditLogs", 100, kind="SERVER")
    assert waited.parent in {call.id for call in calls}


# --- Which trace --------------------------------------------------------------------


async def test_the_span_of_the_caller_is_the_parent(client: Client, receiver: Receiver):
    request = pb.SubmitOrderRequest(order=new_order())
    await client.order.SubmitOrder(request, metadata=under(tracestate="desk=1"))
    served = await receiver.one("OrderService/SubmitOrder")
    assert (served.trace, served.parent) == (TRACE, SPAN)
    assert served.span.trace_state == "desk=1"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        "x" * 5_000,
    ],
)
async def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(
    client: Client, receiver: Receiver, header: str
):
    metadata = (("traceparent", header),)
    await client.auth.WhoAmI(pb.WhoAmIRequest(), metadata=metadata)
    served = await receiver.one("AuthService/WhoAmI")
    assert (served.trace != TRACE, served.parent) == (True, "")


async def test_a_call_in_a_span_that_is_not_sampled_has_no_span(
    client: Client, receiver: Receiver
):
    request = pb.SubmitOrderRequest(order=new_order())
    response = await client.order.SubmitOrder(request, metadata=under("00"))
    assert response.order.trace_id == TRACE  # yet it is known where it comes from
    await client.auth.WhoAmI(pb.WhoAmIRequest())
    await receiver.one("AuthService/WhoAmI")
    assert not receiver.named("OrderService/SubmitOrder")
    assert not receiver.named("write orders")


async def test_without_a_traceparent_the_order_has_the_trace_of_its_call(
    client: Client, receiver: Receiver
):
    order = await submit(client)
    served = await receiver.one("OrderService/SubmitOrder")
    assert order.trace_id == served.trace


async def test_a_call_without_asyncio_is_made_in_the_span_of_its_thread(
    target: str, receiver: Receiver, tracer: Any
):
    def decide() -> None:
        with sync.Client(target) as client, tracer.start_as_current_span("decide"):
            client.order.SubmitOrder(pb.SubmitOrderRequest(order=new_order()))

    await asyncio.to_thread(decide)
    decided = await receiver.one("decide")
    called = await receiver.one("OrderService/SubmitOrder", kind="CLIENT")
    served = await receiver.one("OrderService/SubmitOrder", kind="SERVER")
    assert (called.parent, served.parent) == (decided.id, called.id)


async def test_a_caller_that_names_a_trace_itself_is_taken_at_its_word(
    client: Client, receiver: Receiver, tracer: Any
):
    request = pb.WhoAmIRequest()
    await client.auth.WhoAmI(request, metadata=under())
    served = await receiver.one("AuthService/WhoAmI")
    assert (served.trace, served.parent) == (TRACE, SPAN)


# --- How it ended -------------------------------------------------------------------


async def refused(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


async def test_a_mistake_of_the_caller_is_no_failure_of_the_server(
    client: Client, receiver: Receiver, tracer: Any
):
    await refused(submit(client, quantity=-1))
    served = await receiver.one("OrderService/SubmitOrder", kind="SERVER")
    called = await receiver.one("OrderService/SubmitOrder", kind="CLIENT")
    assert served.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert not served.failed
    assert called.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert called.attributes["error.type"] == "INVALID_ARGUMENT"
    assert called.failed


async def test_a_failure_of_the_server_is_one(
    client: Client, receiver: Receiver, settings: Settings
):
    assert settings.postgres_dsn
    conn = await asyncpg.connect(settings.postgres_dsn)
    await conn.execute("DROP TABLE orders CASCADE")
    await conn.close()
    assert await refused(submit(client)) is grpc.StatusCode.INTERNAL
    served = await receiver.one("OrderService/SubmitOrder")
    assert (served.failed, served.attributes["error.type"]) == (True, "INTERNAL")
    statement = await receiver.one("INSERT order_keys")
    assert statement.failed
    assert statement.attributes["error.type"] == "UndefinedTableError"
    assert statement.attributes["db.response.status_code"] == "42P01"


async def test_a_caller_that_is_not_known_has_a_span(
    target: str, client: Client, receiver: Receiver
):
    async with grpc.aio.insecure_channel(target) as channel:
        call = pb.OrderServiceStub(channel).SubmitOrder(pb.SubmitOrderRequest())
        assert await refused(call) is grpc.StatusCode.UNAUTHENTICATED
    served = await receiver.one("OrderService/SubmitOrder")
    assert served.attributes["rpc.response.status_code"] == "UNAUTHENTICATED"
    assert "quantplane.user" not in served.attributes


async def test_a_caller_that_gives_up_is_seen_to(
    client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    begun = asyncio.Event()

    async def never(*_: Any) -> Any:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(writer.Writer, "validate", never)
    request = pb.ValidateOrderRequest(order=new_order())
    call = client.order.ValidateOrder(request)
    await begun.wait()
    call.cancel()
    served = await receiver.one("OrderService/ValidateOrder")
    assert served.attributes["rpc.response.status_code"] == "CANCELLED"
    late = client.order.ValidateOrder(request, timeout=0.2)
    assert await refused(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    _, served = await receiver.some("OrderService/ValidateOrder", 2)
    assert served.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"


# --- What is not said ---------------------------------------------------------------


async def test_no_span_has_a_secret_a_price_or_a_quantity(
    client: Client, receiver: Receiver, tracer: Any, settings: Settings
):
    await put_ann(settings)
    tokens = (await log_in(client)).tokens
    await submit(client, quantity=4711.25, price=815.75)
    await receiver.one("announce orders")
    await receiver.one("AuthService/Login", kind="SERVER")
    sent = b"".join(request.SerializeToString() for request in receiver.requests)
    secrets = (PASSWORD, tokens.access_token, tokens.refresh_token, "qp_", "Bearer")
    assert not [secret for secret in secrets if secret.encode() in sent]
    values = {str(it) for span in receiver.spans for it in span.attributes.values()}
    assert not {"4711.25", "815.75"} & values


async def test_at_most_ten_symbols_are_named(client: Client, receiver: Receiver):
    symbols = [f"S{number}" for number in range(1_000)]
    request = pb.GetLatestQuotesRequest(symbols=symbols)
    await client.market_data.GetLatestQuotes(request)
    served = await receiver.one("MarketDataService/GetLatestQuotes")
    assert served.attributes["quantplane.symbols"] == symbols[:10]


def services(spans: list[Received]) -> set[str]:
    return {span.service for span in spans}


async def test_spans_name_the_service_that_made_them(
    client: Client, receiver: Receiver, tracer: Any
):
    await submit(client)
    await receiver.one("OrderService/SubmitOrder", kind="SERVER")
    await receiver.one("OrderService/SubmitOrder", kind="CLIENT")
    assert services(receiver.spans) == {"quantplane", "strategy"}
