"""What the bus holds and the database does not, and for how long."""

from datetime import timedelta
from time import time

from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.stamps import accepted_s

STUCK_S = 30.0  # that recording may be behind


class RecorderStuck(Exception):
    """The recorder, in whatever process it runs, does not get on."""

    def __init__(self, lag_s: float) -> None:
        super().__init__(
            f"the oldest quote that is not recorded has waited for {lag_s:,.0f} s"
        )


class Backlog:
    """The part of the bus that waits for the recorder, as it was found last."""

    def __init__(self, bus: Bus) -> None:
        self.known = False  # whether it was ever found
        self.appended_bytes = self.unrecorded_bytes = 0
        self.lag_s = 0.0
        self._bus = bus

    async def check(self) -> None:
        """Look. Raises RecorderStuck, and what the bus raises while it is away."""
        shards = await self._bus.backlog()
        self.appended_bytes = sum(shard.appended for shard in shards)
        self.unrecorded_bytes = sum(s.appended - s.recorded for s in shards)
        oldest = [accepted_s(shard.stamp) for shard in shards if shard.stamp]
        # Another server's clock may be ahead.
        self.lag_s = max(0.0, time() - min(oldest)) if oldest else 0.0
        self.known = True
        if self.lag_s > STUCK_S:
            raise RecorderStuck(self.lag_s)

    def status(self) -> pb.BusStatus | None:
        if not self.known:
            return None
        status = pb.BusStatus(
            appended_bytes=self.appended_bytes,
            unrecorded_bytes=self.unrecorded_bytes,
            max_unrecorded_bytes=self._bus.cap_bytes,
        )
        status.recorder_lag.FromTimedelta(timedelta(seconds=self.lag_s))
        return status
