"""Why a server can't be reached, which calls that wait for it never tell."""

from typing import Any

import grpc

from quantplane.errors import describe
from quantplane.tls import explain

AT_ONCE_S = 1.0


def is_cut_off(channel: grpc.aio.Channel) -> bool:
    """Tell whether a channel has no connection, and the last try to get one failed."""
    return channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE


async def why_cut_off(channel: grpc.aio.Channel) -> str:
    """Return why a channel is cut off; "" if it is no longer."""
    call: Any = channel.unary_unary("/")  # fails at once, and never leaves
    try:
        await call(b"", timeout=AT_ONCE_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return explain(error) or describe(error)
    return ""
