"""What of the bus the database has, as this process knows it."""

import asyncio
import logging

from quantplane_server.bus import START, UNAVAILABLE, Bus, Position

logger = logging.getLogger(__name__)

RETRY_S = 0.2


class Durability:
    """Follows the recorder's progress, in whatever process it runs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._recorded: dict[int, Position] = {}
        self.changed: set[asyncio.Event] = set()  # set whenever there is progress

    def covers(self, positions: dict[int, Position]) -> bool:
        """Tell whether everything up to these positions is committed."""
        recorded = self._recorded
        return all(recorded.get(s, START) >= p for s, p in positions.items())

    async def run(self) -> None:
        while True:
            try:
                async for positions in self._bus.follow_recorded():
                    self._recorded.update(positions)
                    for event in self.changed:
                        event.set()
            except UNAVAILABLE as error:
                logger.debug("the bus is away, trying again: %s", error)
                await asyncio.sleep(RETRY_S)
