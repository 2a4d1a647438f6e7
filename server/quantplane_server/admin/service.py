"""AdminService: what a server is and how its storage is doing."""

from quantplane.v1 import admin_pb2_grpc as rpc
from quantplane_server.bus import Bus
from quantplane_server.db import Database


class AdminService(rpc.AdminServiceServicer):
    def __init__(self, db: Database, reference: Database, bus: Bus) -> None:
        self._db = db
        self._reference = reference
        self._bus = bus
