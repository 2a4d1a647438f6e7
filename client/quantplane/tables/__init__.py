"""What the command line prints: messages of the contract, as text."""

from quantplane.tables.audit import print_audit_logs
from quantplane.tables.configurations import (
    print_configuration,
    print_configurations,
)
from quantplane.tables.identity import (
    print_caller,
    print_keys,
    print_permissions,
    print_user,
    print_users,
)
from quantplane.tables.market_data import (
    BarRow,
    BarWriter,
    CsvBars,
    JsonBars,
    TableBars,
    bar_rows,
    print_symbols,
    quote_json,
    quote_line,
)
from quantplane.tables.options import (
    ContractRow,
    contract_json,
    contract_line,
    contract_rows,
    expiration_json,
    print_chain,
    print_expirations,
)
from quantplane.tables.orders import (
    order_line,
    print_executions,
    print_lineage,
    print_orders,
)
from quantplane.tables.portfolio import (
    TableSnapshots,
    portfolio_line,
    portfolio_view,
    print_drifts,
    print_portfolio,
)
from quantplane.tables.signals import print_signals, signal_line
from quantplane.tables.status import (
    Change,
    Sample,
    status_json,
    status_line,
    status_view,
)
from quantplane.tables.strategies import (
    StrategyLines,
    print_strategies,
    print_strategy,
)
from quantplane.tables.text import (
    brief,
    event_lines,
    iso,
    message_json,
    milliseconds,
    money,
    number,
    printable,
    word,
    words,
)
from quantplane.tables.values import differences, parse_value, value_text

__all__ = [
    "BarRow",
    "BarWriter",
    "Change",
    "ContractRow",
    "CsvBars",
    "JsonBars",
    "Sample",
    "StrategyLines",
    "TableBars",
    "TableSnapshots",
    "bar_rows",
    "brief",
    "contract_json",
    "contract_line",
    "contract_rows",
    "differences",
    "event_lines",
    "expiration_json",
    "iso",
    "message_json",
    "milliseconds",
    "money",
    "number",
    "order_line",
    "parse_value",
    "portfolio_line",
    "portfolio_view",
    "print_audit_logs",
    "print_caller",
    "print_chain",
    "print_configuration",
    "print_configurations",
    "print_drifts",
    "print_executions",
    "print_expirations",
    "print_keys",
    "print_lineage",
    "print_orders",
    "print_permissions",
    "print_portfolio",
    "print_signals",
    "print_strategies",
    "print_strategy",
    "print_symbols",
    "print_user",
    "print_users",
    "printable",
    "quote_json",
    "quote_line",
    "signal_line",
    "status_json",
    "status_line",
    "status_view",
    "value_text",
    "word",
    "words",
]
