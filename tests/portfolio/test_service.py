"""Portfolios as they are now, over the wire."""

import asyncio
from typing import Any

import grpc
import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb
from quantplane_server import log
from quantplane_server.checks import SYMBOL
from quantplane_server.portfolio import valuation
from quantplane_server.tasks import end
from tests.conftest import both_editions
from tests.market_data import quote
from tests.portfolio import Desk, at, fill


async def get(client: Client, strategy_id: str = "") -> pb.GetPortfolioResponse:
    request = pb.GetPortfolioRequest(strategy_id=strategy_id)
    return await client.portfolio.GetPortfolio(request)


async def publish(client: Client, *quotes: pb.Quote) -> None:
    async with client.publish_quotes() as publisher:
        await publisher.send(quotes)
        await publisher.durable()


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(raised.value)


async def violations(call: Any) -> list[Any]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return list(violations_of(raised.value))


# --- The account --------------------------------------------------------------------


async def test_before_the_first_execution_there_is_the_initial_cash(client: Client):
    portfolio = await get(client)
    expected = {"total_value": 1e6, "cash": 1e6, "initial_cash": 1e6}
    assert portfolio.summary == pb.PortfolioSummary(**expected)
    assert not portfolio.positions


@both_editions
async def test_the_account_is_its_positions_at_their_marks(client: Client, desk: Desk):
    await desk.book(
        fill("LONG", 10, 100, 1, commission=2, strategy_id="a"),
        fill("SHORT", -4, 50, 2, strategy_id="b"),
        fill("SHORT", 1, 40, 3, strategy_id="b"),
    )
    await publish(
        client, quote("LONG", 1, bid=110, ask=112), quote("SHORT", 2, bid=55, ask=57)
    )
    portfolio = await get(client)
    long, short = portfolio.positions
    assert (long.symbol, long.quantity, long.average_cost) == ("LONG", 10, 100)
    assert (long.mark, long.unrealized_pnl, long.value) == (111, 110, 1110)
    assert (long.realized_pnl, long.strategy_id) == (-2, "a")
    assert long.mark_time == quote("LONG", 1).time
    assert (short.symbol, short.quantity, short.average_cost) == ("SHORT", -3, 50)
    assert (short.mark, short.unrealized_pnl, short.value) == (56, -18, -168)
    assert (short.realized_pnl, short.strategy_id) == (10, "b")
    assert short.opened_at.ToSeconds() == at(2).timestamp()
    assert short.updated_at.ToSeconds() == at(3).timestamp()
    cash = 1e6 - 1000 - 2 + 200 - 40
    assert portfolio.summary == pb.PortfolioSummary(
        time=short.updated_at,
        total_value=cash + 942,
        cash=cash,
        positions_value=942,
        total_pnl=100,
        unrealized_pnl=92,
        realized_pnl=8,
        total_exposure=1278,
        net_exposure=942,
        n_positions=2,
        initial_cash=1e6,
        commission=2,
    )


async def test_what_it_is_worth_is_the_initial_cash_and_what_was_gained(
    client: Client, desk: Desk
):
    await desk.execute(
        "INSERT INTO configurations (key, value) VALUES ($1, '500.25')",
        "portfolio.initial_cash",
    )
    await desk.book(
        fill("A", 0.3, 10.1, commission=0.07, strategy_id="a"),
        fill("A", -0.7, 11.3, commission=0.07, strategy_id="b"),
        fill("A", 0.1, -2.9, commission=-0.01, strategy_id="a"),
    )
    await publish(client, quote("A", 1, bid=3.3, ask=3.5))
    for strategy_id, initial in (("", 500.25), ("a", 0), ("b", 0)):
        summary = (await get(client, strategy_id)).summary
        assert summary.initial_cash == initial
        assert summary.total_value == pytest.approx(initial + summary.total_pnl)
        assert summary.total_value == summary.cash + summary.positions_value


async def test_positions_and_cash_are_of_one_moment(client: Client, desk: Desk):
    async def trade() -> None:
        while True:
            await desk.book(*(fill(symbol, 1, 100) for symbol in "ABCD"))

    trading = asyncio.create_task(trade())
    for _ in range(40):
        portfolio = await get(client)
        bought = sum(position.quantity for position in portfolio.positions)
        assert portfolio.summary.cash == 1e6 - 100 * bought
        assert portfolio.summary.total_value == 1e6
    await end(trading)


async def test_a_strategy_has_only_what_its_orders_did(client: Client, desk: Desk):
    await desk.book(
        fill("A", 3, 100, strategy_id="a", commission=1),
        fill("A", -2, 110, strategy_id="b"),
        fill("B", 1, 5, strategy_id="b"),
    )
    portfolio = await get(client, "a")
    (position,) = portfolio.positions
    assert (position.quantity, position.strategy_id) == (3, "a")
    assert (portfolio.summary.cash, portfolio.summary.total_pnl) == (-301, -1)
    assert portfolio.summary.commission == 1
    assert not (await get(client, "unknown")).positions


