"""grpc.reflection.v1alpha, as long as the server serves."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_reflection.v1alpha.reflection import aio

from quantplane_server.rpc.interceptor import Context
from quantplane_server.streams import Batches, Streams


class Reflection(aio.ReflectionServicer):  # type: ignore[misc]
    """Tells which services there are; ends when the server drains."""

    def __init__(self, names: Iterable[str], streams: Streams) -> None:
        super().__init__(names)
        self._streams = streams

    async def ServerReflectionInfo(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[Any]:
        batches = Batches(requests)
        with self._streams.held(batches):
            async for response in super().ServerReflectionInfo(batches, context):
                yield response
