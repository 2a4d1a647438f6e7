"""Short ways to say what is published of options, and what must be read of it."""

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from quantplane import Client
from quantplane import v1 as pb
from tests.market_data import Sender, kind

CALL, PUT = pb.OPTION_TYPE_CALL, pb.OPTION_TYPE_PUT
START = datetime(2024, 3, 1, 15, tzinfo=UTC)  # a Friday
DAY = 24 * 60  # minutes
VALUES = [
    field.name
    for field in pb.OptionQuote.DESCRIPTOR.fields
    if field.name not in ("expiration", "strike", "option_type", "time")
]


def quote(
    strike: float = 100.0,
    option_type: Any = CALL,
    expiration: str = "2024-04-19",
    **fields: Any,
) -> pb.OptionQuote:
    return pb.OptionQuote(
        strike=strike, option_type=option_type, expiration=expiration, **fields
    )


def chain(
    minute: float,
    *contracts: pb.OptionQuote,
    partial: bool = False,
    underlying: str = "A",
) -> pb.OptionChain:
    """Return a chain quoted some minutes after START."""
    return pb.OptionChain(
        underlying=underlying, time=time(minute), contracts=contracts, partial=partial
    )


def part(minute: float, *contracts: pb.OptionQuote, **fields: Any) -> pb.OptionChain:
    return chain(minute, *contracts, partial=True, **fields)


def time(minute: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(START + timedelta(minutes=minute))
    return stamp


async def publish(client: Client, *chains: pb.OptionChain) -> None:
    sender = Sender(client.options.PublishOptionChain())
    for number, one in enumerate(chains, 1):
        await sender.send(pb.PublishOptionChainRequest(batch=number, chain=one))
        assert (await sender.next()).durable_through == number
    await sender.call.done_writing()


async def get(
    client: Client, underlying: str = "A", as_of: float | None = None, **wanted: Any
) -> pb.OptionChain:
    request = pb.GetOptionChainRequest(
        underlying=underlying,
        as_of=None if as_of is None else time(as_of),
        filter=pb.OptionFilter(**wanted),
    )
    return (await client.options.GetOptionChain(request)).chain


def merged(
    published: Iterable[pb.OptionChain],
    wanted: pb.OptionFilter | None = None,
    as_of: float | None = None,
) -> pb.OptionChain:
    """Return what the contract says must be read of chains, in plain Python."""
    until_ns = time(10**6 if as_of is None else as_of).ToNanoseconds()
    rows: dict[int, dict[Any, pb.OptionQuote]] = {}  # by time
    whole = set()
    for one in published:
        at = one.time.ToNanoseconds()
        if not one.partial:
            whole.add(at)
            rows[at] = {}
        for row in one.contracts:
            key = (row.expiration, row.strike, row.option_type)
            rows.setdefault(at, {})[key] = row
    times = sorted(at for at in rows if at <= until_ns)
    base = max(whole & set(times), default=times[0])
    newest = times[-1]
    latest = {}
    for at in times:
        if at >= base:
            latest |= {key: (at, row) for key, row in rows[at].items()}
    found = pb.OptionChain(underlying=one.underlying)
    found.time.FromNanoseconds(newest)
    for _, (at, row) in sorted(latest.items(), key=lambda item: item[0]):
        current = row.expiration >= found.time.ToDatetime().date().isoformat()
        if current and (wanted is None or admits(wanted, row)):
            added = found.contracts.add()
            added.CopyFrom(row)
            if at != newest:
                added.time.FromNanoseconds(at)
    return found


def admits(wanted: pb.OptionFilter, row: pb.OptionQuote) -> bool:
    """Tell whether all bounds that are present hold."""
    money = wanted.moneyness
    bounds = [
        (wanted, "min_strike", "max_strike", row.strike),
        (wanted, "min_delta", "max_delta", row.delta),
        (money, "min", "max", row.strike / (money.underlying_price or 1.0)),
    ]
    if wanted.HasField("min_delta") or wanted.HasField("max_delta"):
        if not row.HasField("delta"):
            return False
    for message, low, high, value in bounds:
        if message.HasField(low) and value < getattr(message, low):
            return False
        if message.HasField(high) and value > getattr(message, high):
            return False
    if row.expiration < wanted.min_expiration:
        return False
    if wanted.max_expiration and row.expiration > wanted.max_expiration:
        return False
    return wanted.option_type in (pb.OPTION_TYPE_UNSPECIFIED, row.option_type)


class Reader:
    """Follows a subscription and keeps what it says, as a strategy would."""

    def __init__(self, client: Client, *underlyings: str, **fields: Any) -> None:
        request = pb.SubscribeOptionChainRequest(underlyings=underlyings, **fields)
        self.call = client.options.SubscribeOptionChain(request)
        self.responses: AsyncIterator[Any] = aiter(self.call)
        self.chains: dict[str, pb.OptionChain] = {}
        self.token = b""

    async def next(self, wanted: str = "") -> Any:
        """Return the next response, or the next of a kind."""
        async for response in self.responses:
            self.token = response.resume_token or self.token
            for one in response.chains:
                self._apply(one)
            if wanted in ("", kind(response)):
                return response
        raise AssertionError(f"the stream ended before {wanted}")

    async def until(self, wanted: pb.OptionChain) -> None:
        """Return once what was delivered makes this chain."""
        while self.chains.get(wanted.underlying) != wanted:
            await self.next()

    def _apply(self, one: pb.OptionChain) -> None:
        rows = {}
        if one.partial:
            rows = keyed(self.chains[one.underlying])
        rows |= keyed(one)
        made = pb.OptionChain(underlying=one.underlying)
        if one.HasField("time"):
            made.time.CopyFrom(one.time)
        for _, row in sorted(rows.items()):
            added = made.contracts.add()
            added.CopyFrom(row)
            if row.time == one.time:
                added.ClearField("time")
        self.chains[one.underlying] = made


def keyed(one: pb.OptionChain) -> dict[Any, pb.OptionQuote]:
    """Return the contracts by their keys, each with its time."""
    rows = {}
    for row in one.contracts:
        timed = pb.OptionQuote()
        timed.CopyFrom(row)
        if not row.HasField("time"):
            timed.time.CopyFrom(one.time)
        rows[row.expiration, row.strike, row.option_type] = timed
    return rows
