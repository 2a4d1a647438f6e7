"""Turns exceptions into google.rpc.Status, and lets nothing else out."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc

from quantplane_server.errors import (
    BackendUnavailable,
    InternalError,
    QuantplaneError,
)
from quantplane_server.rpc.interceptor import Call

logger = logging.getLogger(__name__)


def errors_to_status(
    unavailable: tuple[type[Exception], ...],
) -> Callable[[Call], AbstractAsyncContextManager[None]]:
    """Return the layer; `unavailable` are the errors of backends that are away."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        try:
            yield
        except QuantplaneError as error:
            await _abort(call, error)
        except unavailable as error:
            logger.warning("%s: backend unavailable: %r", call.method, error)
            await _abort(call, BackendUnavailable())
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("%s failed", call.method)
            await _abort(call, InternalError())

    return layer


async def _abort(call: Call, error: QuantplaneError) -> None:
    details = (("grpc-status-details-bin", error.status().SerializeToString()),)
    await call.context.abort(error.code, str(error), details)
