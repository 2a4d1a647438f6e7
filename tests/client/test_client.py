import typing

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool

from quantplane import Client
from quantplane import v1 as pb
from quantplane.client import RETRY, attribute_of, service_config, services
from quantplane.sync import Client as SyncClient
from tests.client import refuse, serving, silence

Code = grpc.StatusCode
LATEST = pb.GetLatestQuotesRequest(symbols=["ES"])
FOUND = pb.GetLatestQuotesResponse(quotes=[pb.Quote(symbol="ES", last=1)])


async def answers(request, context):
    yield FOUND


async def is_away(request, context):
    await refuse(context, Code.UNAVAILABLE, "BACKEND_UNAVAILABLE")
    yield


async def test_a_service_is_an_attribute_with_its_methods():
    async with serving(answers) as (client, server):
        assert await client.market_data.GetLatestQuotes(LATEST) == FOUND
    assert server.requests == [[LATEST]]


@pytest.mark.parametrize("client", [Client, SyncClient])
def test_every_service_is_declared_for_type_checkers(client):
    declared = typing.get_type_hints(client).keys()
    assert declared >= {attribute_of(service) for service, _ in services()}


def test_the_services_are_those_of_the_contract():
    market_data = pb.Quote.DESCRIPTOR.file.services_by_name["MarketDataService"]
    assert (market_data, pb.MarketDataServiceStub) in services()


async def test_the_target_comes_from_the_environment(monkeypatch):
    async with serving(answers) as (client, _):
        monkeypatch.setenv("QUANTPLANE_TARGET", client.target)
        async with Client() as second:
            assert await second.market_data.GetLatestQuotes(LATEST) == FOUND


async def test_without_any_target_it_is_the_server_of_this_machine(monkeypatch):
    monkeypatch.delenv("QUANTPLANE_TARGET", raising=False)
    async with Client() as client:
        assert client.target == "127.0.0.1:50051"


async def test_a_method_without_side_effects_is_retried_while_the_server_is_away():
    async with serving(is_away, is_away, answers) as (client, server):
        assert await client.market_data.GetLatestQuotes(LATEST) == FOUND
    assert server.requests == [[LATEST]] * 3


async def test_the_fifth_try_is_the_last():
    async with serving(*[is_away] * 5, answers) as (client, server):
        with pytest.raises(grpc.RpcError):
            await client.market_data.GetLatestQuotes(LATEST)
    assert len(server.requests) == 5


async def test_a_refusal_is_not_retried():
    async def refuses(request, context):
        await refuse(context, Code.INVALID_ARGUMENT, "INVALID_FIELD")
        yield

    async with serving(refuses, answers) as (client, server):
        with pytest.raises(grpc.RpcError):
            await client.market_data.GetLatestQuotes(LATEST)
    assert len(server.requests) == 1


async def never_answers(request, context):
    await silence()
    yield


async def test_a_call_without_a_timeout_ends_after_the_default(monkeypatch):
    monkeypatch.setattr("quantplane.client.TIMEOUT", "1s")
    async with serving(never_answers) as (client, _):
        with pytest.raises(grpc.RpcError) as caught:
            await client.market_data.GetLatestQuotes(LATEST)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED


async def test_a_call_without_a_server_waits_for_one(monkeypatch):
    monkeypatch.setattr("quantplane.client.TIMEOUT", "3s")
    monkeypatch.setitem(RETRY, "maxAttempts", 2)  # over long before
    async with serving() as (client, _):
        gone = client.target
    async with Client(gone) as client:
        with pytest.raises(grpc.RpcError) as caught:
            await client.market_data.GetLatestQuotes(LATEST)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED


async def test_a_response_may_be_larger_than_grpc_allows_by_default():
    large = pb.GetLatestQuotesResponse(unknown_symbols=["S" * 5_000_000])

    async def script(request, context):
        yield large

    async with serving(script) as (client, _):
        assert await client.market_data.GetLatestQuotes(LATEST) == large


def fake_service(**methods):
    """Return the descriptor of a service; each method is (options, streaming)."""
    file = descriptor_pb2.FileDescriptorProto(name="fake.proto", package="fake")
    file.message_type.add(name="Empty")
    service = file.service.add(name="FakeService")
    for name, (level, streaming) in methods.items():
        method = service.method.add(
            name=name,
            input_type=".fake.Empty",
            output_type=".fake.Empty",
            client_streaming="client" in streaming,
            server_streaming="server" in streaming,
        )
        if level:
            method.options.idempotency_level = level
    pool = DescriptorPool()
    pool.Add(file)
    return pool.FindServiceByName("fake.FakeService")


def retried(service):
    """Return the methods that the service config has something to say about."""
    return [
        name["method"]
        for config in service_config([service])["methodConfig"]
        for name in config["name"]
    ]


def test_only_unary_methods_that_may_be_repeated_are_retried():
    options = descriptor_pb2.MethodOptions
    service = fake_service(
        Undeclared=(None, ""),
        Unknown=(options.IDEMPOTENCY_UNKNOWN, ""),
        Reads=(options.NO_SIDE_EFFECTS, ""),
        Puts=(options.IDEMPOTENT, ""),
        Watches=(options.NO_SIDE_EFFECTS, "server"),
        Publishes=(options.IDEMPOTENT, "client server"),
    )
    assert retried(service) == ["Reads", "Puts"]


def test_a_service_without_such_methods_has_no_retries():
    assert retried(fake_service(Unknown=(None, ""))) == []
