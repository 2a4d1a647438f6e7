"""The command `quantplane`: by hand what a strategy or a feed does in code."""

import sys

try:
    import typer
except ModuleNotFoundError:
    sys.exit("the command quantplane needs typer: pip install 'quantplane[cli]'")

# What takes long to import is imported where it is used, so that --help is quick.
from quantplane.cli import (
    configurations,
    keys,
    orders,
    permissions,
    portfolio,
    signals,
    strategies,
    users,
)
from quantplane.cli.audit import audit
from quantplane.cli.importing import (
    Tally,
    import_bars,
    import_options,
    import_quotes,
    store_bars,
)
from quantplane.cli.login import login, logout, whoami
from quantplane.cli.market_data import bars, symbols, watch_quotes
from quantplane.cli.options import chain, expirations
from quantplane.cli.replaying import Pace, replay
from quantplane.cli.top import top

__all__ = ["Pace", "Tally", "app", "store_bars"]


def _group(name: str, text: str) -> typer.Typer:
    """Return a group of commands, which is part of the app."""
    group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


app = typer.Typer(
    help="The market data, strategies, signals, orders and portfolio of a quantplane "
    "server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
import_app = _group("import", "Store a CSV or Parquet file.")
import_app.command("bars")(import_bars)
import_app.command("quotes")(import_quotes)
import_app.command("options")(import_options)
app.command()(replay)
quotes_app = _group("quotes", "Live quotes.")
quotes_app.command("watch")(watch_quotes)
app.command()(bars)
app.command()(symbols)
app.command()(chain)
app.command()(expirations)
signals_app = _group("signals", "Publish, list and watch signals.")
signals_app.command("publish")(signals.publish)
signals_app.command("cancel")(signals.cancel)
signals_app.command("list")(signals.list_signals)
signals_app.command("watch")(signals.watch_signals)
orders_app = _group("orders", "Submit, change, list and watch orders.")
orders_app.command("submit")(orders.submit)
orders_app.command("cancel")(orders.cancel)
orders_app.command("replace")(orders.replace)
orders_app.command("list")(orders.list_orders)
orders_app.command("watch")(orders.watch_orders)
orders_app.command("executions")(orders.executions)
app.command()(orders.lineage)
portfolio_app = typer.Typer(rich_markup_mode=None)
portfolio_app.callback(invoke_without_command=True)(portfolio.portfolio)
portfolio_app.command("snapshots")(portfolio.snapshots)
portfolio_app.command("audit")(portfolio.audit)
app.add_typer(portfolio_app, name="portfolio")
strategies_app = _group("strategies", "Create, change, list and watch strategies.")
strategies_app.command("list")(strategies.list_strategies)
strategies_app.command("show")(strategies.show_strategy)
strategies_app.command("create")(strategies.create)
strategies_app.command("update")(strategies.update)
strategies_app.command("delete")(strategies.delete)
strategies_app.command("watch")(strategies.watch_strategies)
config_app = _group("config", "What the servers and the desk keep under keys.")
config_app.command("list")(configurations.list_configurations)
config_app.command("get")(configurations.get)
config_app.command("set")(configurations.set_value)
config_app.command("delete")(configurations.delete)
app.command()(audit)
app.command()(top)
app.command()(login)
app.command()(logout)
app.command()(whoami)
users_app = _group("users", "Who may come, in which role.")
users_app.command("list")(users.list_users)
users_app.command("show")(users.show_user)
users_app.command("create")(users.create)
users_app.command("update")(users.update)
users_app.command("enable")(users.enable)
users_app.command("disable")(users.disable)
users_app.command("set-password")(users.set_password)
keys_app = _group("keys", "API keys, for programs.")
keys_app.command("list")(keys.list_keys)
keys_app.command("create")(keys.create)
keys_app.command("revoke")(keys.revoke)
permissions_app = _group("permissions", "What each role permits.")
permissions_app.command("list")(permissions.list_permissions)
permissions_app.command("grant")(permissions.grant)
permissions_app.command("revoke")(permissions.revoke)
