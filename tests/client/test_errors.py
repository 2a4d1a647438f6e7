import asyncio

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from quantplane import v1 as pb
from quantplane.errors import (
    describe,
    is_transient,
    metadata_of,
    reason_of,
    retry_s,
    violations_of,
)
from tests.client import refuse, serving, status

Code = grpc.StatusCode
REQUEST = pb.GetLatestQuotesRequest(symbols=["ES"])


async def error_of(code, reason="", violations=(), details=None, **metadata):
    """Return what the client gets when the server refuses a call so."""

    async def script(request, context):
        if details is not None:
            await context.abort(code, *details)
        await refuse(context, code, reason, violations, **metadata)
        yield

    async with serving(script) as (client, _):
        with pytest.raises(grpc.RpcError) as caught:
            await client.market_data.GetLatestQuotes(REQUEST)
    return caught.value


async def test_an_error_tells_its_reason():
    error = await error_of(Code.NOT_FOUND, "UNKNOWN_SYMBOL")
    assert reason_of(error) == "UNKNOWN_SYMBOL"


async def test_an_error_tells_its_metadata():
    error = await error_of(Code.NOT_FOUND, "UNKNOWN_SYMBOL", symbol="ES")
    assert metadata_of(error) == {"symbol": "ES"}


async def test_an_error_tells_every_violation():
    rules = [("symbol", "is empty"), ("interval", "is negative")]
    error = await error_of(Code.INVALID_ARGUMENT, "INVALID_FIELD", rules)
    assert violations_of(error) == rules


async def test_an_error_tells_when_to_try_again():
    told = Status()
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(1_500)
    told.details.add().Pack(info)
    trailing = (("grpc-status-details-bin", told.SerializeToString()),)
    error = await error_of(Code.RESOURCE_EXHAUSTED, details=("later", trailing))
    assert retry_s(error) == 1.5
    assert retry_s(await error_of(Code.NOT_FOUND)) == 0


async def test_an_error_from_elsewhere_has_no_reason_metadata_or_violations():
    error = await error_of(Code.NOT_FOUND)
    assert (reason_of(error), metadata_of(error), violations_of(error)) == ("", {}, [])


async def test_details_that_do_not_parse_are_no_details():
    trailing = (("grpc-status-details-bin", b"\xff"),)
    error = await error_of(Code.NOT_FOUND, details=("gone", trailing))
    assert reason_of(error) == ""


async def test_errors_of_synchronous_channels_tell_the_same():
    async def script(request, context):
        await refuse(context, Code.NOT_FOUND, "UNKNOWN_SYMBOL", symbol="ES")
        yield

    async with serving(script) as (client, _):

        def call():
            with grpc.insecure_channel(client.target) as channel:
                pb.MarketDataServiceStub(channel).GetLatestQuotes(REQUEST)

        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(call)
    assert reason_of(caught.value) == "UNKNOWN_SYMBOL"
    assert metadata_of(caught.value) == {"symbol": "ES"}


async def test_a_description_names_every_violation():
    rules = [("symbol", "is empty"), ("interval", "is negative")]
    error = await error_of(Code.INVALID_ARGUMENT, "INVALID_FIELD", rules)
    expected = "INVALID_FIELD: symbol: is empty; interval: is negative"
    assert describe(error) == expected


async def test_a_description_without_violations_is_what_the_server_said():
    error = await error_of(Code.NOT_FOUND, details=("no such thing",))
    assert describe(error) == "NOT_FOUND: no such thing"


async def test_a_description_includes_notes():
    error = await error_of(Code.NOT_FOUND, details=("gone",))
    error.add_note("batches 1 to 2 are lost")
    assert describe(error) == "NOT_FOUND: gone; batches 1 to 2 are lost"


@pytest.mark.parametrize(
    ("code", "reason", "transient"),
    [
        (Code.UNAVAILABLE, "", True),
        (Code.UNAVAILABLE, "DRAINING", True),
        (Code.CANCELLED, "", True),
        (Code.DEADLINE_EXCEEDED, "", True),
        (Code.INTERNAL, "", True),
        (Code.INTERNAL, "INTERNAL", False),
        (Code.UNKNOWN, "", True),
        (Code.UNKNOWN, "INTERNAL", False),
        (Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", True),
        (Code.RESOURCE_EXHAUSTED, "RESULT_TOO_LARGE", False),
        (Code.RESOURCE_EXHAUSTED, "", False),
        (Code.INVALID_ARGUMENT, "INVALID_FIELD", False),
        (Code.UNAUTHENTICATED, "", False),
        (Code.PERMISSION_DENIED, "", False),
        (Code.NOT_FOUND, "UNKNOWN_SYMBOL", False),
        (Code.ABORTED, "FEED_REPLACED", False),
        (Code.UNIMPLEMENTED, "", False),
    ],
)
def test_what_a_reconnect_can_cure_is_transient(code, reason, transient):
    trailing = grpc.aio.Metadata()
    if reason:
        trailing.add("grpc-status-details-bin", status(reason, (), {}))
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing)
    assert is_transient(error) is transient
