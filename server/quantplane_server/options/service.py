"""OptionsService."""

from quantplane.v1 import options_pb2_grpc as rpc
from quantplane_server.db import Database
from quantplane_server.streams import Streams
from quantplane_server.tokens import Tokens
from quantplane_server.watch import Watches


class OptionsService(rpc.OptionsServiceServicer):
    """Kept in the database, announced over the bus."""

    def __init__(
        self, db: Database, watches: Watches, tokens: Tokens, streams: Streams
    ) -> None:
        self._db = db
        self._watches = watches
        self._tokens = tokens
        self._streams = streams
