"""Quotes, bars and option chains read from CSV and Parquet files.

A file is read row by row in bounded memory. A row that cannot be read is refused
with its line number and the reading goes on. A file or a description of it that
makes no sense is refused as a whole, before the first row is handed out.
"""

from quantplane.files.columns import parse_columns
from quantplane.files.market_data import (
    BAR_FIELDS,
    QUOTE_FIELDS,
    read_bars,
    read_quotes,
)
from quantplane.files.options import CONTRACT_KEY, CONTRACT_VALUES, read_chains
from quantplane.files.report import FileProblem, Refusal, Report
from quantplane.files.times import parse_time

__all__ = [
    "BAR_FIELDS",
    "CONTRACT_KEY",
    "CONTRACT_VALUES",
    "QUOTE_FIELDS",
    "FileProblem",
    "Refusal",
    "Report",
    "parse_columns",
    "parse_time",
    "read_bars",
    "read_chains",
    "read_quotes",
]
