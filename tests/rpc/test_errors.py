"""What callers and operators see when backends are away."""

import re
from time import monotonic
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from quantplane import Client, reason_of
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.embedded import Postgres, Valkey
from quantplane_server.main import serving
from quantplane_server.rpc.health import check
from tests.conftest import Server
from tests.market_data import Sender, quote
from tests.postgres import database

MARKET_DATA = "quantplane.v1.MarketDataService"
Status = health_pb2.HealthCheckResponse.ServingStatus


async def watched(target: str, service: str, wanted: str) -> None:
    """Return once the health service says `wanted` of a service."""
    async with grpc.aio.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        async for response in health_pb2_grpc.HealthStub(channel).Watch(request):
            if Status.Name(response.status) == wanted:
                return


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code(), reason_of(error), str(error.details())


async def test_health_follows_the_backends_and_calls_say_which_errors_pass(
    settings: Any,
):
    async with Postgres() as postgres, Valkey() as valkey:
        async with database(postgres.dsn) as dsn:
            own = settings.model_copy(
                update={"postgres_dsn": dsn, "redis_url": valkey.url}
            )
            async with serving(own) as target, Client(target) as client:
                await watched(target, "", "SERVING")
                await watched(target, MARKET_DATA, "SERVING")

                await postgres.kill()
                await watched(target, "", "NOT_SERVING")
                await watched(target, MARKET_DATA, "SERVING")  # the bus buffers
                call = client.market_data.ListBars(pb.ListBarsRequest(symbol="A"))
                code, reason, text = await refused(call)
                assert code == grpc.StatusCode.UNAVAILABLE
                assert reason == "BACKEND_UNAVAILABLE"
                assert "postgres" not in text.lower() and "/" not in text

                await postgres.start()
                await watched(target, "", "SERVING")
                call = client.market_data.ListBars(pb.ListBarsRequest(symbol="A"))
                assert (await refused(call))[1] == "UNKNOWN_SYMBOL"

                await valkey.kill()
                await watched(target, MARKET_DATA, "NOT_SERVING")
                sender = Sender(client.market_data.PublishQuotes())
                await sender.send(pb.PublishQuotesRequest(feed="f"))
                assert (await refused(sender.next()))[1] == "BACKEND_UNAVAILABLE"

                await valkey.start()
                await watched(target, MARKET_DATA, "SERVING")
                sender = Sender(client.market_data.PublishQuotes())
                await sender.send(pb.PublishQuotesRequest(feed="f"))
                await sender.next()
                batch = pb.PublishQuotesRequest(batch=1, quotes=[quote("A", 1)])
                await sender.send(batch)
                while not (await sender.next()).accepted_through:
                    pass


async def test_a_defect_is_told_without_its_details(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
):
    async def broken(*_: Any) -> None:
        raise ValueError("SELECT secret FROM /etc/passwd")

    monkeypatch.setattr("quantplane_server.market_data.queries.symbols_after", broken)
    call = client.market_data.ListSymbols(pb.ListSymbolsRequest())
    assert await refused(call) == (
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        "internal error; the server's log has the details",
    )


async def test_the_log_tells_some_of_many_errors_and_how_many_more_there_were(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    async def broken(*_: Any) -> None:
        raise ValueError

    def said() -> list[str]:
        logger = "quantplane_server.rpc.errors"
        return [r.getMessage() for r in caplog.records if r.name == logger]

    monkeypatch.setattr("quantplane_server.rpc.errors.ERRORS_PER_S", 1)
    monkeypatch.setattr("quantplane_server.market_data.queries.symbols_after", broken)
    made = 0
    began_s = monotonic()
    async with serving(settings) as target, Client(target) as client:
        while not any("more before it" in line for line in said()):
            with pytest.raises(grpc.aio.AioRpcError):
                await client.market_data.ListSymbols(pb.ListSymbolsRequest())
            made += 1
    left_out = int(re.findall(r"\((\d+) more", said()[-1])[0])
    assert 0 < left_out == made - len(said())
    assert len(said()) <= monotonic() - began_s + 1


async def test_reflection_names_the_services(server: Server):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for response in stub.ServerReflectionInfo(iter([request])):
            names = {s.name for s in response.list_services_response.service}
    assert {MARKET_DATA, "grpc.health.v1.Health"} <= names


async def test_the_health_command_tells_serving_from_unreachable(server: Server):
    await watched(server.target, "", "SERVING")
    assert await check(server.target) == "SERVING"
    assert await check("127.0.0.1:1") == "UNREACHABLE"
