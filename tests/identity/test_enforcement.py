"""Every method of the contract, whoever calls it: allowed or refused."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from quantplane import metadata_of, reason_of, retry_s
from quantplane import v1 as pb
from quantplane_server import main
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.errors import PermissionDenied, Unauthenticated
from quantplane_server.identity import directory, keys, refusals
from quantplane_server.identity.refusals import Refusals
from quantplane_server.main import serving
from quantplane_server.principal import PRINCIPAL, Principal
from quantplane_server.rpc import auth
from quantplane_server.rpc.caller import Caller
from quantplane_server.rpc.errors import errors_to_status
from quantplane_server.rpc.interceptor import Interceptor
from quantplane_server.rpc.limits import Limits
from quantplane_server.rpc.rules import Rule, confine, names_strategies
from quantplane_server.tokens import purpose
from tests.conftest import Server
from tests.identity.callers import (
    METHODS,
    Channel,
    Metadata,
    People,
    bearer,
    channel,
    message,
    named,
    path,
    people_of,
)
from tests.orders import new_order
from tests.rpc.certificates import Authority, tls_of
from tests.signals import signal

ROLES = ["admin", "trader", "viewer", "strategy", "feed", "broker", "nobody"]
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
SCOPES = pb.StrategyScope
LIST_SYMBOLS, WATCH_ORDERS = named("ListSymbols"), named("WatchOrders")


def said(method: MethodDescriptor) -> Any:
    return method.GetOptions().Extensions


def of_scope(name: str) -> list[MethodDescriptor]:
    wanted = SCOPES.Value(f"STRATEGY_SCOPE_{name}")
    return [m for m in METHODS if said(m)[pb.strategy_scope] == wanted]


@pytest.fixture(autouse=True)
def any_number_of_wrong_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "WRONG_AT_ONCE", 10_000)
    monkeypatch.setattr(directory, "REST_S", 0)


@pytest.fixture
async def people(dsn: str) -> AsyncIterator[People]:
    async with people_of(dsn) as people:
        yield people


@pytest.fixture
async def calls(server: Server) -> AsyncIterator[Channel]:
    async with channel(server.target) as opened:
        yield opened


# --- What the contract says ---------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_says_who_may_call_it(method: MethodDescriptor):
    options = said(method)
    permission = options[pb.permission]
    ways = [
        bool(permission.resource and permission.action),
        options[pb.open_to_known],
        options[pb.open_to_all],
    ]
    assert ways.count(True) == 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_says_which_strategies_it_is_about(method: MethodDescriptor):
    scope = said(method)[pb.strategy_scope]
    assert scope != pb.STRATEGY_SCOPE_UNSPECIFIED
    if scope == pb.STRATEGY_SCOPE_REQUEST:
        assert names_strategies(method.input_type)
    if scope == pb.STRATEGY_SCOPE_NONE:
        assert not names_strategies(method.input_type)
        assert not names_strategies(method.output_type) or method.name == "WhoAmI"


# --- Roles --------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_call_what_the_table_permits(
    role: str, calls: Channel, people: People
):
    permitted = {(of, what) for r, of, what in await people.permissions() if r == role}
    answers = await calls.answers(await people.key(role))
    allowed = {p for p, answer in answers.items() if answer != "PERMISSION_DENIED"}
    assert allowed == {path(m) for m in METHODS if may(permitted, m)}
    assert "UNAUTHENTICATED" not in {
        answer for p, answer in answers.items() if not said(by_path(p))[pb.open_to_all]
    }
    assert "UNIMPLEMENTED" not in answers.values()


def by_path(wanted: str) -> MethodDescriptor:
    return next(method for method in METHODS if path(method) == wanted)


def may(permitted: set[tuple[str, str]], method: MethodDescriptor) -> bool:
    needed = said(method)[pb.permission]
    if not needed.resource:
        return True
    either = {(of, do) for of in (needed.resource, "*") for do in (needed.action, "*")}
    return bool(either & permitted)


async def test_every_role_of_the_migrations_is_walked(people: People):
    assert {role for role, *_ in await people.permissions()} < set(ROLES)


# --- Credentials --------------------------------------------------------------------

NOW = datetime(2024, 1, 1, tzinfo=UTC)
NUMBERS = count(1)


async def none(people: People) -> Metadata:
    return ()


async def an_expired_key(people: People) -> Metadata:
    return await people.key("admin", expires_at=NOW)


async def a_revoked_key(people: People) -> Metadata:
    return await people.key("admin", revoked_at=NOW)


async def a_key_of_a_disabled_user(people: People) -> Metadata:
    user_id = await people.user("disabled", "admin")
    await people.conn.execute(
        "UPDATE users SET is_active = false WHERE user_id = $1", user_id
    )
    return await people.key("admin", user_id=user_id)


async def a_tampered_key(people: People) -> Metadata:
    ((_, value),) = await people.key("admin")
    return bearer(value.removeprefix("Bearer ")[:-1] + "!")


async def an_unknown_key(people: People) -> Metadata:
    return bearer(keys.new_secret())


async def the_hash_of_a_key(people: People) -> Metadata:
    secret = keys.new_secret()
    await people.key("admin", key_hash=keys.hash_of(secret))
    return bearer("qp_" + keys.hash_of(secret).hex())


async def another_scheme(people: People) -> Metadata:
    ((name, value),) = await people.key("admin")
    return ((name, value.replace("Bearer", "Basic")),)


async def two_credentials(people: People) -> Metadata:
    sent = await people.key("admin")
    return (*sent, *sent)


async def nothing_after_the_scheme(people: People) -> Metadata:
    return bearer("")


async def token(people: People, **changed: Any) -> Metadata:
    """Return an access token that is good but for what is changed."""
    now = int(datetime.now(UTC).timestamp())
    key_id, secret = await people.conn.fetchrow(
        "SELECT key_id, secret FROM signing_keys LIMIT 1"
    )
    user_id = await people.user(f"jane{next(NUMBERS)}", "admin")
    session = "00000000-0000-7000-8000-000000000001"
    algorithm = changed.pop("algorithm", "HS256")
    secret = changed.pop("secret", secret)
    if changed.pop("ended", False):
        await people.conn.execute(
            "INSERT INTO sessions (session_id, user_id, secret_hash, expires_at,"
            " ended_at) VALUES ($1, $2, '', now() + '1 day', now())",
            *(session, user_id),
        )
    claims = {"sub": user_id, "sid": session, "iat": now, "exp": now + 60} | changed
    if algorithm == "none":
        secret = None
    return bearer(jwt.encode(claims, secret, algorithm, headers={"kid": key_id}))


async def an_expired_token(people: People) -> Metadata:
    return await token(people, iat=1, exp=2)


async def a_token_of_the_future(people: People) -> Metadata:
    return await token(people, iat=4_000_000_000, exp=4_000_000_060)


async def an_unsigned_token(people: People) -> Metadata:
    return await token(people, algorithm="none")


async def a_token_signed_by_another(people: People) -> Metadata:
    return await token(people, secret=b"x" * 32)


async def a_token_of_nobody(people: People) -> Metadata:
    return await token(people, sub="00000000-0000-7000-8000-000000000000")


async def a_token_of_an_ended_session(people: People) -> Metadata:
    return await token(people, ended=True)


BAD = [
        none, an_expired_key, a_revoked_key, a_key_of_a_disabled_user, a_tampered_key,
        an_unknown_key, the_hash_of_a_key, another_scheme, two_credentials,
        nothing_after_the_scheme, an_expired_token, a_token_of_the_future,
        an_unsigned_token, a_token_signed_by_another, a_token_of_nobody,
        a_token_of_an_ended_session,
    ]  # fmt: skip


async def test_whoever_is_not_known_may_call_only_what_is_open_to_all(
    calls: Channel, people: People
):
    closed = [method for method in METHODS if not said(method)[pb.open_to_all]]
    for credential in BAD:
        sent = await credential(people)
        answers = {method.name: await calls.answer(method, sent) for method in closed}
        wrong = {name for name in answers if answers[name] != "UNAUTHENTICATED"}
        assert not wrong, (credential, answers)


async def test_a_good_token_is_let_in(calls: Channel, people: People):
    assert await calls.answer(LIST_SYMBOLS, await token(people)) == "OK"


async def test_what_is_wrong_with_a_credential_is_not_told(
    calls: Channel, people: People
):
    texts = set()
    for credential in (none, a_revoked_key, an_unknown_key, an_expired_token):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.response(LIST_SYMBOLS, await credential(people))
        texts.add(raised.value.details())
    assert len(texts) == 1


async def test_a_key_may_be_used_at_once(calls: Channel, people: People):
    for _ in range(5):
        assert await calls.answer(LIST_SYMBOLS, await people.key("admin")) == "OK"


async def test_a_role_that_is_refused_is_told_what_it_lacks(
    calls: Channel, people: People
):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await calls.response(named("SubmitOrder"), await people.key("viewer"))
    assert metadata_of(raised.value) == {"resource": "orders", "action": "create"}


async def test_a_method_without_options_is_closed_to_everybody(
    server: Server, people: People
):
    async with guarded({}, None) as (opened, _):
        assert await opened.answer(LIST_SYMBOLS, bearer("any")) == REFUSED[1]


async def test_health_and_reflection_need_no_credential(server: Server):
    async with grpc.aio.insecure_channel(server.target) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([ask]))
        assert (await call.read()).list_services_response.service


async def test_nobody_serves_without_credentials_beyond_loopback(settings: Settings):
    open_to_anybody = {"auth": False, "listen": "0.0.0.0:0", "insecure": True}
    with pytest.raises(ValueError, match="QUANTPLANE_AUTH"):
        async with serving(settings.model_copy(update=open_to_anybody)):
            pass


# --- Keys that are bound to a strategy ----------------------------------------------


@pytest.fixture
async def mine(people: People) -> Metadata:
    return await people.key("admin", strategy_id="mine")


@pytest.fixture
async def admin(people: People) -> Metadata:
    return await people.key("admin")


async def test_a_bound_key_may_not_call_what_is_about_all_strategies(
    calls: Channel, mine: Metadata
):
    for method in of_scope("ALL"):
        assert await calls.answer(method, mine) == "PERMISSION_DENIED", method.name


async def test_a_bound_key_may_call_all_else(calls: Channel, mine: Metadata):
    closed = {path(method) for method in of_scope("ALL")}
    for name, answer in (await calls.answers(mine)).items():
        assert name in closed or answer != "PERMISSION_DENIED", name


async def test_a_bound_key_may_not_name_another_strategy(
    calls: Channel, mine: Metadata
):
    for method in of_scope("REQUEST"):
        fill(request := message(method), "other")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.response(method, mine, request)
        assert reason_of(raised.value) == "PERMISSION_DENIED", method.name
        assert metadata_of(raised.value) == {"strategy_id": "mine"}
        fill(request := message(method), "mine")
        answer = await calls.answer(method, mine, request)
        assert answer != "PERMISSION_DENIED", method.name


def fill(request: Any, strategy_id: str) -> None:
    """Name a strategy wherever a request can."""
    for field in request.DESCRIPTOR.fields:
        value = getattr(request, field.name)
        if field.name == "strategy_id":
            request.strategy_id = strategy_id
        elif field.name == "strategy_ids":
            value.append(strategy_id)
        elif names_strategies(field.message_type):
            fill(value.add() if hasattr(value, "add") else value, strategy_id)


async def test_one_other_strategy_among_many_is_too_many(
    calls: Channel, mine: Metadata
):
    wanted = pb.OrderFilter(strategy_ids=["mine", "other"])
    request = pb.ListOrdersRequest(filter=wanted)
    assert await calls.answer(named("ListOrders"), mine, request) == REFUSED[1]
    orders = [new_order(strategy_id=name) for name in ("mine", "other")]
    batch = pb.SubmitOrdersRequest(orders=orders)
    assert await calls.answer(named("SubmitOrders"), mine, batch) == REFUSED[1]


@pytest.fixture
async def theirs(calls: Channel, admin: Metadata) -> dict[str, Any]:
    """An order, its signal and a strategy, each of two strategies."""
    made: dict[str, Any] = {}
    for name in ("mine", "other"):
        sent = signal(strategy_id=name, symbol="A")
        await calls.response(
            named("PublishSignals"), admin, pb.PublishSignalsRequest(signals=[sent])
        )
        order = new_order(strategy_id=name, signal_id=sent.signal_id)
        response = await calls.response(
            named("SubmitOrder"), admin, pb.SubmitOrderRequest(order=order)
        )
        made[name] = response.order
        strategy = pb.Strategy(strategy_id=name, name=name, type="test")
        await calls.response(
            named("CreateStrategy"), admin, pb.CreateStrategyRequest(strategy=strategy)
        )
    return made


def about(order: pb.Order) -> list[tuple[str, Any]]:
    """Return every request that finds an order or its signal."""
    by_client = pb.ClientOrderId(
        strategy_id=order.strategy_id, client_order_id=order.client_order_id
    )
    names = ({"order_id": order.order_id}, {"client_order_id": by_client})
    signal = {"signal_id": order.signal_id}
    return [
        *(("GetOrder", pb.GetOrderRequest(**name)) for name in names),
        *(("ReplaceOrder", pb.ReplaceOrderRequest(price=1, **n)) for n in names),
        *(("CancelOrder", pb.CancelOrderRequest(**name)) for name in names),
        ("GetLineage", pb.GetLineageRequest(order_id=order.order_id)),
        ("GetLineage", pb.GetLineageRequest(**signal)),
        ("GetSignal", pb.GetSignalRequest(**signal)),
        ("CancelSignal", pb.CancelSignalRequest(**signal)),
    ]


async def test_what_is_of_another_strategy_is_not_there_for_a_bound_key(
    calls: Channel, mine: Metadata, theirs: dict[str, pb.Order]
):
    for name, request in about(theirs["other"]):
        answer = await calls.answer(named(name), mine, request)
        assert answer in ("UNKNOWN_ORDER", "UNKNOWN_SIGNAL"), request
    for name, request in about(theirs["mine"]):
        answer = await calls.answer(named(name), mine, request)
        assert answer in ("OK", "ILLEGAL_TRANSITION"), (answer, request)


def test_every_method_that_finds_things_is_among_these():
    walked = {name for name, _ in about(pb.Order())} | {"ListStrategies"}
    assert {method.name for method in of_scope("RESOURCE")} == walked


async def test_a_bound_key_lists_what_is_its_own(
    calls: Channel, mine: Metadata, theirs: dict[str, pb.Order]
):
    orders = await calls.response(named("ListOrders"), mine)
    assert [order.strategy_id for order in orders.orders] == ["mine"]
    signals = await calls.response(named("ListSignals"), mine)
    assert [signal.strategy_id for signal in signals.signals] == ["mine"]
    strategies = await calls.response(named("ListStrategies"), mine)
    assert [each.strategy_id for each in strategies.strategies] == ["mine"]
    one = await calls.response(named("GetStrategy"), mine)
    assert one.strategy.strategy_id == "mine"


async def test_executions_of_another_strategy_s_order_are_not_there(
    calls: Channel, mine: Metadata, admin: Metadata, theirs: dict[str, pb.Order]
):
    order = theirs["other"]
    fill = pb.ExecutionReport(
        order_id=order.order_id, broker_exec_id="e", symbol=order.symbol,
        side=order.side, quantity=1, price=1, type=pb.ORDER_EVENT_TYPE_TRADE,
    )  # fmt: skip
    fill.time.FromDatetime(NOW)
    reports = pb.ReportExecutionsRequest(reports=[fill])
    (done,) = (await calls.response(named("ReportExecutions"), admin, reports)).results
    assert done.order.filled_quantity == 1, done
    listed = pb.ListExecutionsRequest(order_id=order.order_id)
    method = named("ListExecutions")
    assert len((await calls.response(method, admin, listed)).executions) == 1
    assert not (await calls.response(method, mine, listed)).executions


async def test_a_bound_key_streams_what_is_its_own(
    calls: Channel, mine: Metadata, theirs: dict[str, pb.Order]
):
    stream = calls.begin(WATCH_ORDERS, mine)
    seen = []
    while not (response := await stream.read()).event.HasField("snapshot_complete"):
        seen += [order.strategy_id for order in response.orders]
    stream.cancel()
    assert seen == ["mine"]


@pytest.mark.parametrize("name", ["SubmitOrder", "ValidateOrder"])
async def test_a_signal_of_another_strategy_is_not_there_for_a_bound_key_s_order(
    name: str, calls: Channel, mine: Metadata, admin: Metadata, theirs: Any
):
    order = new_order(strategy_id="mine", signal_id=theirs["other"].signal_id)
    request = message(named(name), order=order)
    assert await calls.answer(named(name), mine, request) == "UNKNOWN_SIGNAL"
    assert await calls.answer(named(name), admin, request) == "SIGNAL_MISMATCH"


async def test_a_page_token_of_another_strategy_is_no_good(
    calls: Channel, mine: Metadata, admin: Metadata, theirs: dict[str, pb.Order]
):
    for name in ("ListOrders", "ListSignals", "ListStrategies"):
        first = message(named(name), page_size=1)
        response = await calls.response(named(name), admin, first)
        assert response.next_page_token
        first.page_token = response.next_page_token
        assert await calls.answer(named(name), mine, first) == "INVALID_PAGE_TOKEN"
        assert await calls.answer(named(name), admin, first) == "OK"


@pytest.mark.parametrize(
    "name", ["WatchOrders", "WatchSignals", "WatchStrategies", "WatchPortfolio"]
)
async def test_a_resume_token_of_another_strategy_is_no_good(
    name: str, calls: Channel, people: People, mine: Metadata
):
    other = await people.key("admin", strategy_id="other")
    stream = calls.begin(named(name), other)
    while not (response := await stream.read()).resume_token:
        pass
    stream.cancel()
    request = message(named(name), resume_token=response.resume_token)
    assert await calls.answer(named(name), mine, request) == "INVALID_RESUME_TOKEN"
    assert await calls.answer(named(name), other, request) == "OK"


def test_a_token_of_the_same_request_is_another_one_for_a_bound_key():
    request = pb.ListStrategiesRequest()
    free = purpose(request)
    before = PRINCIPAL.set(Principal("", "", "", strategy_id="mine"))
    assert purpose(request) != free
    PRINCIPAL.reset(before)


async def test_each_message_of_a_stream_is_looked_at():
    rule = Rule(open_to_known=True, scope=pb.STRATEGY_SCOPE_REQUEST, is_stream=True)
    seen: list[Any] = []
    async with guarded({"/test.Test/Each": rule}, seen) as (_, target):
        async with grpc.aio.insecure_channel(target) as opened:
            call = opened.stream_stream(
                "/test.Test/Each",
                request_serializer=pb.SubmitOrderRequest.SerializeToString,
            )(metadata=bearer("mine"))
            for name in ("mine", "", "other", "mine"):
                await call.write(
                    pb.SubmitOrderRequest(order=pb.NewOrder(strategy_id=name))
                )
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await call.read():
                    pass
    assert reason_of(raised.value) == "PERMISSION_DENIED"
    assert [request.order.strategy_id for request in seen] == ["mine", "mine"]


class Known:
    """A directory that knows everybody, bound to the strategy that the token names."""

    changed: list[Callable[[], None]] = []  # noqa: RUF012

    def find(self, token: str) -> Any:
        return Principal("u", "anybody", "admin", "k", token.removeprefix("any"))

    named = find

    def current(self, known: Any) -> Any:
        return known

    def permits(self, role: str, resource: str, action: str) -> bool:
        return True

    async def refresh(self) -> None: ...


def guarded(rules: dict[str, Rule], seen: list[Any] | None) -> Any:
    """Serve methods of the test's own behind a guard; yields calls, and the target."""

    async def each(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            assert seen is not None
            seen.append(request)
            yield b"{}"

    async def one(request: Any, context: Any) -> Any:
        return pb.ListSymbolsResponse()

    @asynccontextmanager
    async def served() -> AsyncIterator[tuple[Channel, str]]:
        guard = auth.Guard(Known(), rules, Limits(10, 10), False, lambda *_: None)
        layer = errors_to_status(lambda error: None)
        server = grpc.aio.server(interceptors=[Interceptor(layer, guard)])
        handlers = {
            "Each": grpc.stream_stream_rpc_method_handler(
                each, request_deserializer=pb.SubmitOrderRequest.FromString
            )
        }
        _, service, name = path(LIST_SYMBOLS).split("/")
        listed = {
            name: grpc.unary_unary_rpc_method_handler(
                one,
                request_deserializer=pb.ListSymbolsRequest.FromString,
                response_serializer=pb.ListSymbolsResponse.SerializeToString,
            )
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("test.Test", handlers),
                grpc.method_handlers_generic_handler(service, listed),
            )
        )
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with channel(target) as opened:
            yield opened, target
        await server.stop(0)

    return served()


