"""Turns exceptions into google.rpc.Status, and lets nothing else out."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc

from quantplane_server.errors import InternalError, QuantplaneError
from quantplane_server.rpc.interceptor import Call

logger = logging.getLogger(__name__)


Translate = Callable[[Exception], QuantplaneError | None]


def errors_to_status(
    translate: Translate,
) -> Callable[[Call], AbstractAsyncContextManager[None]]:
    """Return the layer; `translate` knows what other exceptions mean to a caller."""

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        try:
            yield
        except QuantplaneError as error:
            await _abort(call, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if known := translate(error):
                logger.warning("%s: %s: %r", call.method, known, error)
            else:
                logger.exception("%s failed", call.method)
            await _abort(call, known or InternalError())

    return layer


async def _abort(call: Call, error: QuantplaneError) -> None:
    details = (("grpc-status-details-bin", error.status().SerializeToString()),)
    await call.context.abort(error.code, str(error), details)
