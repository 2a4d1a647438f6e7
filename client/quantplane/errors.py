"""Reads what a quantplane error says beyond its gRPC code.

Every error of a quantplane server carries a google.rpc.Status with an ErrorInfo.
Its reason is one of `ErrorReason` without the prefix ERROR_REASON_; cause and cure
of each are documented in protos/quantplane/v1/errors.proto.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

Detail = TypeVar("Detail", bound=Message)


def reason_of(error: grpc.RpcError) -> str:
    """Return for example "INVALID_FIELD"; "" if no quantplane server sent `error`."""
    return next((info.reason for info in _details(error, ErrorInfo)), "")


def metadata_of(error: grpc.RpcError) -> dict[str, str]:
    """Return what the reason's documentation calls its metadata."""
    return next((dict(info.metadata) for info in _details(error, ErrorInfo)), {})


def violations_of(error: grpc.RpcError) -> list[tuple[str, str]]:
    """Return (field, description) of each rule that the request breaks."""
    return [
        (violation.field, violation.description)
        for request in _details(error, BadRequest)
        for violation in request.field_violations
    ]


def retry_s(error: grpc.RpcError) -> float:
    """Return in how many seconds the server wants it tried again; 0: it did not say."""
    waits = (info.retry_delay for info in _details(error, RetryInfo))
    return next((wait.ToMilliseconds() / 1_000 for wait in waits), 0.0)


def describe(error: grpc.RpcError) -> str:
    """Return what went wrong as one line for people."""
    violations = "; ".join(f"{field}: {text}" for field, text in violations_of(error))
    text = violations or error.details() or "no details"
    notes = getattr(error, "__notes__", [])
    return "; ".join([f"{reason_of(error) or error.code().name}: {text}", *notes])


def is_transient(error: grpc.RpcError) -> bool:
    """Say whether a stream that ended with `error` is worth opening again.

    What a server of ours refuses has a reason. INTERNAL and UNKNOWN without one
    come from the transport (a reset, a GOAWAY) and pass; RESOURCE_EXHAUSTED
    without one is a message beyond a size limit and never does.
    """
    match error.code():
        case (
            grpc.StatusCode.UNAVAILABLE
            | grpc.StatusCode.CANCELLED
            | grpc.StatusCode.DEADLINE_EXCEEDED
        ):
            return True
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return not reason_of(error)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return reason_of(error) not in ("", "RESULT_TOO_LARGE")
        case _:
            return False


def _details(error: grpc.RpcError, kind: type[Detail]) -> Iterator[Detail]:
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            for packed in _status(value).details:
                detail = kind()
                if packed.Unpack(detail):
                    yield detail


def _status(value: bytes) -> Status:
    try:
        return Status.FromString(value)
    except DecodeError:  # some proxy's; the error itself still says enough
        return Status()