def test_a_filter_that_is_left_out_is_of_the_own_strategy():
    for kind in (pb.ListOrdersRequest, pb.WatchSignalsRequest):
        confine(request := kind(), "mine")
        assert list(request.filter.strategy_ids) == ["mine"]


def test_of_either_way_to_name_a_thing_the_other_one_stays_as_it_is():
    confine(request := pb.GetOrderRequest(order_id="o"), "mine")
    assert request == pb.GetOrderRequest(order_id="o")
    named = pb.ClientOrderId(strategy_id="other")
    with pytest.raises(PermissionDenied):
        confine(pb.GetOrderRequest(client_order_id=named), "mine")


# --- Cutting off --------------------------------------------------------------------

KEY = "WHERE key_hash = $1"
CUT_OFF = {
    "revoked": (f"UPDATE api_keys SET revoked_at = now() {KEY}", REFUSED[0]),
    "deleted": (f"DELETE FROM api_keys {KEY}", REFUSED[0]),
    "expiring": (
        f"UPDATE api_keys SET expires_at = now() + interval '0.3 s' {KEY}",
        REFUSED[0],
    ),
    "disabled": (
        "UPDATE users SET is_active = false"
        f" WHERE user_id = (SELECT user_id FROM api_keys {KEY})",
        REFUSED[0],
    ),
    "role changed": (f"UPDATE api_keys SET role = 'feed' {KEY}", REFUSED[1]),
    "bound": (f"UPDATE api_keys SET strategy_id = 'other' {KEY}", REFUSED[1]),
    "permission gone": (
        "DELETE FROM permissions WHERE role = 'strategy' AND $1 <> ''::bytea",
        REFUSED[1],
    ),
}


