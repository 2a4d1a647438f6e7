"""The latest quotes: on the bus, or else in the database."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from quantplane import v1 as pb
from quantplane_server.bus import Bus
from quantplane_server.checks import LAST
from quantplane_server.db import Database
from quantplane_server.market_data import queries

ABSENT_S = 10.0
MAX_ABSENT = 100_000


class LatestQuotes:
    """Looks up the latest quotes of symbols.

    To find nothing in the database is dear: every chunk is searched. So it is asked
    again about such a symbol only after ABSENT_S. Quotes come by way of the bus, and
    are seen at once; it is bars that may be seen late.
    """

    def __init__(self, bus: Bus, db: Database) -> None:
        self._bus = bus
        self._db = db
        self._absent: dict[str, float] = {}  # symbol -> when it was found so

    async def __call__(
        self, symbols: Iterable[str], as_of: datetime = LAST
    ) -> dict[str, pb.Quote]:
        """Return the last quote at or before a time, of each symbol that has one.

        Raises what is UNAVAILABLE of the bus and the database.
        """
        symbols = list(dict.fromkeys(symbols))
        _, records = await self._bus.snapshot(symbol.encode() for symbol in symbols)
        live = pb.GetLatestQuotesResponse.FromString(b"".join(records.values())).quotes
        found = {
            quote.symbol: quote
            for quote in live
            if quote.time.ToDatetime(tzinfo=UTC) <= as_of
        }
        missing = [symbol for symbol in symbols if symbol not in found]
        if as_of == LAST:
            missing = [symbol for symbol in missing if not self._is_absent(symbol)]
        if missing:
            async with self._db.connection() as conn:
                recorded = await queries.latest_quotes(conn, missing, as_of)
            found.update((quote.symbol, quote) for quote in recorded)
            if as_of == LAST:
                self._note_absent(symbol for symbol in missing if symbol not in found)
        return found

    def _is_absent(self, symbol: str) -> bool:
        since = self._absent.get(symbol)
        return since is not None and time.monotonic() < since + ABSENT_S

    def _note_absent(self, symbols: Iterable[str]) -> None:
        if len(self._absent) >= MAX_ABSENT:
            self._absent.clear()
        self._absent.update(dict.fromkeys(symbols, time.monotonic()))
