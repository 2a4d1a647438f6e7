"""What the server does for its database now and then."""

import asyncio

from quantplane_server.db import Database


class Maintenance:
    def __init__(self, db: Database, interval_s: float) -> None:
        self._db = db
        self._interval_s = interval_s

    async def run(self) -> None:
        """Run until cancelled."""
        await asyncio.Event().wait()