@pytest.mark.parametrize("change", CUT_OFF)
async def test_a_change_ends_open_streams_on_every_server(
    change: str, settings: Settings, people: People
):
    statement, reason = CUT_OFF[change]
    sent = await people.key("strategy")
    other = await people.key("admin")
    streams = [WATCH_ORDERS, named("WatchSignals")]
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(settings)) for _ in "12"]
        opened = [await stack.enter_async_context(channel(each)) for each in servers]
        cut = [each.begin(method, sent) for each in opened for method in streams]
        spared = [each.begin(WATCH_ORDERS, other) for each in opened]
        for stream in (*cut, *spared):
            await stream.read()
        secret = sent[0][1].removeprefix("Bearer ")
        await people.conn.execute(statement, keys.hash_of(secret))
        for stream in cut:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await stream.read():
                    pass
            assert reason_of(raised.value) == reason
        for each in opened:
            answer = await each.answer(WATCH_ORDERS, sent)
            assert answer == (reason if change != "bound" else "OK")
        for stream in spared:
            assert not stream.done()
            stream.cancel()


async def test_the_end_of_a_session_ends_its_streams(calls: Channel, people: People):
    sent = await token(people)
    stream = calls.begin(WATCH_ORDERS, sent)
    await stream.read()
    await people.conn.execute(
        "INSERT INTO sessions (session_id, user_id, secret_hash, expires_at)"
        " SELECT '00000000-0000-7000-8000-000000000001', user_id, '',"
        " now() + '1 day' FROM users WHERE username LIKE 'jane%'"
    )
    await people.conn.execute("UPDATE sessions SET ended_at = now()")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        while await stream.read():
            pass
    assert reason_of(raised.value) == "UNAUTHENTICATED"


