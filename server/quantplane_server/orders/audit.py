"""The audit of orders: what is filled of each, beside what its executions give."""

from collections.abc import Iterator
from math import isclose

from quantplane import v1 as pb
from quantplane_server.db import Connection
from quantplane_server.orders import queries
from quantplane_server.orders.queries import Amounts
from quantplane_server.portfolio import queries as portfolio
from quantplane_server.portfolio.queries import Sums

TOLERANCE = 1e-9


async def order_drifts(conn: Connection, limit: int) -> tuple[list[pb.Drift], int]:
    """Compare all orders; return the first that drifted, and how many orders there are.

    For a transaction in which every statement sees the same.
    """
    drifts: list[pb.Drift] = []
    n_orders = 0
    async for page in queries.amounts(conn):
        n_orders += len(page)
        sums = await portfolio.filled(conn, [order.order_id for order in page])
        for order in page:
            drifts += _drifts(order, sums.get(order.order_id, Sums()))
        del drifts[limit:]
    return drifts, n_orders


def _drifts(order: Amounts, sums: Sums) -> Iterator[pb.Drift]:
    price = rounding = 0.0
    if sums.quantity:
        price = sums.notional / sums.quantity
        rounding = abs(TOLERANCE * sums.gross / sums.quantity)
    for column, stored, recomputed, slack in (
        ("filled_quantity", order.filled_quantity, sums.quantity, 0.0),
        ("avg_fill_price", order.avg_fill_price, price, rounding),
    ):
        if not isclose(stored, recomputed, rel_tol=TOLERANCE, abs_tol=slack):
            yield pb.Drift(
                key=order.order_id,
                column=f"orders.{column}",
                stored=stored,
                recomputed=recomputed,
            )
