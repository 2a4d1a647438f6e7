"""The risk limits of a strategy: their names, and what is taken for one.

What an order must keep is told in orders/risk.py.
"""

from math import inf

from google.protobuf.struct_pb2 import Struct, Value

from quantplane_server.checks import SYMBOL, Checks, is_name
from quantplane_server.constraints import NOT_NEGATIVE

MAX_ORDER_QUANTITY = "max_order_quantity"
MAX_ORDER_NOTIONAL = "max_order_notional"
MAX_POSITION = "max_position"
MAX_OPEN_ORDERS = "max_open_orders"
ALLOWED_SYMBOLS = "allowed_symbols"

NUMBERS = (MAX_ORDER_QUANTITY, MAX_ORDER_NOTIONAL, MAX_POSITION, MAX_OPEN_ORDERS)
LIMITS = (*NUMBERS, ALLOWED_SYMBOLS)
MAX_SYMBOLS = 1_000
MAX_BYTES = 512 << 10  # more than the limits that are taken can have, as JSON

NAMES = f"may hold only {', '.join(LIMITS)}"
LIST = f"must be a list of at most {MAX_SYMBOLS:,} symbols"


def check_limits(check: Checks, limits: Struct, field: str) -> None:
    """Check what a strategy is given as its limits."""
    check(set(limits.fields) <= set(LIMITS), field, NAMES)
    for limit in LIMITS:
        if limit not in limits.fields:
            continue
        value, at = limits.fields[limit], f"{field}.{limit}"
        if limit == ALLOWED_SYMBOLS:
            _check_symbols(check, value, at)
        else:
            number = value.WhichOneof("kind") == "number_value"
            check(number and 0 <= value.number_value < inf, at, NOT_NEGATIVE)


def _check_symbols(check: Checks, value: Value, at: str) -> None:
    symbols = value.list_value.values
    is_list = value.WhichOneof("kind") == "list_value"
    check(is_list and len(symbols) <= MAX_SYMBOLS, at, LIST)
    for i, symbol in enumerate(symbols[:MAX_SYMBOLS]):
        check(is_name(symbol.string_value), f"{at}[{i}]", SYMBOL)
