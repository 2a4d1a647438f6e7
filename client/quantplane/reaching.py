"""Why a server can't be reached, which calls that wait for it never tell."""

import logging
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


async def say_when_cut_off(
    channel: grpc.aio.Channel, logger: logging.Logger, who: str
) -> None:
    """Return once it is said that the server can't be reached, and why."""
    while True:
        state = channel.get_state()
        if is_cut_off(channel) and (why := await why_cut_off(channel)):
            logger.warning("%s: the server can't be reached: %s", who, why)
            return
        await channel.wait_for_state_change(state)