async def test_a_feed_is_cut_off_too(calls: Channel, people: People):
    sent = await people.key("feed")
    method = named("PublishQuotes")
    stream = calls.opened.stream_stream(
        path(method),
        request_serializer=pb.PublishQuotesRequest.SerializeToString,
        response_deserializer=pb.PublishQuotesResponse.FromString,
    )(metadata=sent)
    await stream.write(pb.PublishQuotesRequest(feed="f"))
    await stream.read()
    await people.conn.execute("UPDATE api_keys SET revoked_at = now()")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        while await stream.read():
            pass
    assert reason_of(raised.value) == "UNAUTHENTICATED"


async def test_what_is_granted_is_permitted(calls: Channel, people: People):
    sent = await people.key("nobody")
    assert await calls.answer(LIST_SYMBOLS, sent) == "PERMISSION_DENIED"
    await people.conn.execute(
        "INSERT INTO permissions VALUES (0, 'nobody', '*', 'read')"
    )
    while await calls.answer(LIST_SYMBOLS, sent) != "OK":
        await asyncio.sleep(0.05)


async def test_that_a_key_was_used_is_noted(
    settings: Settings, people: People, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(directory, "NOTE_S", 0.1)
    sent = await people.key("admin")
    async with serving(settings) as target, channel(target) as calls:
        await calls.answer(LIST_SYMBOLS, sent)
        used = "SELECT count(*) FROM api_keys WHERE last_used_at IS NOT NULL"
        while not await people.conn.fetchval(used):
            await asyncio.sleep(0.05)


# --- Limits -------------------------------------------------------------------------


async def limited(settings: Settings, stack: AsyncExitStack, **limits: int) -> Channel:
    own = settings.model_copy(update=limits)
    return await stack.enter_async_context(
        channel(await stack.enter_async_context(serving(own)))
    )


async def test_who_calls_too_often_is_told_when_to_call_again(
    settings: Settings, people: People, admin: Metadata
):
    async with AsyncExitStack() as stack:
        calls = await limited(settings, stack, max_calls_per_s=1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while True:
                await calls.response(LIST_SYMBOLS, admin)
        assert reason_of(raised.value) == "RATE_LIMITED"
        assert metadata_of(raised.value) == {"limit": "1"}
        assert 0 < retry_s(raised.value) <= 1
        assert await calls.answer(LIST_SYMBOLS, await people.key("admin")) == "OK"


async def test_who_has_too_many_calls_under_way_waits_for_one_to_end(
    settings: Settings, people: People, admin: Metadata
):
    async with AsyncExitStack() as stack:
        calls = await limited(settings, stack, max_calls=1)
        stream = calls.begin(WATCH_ORDERS, admin)
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls.response(LIST_SYMBOLS, admin)
        assert reason_of(raised.value) == "RATE_LIMITED"
        assert retry_s(raised.value)
        assert await calls.answer(LIST_SYMBOLS, await people.key("admin")) == "OK"
        stream.cancel()
        while await calls.answer(LIST_SYMBOLS, admin) != "OK":
            pass


async def test_wrong_credentials_of_an_address_are_slowed_down_and_good_ones_are_not(
    settings: Settings, admin: Metadata, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(auth, "WRONG_AT_ONCE", 3)
    async with AsyncExitStack() as stack:
        calls = await limited(settings, stack)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while True:
                wrong = bearer(keys.new_secret())
                answer = await calls.answer(LIST_SYMBOLS, wrong)
                if answer != "UNAUTHENTICATED":
                    await calls.response(LIST_SYMBOLS, wrong)
        assert reason_of(raised.value) == "RATE_LIMITED"
        assert 0 < retry_s(raised.value) <= 1
        assert await calls.answer(LIST_SYMBOLS, admin) == "OK"


# --- What the audit log says of refused calls ---------------------------------------


@pytest.fixture
async def noted(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Refusals]:
    """What the server has refused, to be entered when the test says so."""
    db = await Database.open(dsn)
    noted = Refusals(db)
    monkeypatch.setattr(main, "Refusals", lambda reference: noted)
    yield noted
    await db.close()


async def entry(people: People) -> Any:
    (row,) = await people.conn.fetch(
        "SELECT *, host(ip_address) AS address FROM audit_logs WHERE action = 'refuse'"
    )
    return row


async def test_calls_that_are_not_permitted_are_entered_with_who_made_them(
    noted: Refusals, calls: Channel, people: People
):
    sent = await people.key("viewer")
    for _ in range(3):
        await calls.answer(named("SubmitOrder"), sent)
    await noted.enter()
    row = await entry(people)
    assert row["user_id"] is not None
    assert row["resource_id"] == path(named("SubmitOrder"))
    assert json.loads(row["new_value"]) == {
        "reason": "PERMISSION_DENIED", "calls": 3,
        "resource": "orders", "action": "create",
    }  # fmt: skip


async def test_wrong_credentials_are_entered_by_address_and_without_themselves(
    noted: Refusals, calls: Channel, people: People
):
    secret = keys.new_secret()
    await calls.answer(LIST_SYMBOLS, bearer(secret))
    await calls.answer(WATCH_ORDERS, ())
    await noted.enter()
    row = await entry(people)
    assert row["user_id"] is None
    assert row["address"] == "127.0.0.1"
    assert json.loads(row["new_value"]) == {"reason": "UNAUTHENTICATED", "calls": 2}
    assert secret not in str(row)


async def test_refused_calls_of_too_many_kinds_are_not_all_entered(
    noted: Refusals,
    people: People,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(refusals, "MOST", 2)
    for number in range(5):
        noted.note(Caller(address=f"10.0.0.{number}"), "", Unauthenticated())
    await noted.enter()
    assert await people.conn.fetchval("SELECT count(*) FROM audit_logs") == 2
    assert "3 refused calls are not entered" in caplog.text


# --- Certificates -------------------------------------------------------------------


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


async def shown(
    settings: Settings, ca: Authority, name: str | None, sent: Metadata = ()
) -> str:
    """Return what a call is told that comes with a certificate of this name."""
    own = settings.model_copy(update=tls_of(ca.sign(), ca.file))
    cert, key = ca.sign("strategy.desk.test", common_name=name)
    credentials = grpc.ssl_channel_credentials(
        ca.file.read_bytes(), key.read_bytes(), cert.read_bytes()
    )
    async with (
        serving(own) as target,
        grpc.aio.secure_channel(target, credentials) as opened,
    ):
        return await Channel(opened).answer(LIST_SYMBOLS, sent)


async def test_a_certificate_stands_for_the_user_that_it_names(
    settings: Settings, ca: Authority, people: People
):
    await people.user("jane", "admin")
    await people.user("joe", "viewer")
    assert await shown(settings, ca, "jane") == "OK"
    assert await shown(settings, ca, "joe") == "PERMISSION_DENIED"
    assert await shown(settings, ca, "nobody") == "UNAUTHENTICATED"
    assert await shown(settings, ca, None) == "UNAUTHENTICATED"


async def test_a_key_counts_before_a_certificate(
    settings: Settings, ca: Authority, people: People
):
    await people.user("jane", "admin")
    assert await shown(settings, ca, "jane", await people.key("viewer")) == REFUSED[1]
    wrong = bearer(keys.new_secret())
    assert await shown(settings, ca, "jane", wrong) == "UNAUTHENTICATED"


async def test_a_certificate_of_a_disabled_user_is_no_good(
    settings: Settings, ca: Authority, people: People
):
    await people.user("jane", "admin")
    await people.conn.execute("UPDATE users SET is_active = false")
    assert await shown(settings, ca, "jane") == "UNAUTHENTICATED"
