"""Turns exceptions into google.rpc.Status, and lets nothing else out."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc

from quantplane_server.errors import InternalError, QuantplaneError
from quantplane_server.rpc.interceptor import Call
from quantplane_server.telemetry.logs import ERRORS_PER_S, Share

logger = logging.getLogger(__name__)


Translate = Callable[[Exception], QuantplaneError | None]


def errors_to_status(
    translate: Translate,
) -> Callable[[Call], AbstractAsyncContextManager[None]]:
    """Return the layer; `translate` knows what other exceptions mean to a caller.

    Those are told to the log, but not each of many: a backend that is away fails all.
    """
    share = Share(ERRORS_PER_S)

    def tell(call: Call, error: Exception, known: QuantplaneError | None) -> None:
        left_out = share.take()
        if left_out is None:
            return
        more = f" ({left_out:,} more before it)" if left_out else ""
        if known:
            logger.warning("%s: %s: %r%s", call.method, known, error, more)
        else:
            logger.error("%s failed%s", call.method, more, exc_info=error)

    @asynccontextmanager
    async def layer(call: Call) -> AsyncIterator[None]:
        try:
            yield
        except QuantplaneError as error:
            await _abort(call, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            known = translate(error)
            tell(call, error, known)
            await _abort(call, known or InternalError())

    return layer


async def _abort(call: Call, error: QuantplaneError) -> None:
    details = (("grpc-status-details-bin", error.status().SerializeToString()),)
    await call.context.abort(error.code, str(error), details)
