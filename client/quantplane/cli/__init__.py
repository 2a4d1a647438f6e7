"""The command `quantplane`: by hand what a strategy or a feed does in code."""

import sys

try:
    import typer
except ModuleNotFoundError:
    sys.exit("the command quantplane needs typer: pip install 'quantplane[cli]'")

# What takes long to import is imported where it is used, so that --help is quick.
from quantplane.cli.importing import (
    Tally,
    import_bars,
    import_options,
    import_quotes,
    store_bars,
)
from quantplane.cli.market_data import bars, symbols, watch_quotes
from quantplane.cli.options import chain, expirations
from quantplane.cli.replaying import Pace, replay

__all__ = ["Pace", "Tally", "app", "store_bars"]

app = typer.Typer(
    help="Watch, import, replay and list the market data of a quantplane server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
import_app = typer.Typer(
    help="Store a CSV or Parquet file.", no_args_is_help=True, rich_markup_mode=None
)
quotes_app = typer.Typer(
    help="Live quotes.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(import_app, name="import")
app.add_typer(quotes_app, name="quotes")

import_app.command("bars")(import_bars)
import_app.command("quotes")(import_quotes)
import_app.command("options")(import_options)
app.command()(replay)
quotes_app.command("watch")(watch_quotes)
app.command()(bars)
app.command()(symbols)
app.command()(chain)
app.command()(expirations)
