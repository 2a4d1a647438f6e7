"""What of the bus the database has, as this process knows it."""

import asyncio
import logging
from collections.abc import Iterable, Mapping

from quantplane_server.bus import UNAVAILABLE, Bus, Position
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

RETRY_S = 0.2


class Durability:
    """Follows the recorder's progress, in whatever process it runs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._recorded: dict[int, Position] = {}
        self._outage = Outage(logger, "following what is recorded", UNAVAILABLE)
        self.changed: set[asyncio.Event] = set()  # set whenever there is progress

    def covers(self, positions: Mapping[int, Position]) -> bool:
        """Tell whether everything up to these positions is committed.

        Not of those of another epoch: the bus may have lost them before they were.
        """
        return all(self._covers(s, *place) for s, place in positions.items())

    def outlives(self, places: Iterable[Position]) -> bool:
        """Tell whether an epoch has begun since these, which are by shard."""
        known = self._recorded.get
        return any(known(s, at).epoch > at.epoch for s, at in enumerate(places))

    async def run(self) -> None:
        while True:
            with self._outage:
                async for positions in self._bus.follow_recorded():
                    self._outage.over()
                    self._recorded.update(positions)
                    for event in self.changed:
                        event.set()
            await asyncio.sleep(RETRY_S)

    def _covers(self, shard: int, epoch: int, number: int) -> bool:
        known = self._recorded.get(shard)
        return known is not None and known.epoch == epoch and known.number >= number
