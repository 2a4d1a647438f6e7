"""Snapshots of the account: on a schedule, by one of all processes, and on request."""

import asyncio
import logging
import time

from quantplane import v1 as pb
from quantplane_server import bus as buses
from quantplane_server import db as databases
from quantplane_server.db import Database
from quantplane_server.portfolio import queries
from quantplane_server.portfolio.valuation import LatestQuotes, Valuation
from quantplane_server.reference.settings import SNAPSHOT_INTERVAL, configured
from quantplane_server.tasks import Outage

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the interval, which may be changed
RETRY_S = 5.0  # before who does not take snapshots asks whether he may
LAST_S = 2.0  # for the last one
UNAVAILABLE = (*databases.UNAVAILABLE, *buses.UNAVAILABLE)


class Snapshots:
    """Takes snapshots."""

    def __init__(
        self, db: Database, reference: Database, latest_quotes: LatestQuotes
    ) -> None:
        self._db = db
        self._reference = reference
        self._valuation = Valuation(db, reference, latest_quotes)
        self._outage = Outage(logger, "taking snapshots", UNAVAILABLE)

    async def run(self) -> None:
        """Take them at the configured interval, or wait until no other process does.

        Until cancelled. Who has lost the session that holds the lock may take one
        beside another's.
        """
        while True:
            with self._outage:
                async with self._db.session() as session:
                    while await queries.claim_snapshots(session):
                        await self.take()
                        self._outage.over()
                        await self._rest()
            await asyncio.sleep(RETRY_S)

    async def _rest(self) -> None:
        """Return once the interval has passed, as it is configured by then."""
        began = time.monotonic()
        while True:
            interval_s = await configured(self._reference, SNAPSHOT_INTERVAL)
            left_s = began + interval_s - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, LOOK_S))

    async def close(self) -> None:
        """Take the last one, if that can be done at once."""
        try:
            async with asyncio.timeout(LAST_S):
                await self.take()
        except Exception as error:
            logger.warning("the last snapshot could not be taken: %r", error)

    async def take(self) -> pb.PortfolioSnapshot:
        """Write a snapshot of the account now."""
        summary = await self._valuation.account()
        snapshot = pb.PortfolioSnapshot(
            total_value=summary.total_value,
            cash=summary.cash,
            positions_value=summary.positions_value,
            total_pnl=summary.total_pnl,
            unrealized_pnl=summary.unrealized_pnl,
            realized_pnl=summary.realized_pnl,
            total_exposure=summary.total_exposure,
            net_exposure=summary.net_exposure,
            n_positions=summary.n_positions,
        )
        snapshot.time.GetCurrentTime()
        async with self._db.connection() as conn:
            await queries.insert_snapshot(conn, snapshot)
        return snapshot