@pytest.mark.parametrize(
    ("fields", "mark"),
    [
        ({"bid": 10, "ask": 12, "last": 50}, 11),
        ({"bid": -2, "ask": 0}, -1),
        ({"bid": 10, "ask": None, "last": 50}, 50),
        ({"bid": None, "ask": None, "last": 0}, 0),
        ({"bid": 10, "ask": None}, None),
    ],
    ids=["mid", "mid of 0", "a side is missing", "last of 0", "neither"],
)
async def test_the_mark_is_the_mid_or_else_the_last_trade_or_else_the_average_cost(
    client: Client, desk: Desk, fields: dict[str, Any], mark: float | None
):
    await desk.book(fill("A", 2, 100))
    await publish(client, quote("A", 1, **fields))
    portfolio = await get(client)
    (position,) = portfolio.positions
    assert position.mark == (100 if mark is None else mark)
    assert position.HasField("mark_time") == (mark is not None)
    assert position.value == 2 * position.mark
    assert portfolio.summary.n_unmarked == (mark is None)


async def test_flat_positions_are_kept_for_what_they_realised(
    client: Client, desk: Desk
):
    await desk.book(fill("A", 2, 100), fill("A", -2, 110), fill("B", 1, 1))
    await publish(client, quote("A", 1))
    portfolio = await get(client)
    flat, _ = portfolio.positions
    assert (flat.quantity, flat.average_cost, flat.realized_pnl) == (0, 0, 20)
    assert (flat.mark, flat.value) == (0, 0)
    assert (portfolio.summary.n_positions, portfolio.summary.n_unmarked) == (1, 1)
    assert portfolio.summary.realized_pnl == 20


async def test_the_summary_names_the_last_event_that_it_includes(
    client: Client, desk: Desk
):
    async with desk.db.transaction() as conn:
        await log.append(conn, "orders", [log.Event("TRADE", "key", b"")] * 3)
    assert (await get(client)).summary.revision == 3


async def test_too_many_positions_are_refused(
    client: Client, desk: Desk, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(valuation, "MAX_POSITIONS", 2)
    await desk.book(fill("A", 1, 1), fill("B", 1, 1))
    assert len((await get(client)).positions) == 2
    await desk.book(fill("C", 1, 1))
    assert await refused(get(client)) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "RESULT_TOO_LARGE",
    )


# --- Pages --------------------------------------------------------------------------


async def listed(client: Client, **fields: Any) -> list[list[str]]:
    """Return the symbols of each page."""
    pages, token = [], ""
    while True:
        request = pb.ListPositionsRequest(page_token=token, **fields)
        response = await client.portfolio.ListPositions(request)
        pages.append([position.symbol for position in response.positions])
        token = response.next_page_token
        if not token:
            return pages


async def test_positions_are_listed_by_pages_in_order_of_symbol(
    client: Client, desk: Desk
):
    await desk.book(*(fill(symbol, 1, 1) for symbol in "DBACE"))
    await desk.book(fill("B", -1, 1), fill("F", 1, 1, strategy_id="other"))
    assert await listed(client) == [list("ABCDEF")]
    assert await listed(client, page_size=2) == [["A", "B"], ["C", "D"], ["E", "F"]]
    assert await listed(client, page_size=3, open_only=True) == [
        ["A", "C", "D"],
        ["E", "F"],
    ]
    assert await listed(client, strategy_id="s", open_only=True) == [list("ACDE")]


async def test_listed_positions_are_marked(client: Client, desk: Desk):
    await desk.book(fill("A", 2, 100), fill("B", 1, 7))
    await publish(client, quote("A", 1, bid=10, ask=12))
    response = await client.portfolio.ListPositions(pb.ListPositionsRequest())
    assert [(p.mark, p.value) for p in response.positions] == [(11, 22), (7, 7)]


async def test_a_page_token_is_good_for_its_own_query_only(client: Client, desk: Desk):
    await desk.book(fill("A", 1, 1), fill("B", 1, 1))
    first = await client.portfolio.ListPositions(pb.ListPositionsRequest(page_size=1))
    for fields in ({"strategy_id": "s"}, {"open_only": True}):
        request = pb.ListPositionsRequest(page_token=first.next_page_token, **fields)
        call = client.portfolio.ListPositions(request)
        code = grpc.StatusCode.INVALID_ARGUMENT
        assert await refused(call) == (code, "INVALID_PAGE_TOKEN")


# --- Bad input ----------------------------------------------------------------------


async def test_every_rule_that_a_request_breaks_is_named(client: Client):
    bad = " x"
    watch = pb.WatchPortfolioRequest(strategy_id=bad)
    watch.interval.FromMilliseconds(99)
    watch.heartbeat_interval.FromSeconds(61)
    snapshots = pb.ListSnapshotsRequest(page_size=10_001)
    snapshots.start_time.FromSeconds(2)
    snapshots.end_time.FromSeconds(1)
    size = ("page_size", "must be 0 to 10,000")
    for call, expected in (
        (get(client, bad), [("strategy_id", SYMBOL)]),
        (
            client.portfolio.ListPositions(
                pb.ListPositionsRequest(strategy_id=bad, page_size=-1)
            ),
            [("strategy_id", SYMBOL), size],
        ),
        (
            anext(aiter(client.portfolio.WatchPortfolio(watch))),
            [
                ("strategy_id", SYMBOL),
                ("interval", "must be 0.1 to 60 s"),
                ("heartbeat_interval", "must be 1 to 60 s"),
            ],
        ),
        (
            client.portfolio.ListSnapshots(snapshots),
            [("end_time", "must not lie before start_time"), size],
        ),
    ):
        assert await violations(call) == expected
