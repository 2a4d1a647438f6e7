"""Lets a server's last words through while requests are being written.

When a write meets the end of its call, grpc.aio puts INTERNAL, "Internal error from
Core", in place of what the server said, and drops the responses that were not read yet:
https://github.com/grpc/grpc/issues/36066. Who is told INTERNAL tries again, and so a
feed that another has replaced would take its place back.
"""

from __future__ import annotations

from typing import Any

import grpc

# What Core refuses to begin (two writes at once, say) fails without ending the call.
REFUSED = "grpc_call_start_batch"


def heard(call: Any) -> Any:
    """Return a new call, which ends as its server says.

    A write that comes too late raises AioRpcError with the code UNKNOWN; `read` has the
    responses that are left, and then the server's error.
    """
    # An interceptor's call has none: it makes calls of its own.
    if hasattr(call, "_cython_call"):
        call._cython_call = _Core(call._cython_call)
    return call


class _Core:
    """gRPC's own half of a call, where failed writes do not tell how the call ended."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    async def send_serialized_message(self, message: bytes) -> None:
        try:
            await self._core.send_serialized_message(message)
        except grpc.aio.InternalError as error:
            if REFUSED in str(error):
                raise
            raise _too_late() from error


def _too_late() -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNKNOWN, nothing, nothing, "the call has ended; `read` says why"
    )
