"""The page of the docs about the state machine, made of its table.

python -m quantplane_server.orders.lifecycle_page > docs/order-lifecycle.md
"""

from quantplane import v1 as pb
from quantplane_server.orders.lifecycle import (
    ORD_STATUS,
    TRANSITIONS,
    event_name,
    status_name,
)

PAGE = """\
# The life of an order

This page is made of the table that the server goes by: `TRANSITIONS` in
`server/quantplane_server/orders/lifecycle.py`. The RPC `GetOrderLifecycle` serves the
same. After a change of the table, write the page again:

    python -m quantplane_server.orders.lifecycle_page > docs/order-lifecycle.md

## Events

The FIX column has the ExecType (tag 150) of FIX 4.4, or the message type (tag 35) where
FIX reports the event by another message. Where an event leads to one of several
statuses, the effect says which. What has no row is refused, with `ORDER_TERMINAL` where
the order is over and `ILLEGAL_TRANSITION` where it is not; so is what breaks the
condition of its row, with `ILLEGAL_TRANSITION`.

| event | FIX | from | to | if | effect |
|---|---|---|---|---|---|
{rows}

Besides:

- Each event makes the order's `version` one higher.
- An order that is over (FILLED, CANCELLED, REJECTED or EXPIRED) has no pending request.
  Facts still change it: fills, busts and corrections are never refused for a status.
- Whatever the broker says clears `outcome_unknown`, unless it repeats itself. No timer
  guesses an outcome.
- Quantities are compared within 1e-9, relative to the larger: 0.1 + 0.2 fills 0.3.

## What changes nothing

What is known already is answered with the order as it is, whatever its status:

- SUBMITTED of an order that was submitted or is OPEN;
- ACKNOWLEDGED under the same broker_order_id;
- TRIGGERED of an order that is triggered;
- CANCELLED, REJECTED or EXPIRED of an order that is that;
- CANCEL_REQUESTED while a cancel is pending, or of a cancelled order;
- REPLACE_REQUESTED for the terms that are pending or, with no other replacement
  pending, in force;
- CANCEL_REJECTED, REPLACED or REPLACE_REJECTED for an earlier command, or where no such
  request is pending. Then a REPLACED that names no command, with terms that are not in
  force, is refused: what a broker changes by itself is RESTATED;
- RESTATED to the terms in force;
- OUTCOME_UNKNOWN where that is known.

## FIX OrdStatus

`ord_status` is tag 39 by the precedence of FIX: PENDING_CANCEL while a cancel is
pending; PENDING_REPLACE while a replacement is; PARTIALLY_FILLED where the order is
OPEN and a part of it is filled; else by status:

| status | OrdStatus |
|---|---|
{statuses}
"""


def render() -> str:
    """Return docs/order-lifecycle.md."""
    rows = "\n".join(map(_line, TRANSITIONS))
    statuses = "\n".join(
        f"| {status_name(status)} | {_ord_status_name(fix)} |"
        for status, fix in ORD_STATUS.items()
    )
    return PAGE.format(rows=rows, statuses=statuses)


def _ord_status_name(fix: pb.OrdStatus.ValueType) -> str:
    return pb.OrdStatus.Name(fix).removeprefix("ORD_STATUS_")


def _line(row: pb.Transition) -> str:
    before = ", ".join(map(status_name, getattr(row, "from"))) or "none"
    to = ", ".join(map(status_name, row.to)) or "stays"
    cells = (event_name(row.event), row.fix, before, to, row.guard, row.effect)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(render(), end="")
