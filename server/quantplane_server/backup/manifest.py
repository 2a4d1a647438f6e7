"""What a backup says about itself, and how two descriptions of tables differ."""

from collections.abc import Iterator
from datetime import datetime

from pydantic import BaseModel

from quantplane_server.db import Edition

FORMAT = 1


class Table(BaseModel):
    """What a table held."""

    rows: int
    checksum: str
    """Of all rows in any order; of an aggregate, of the rows that it has stored."""


class Part(BaseModel):
    """One database, as it was at one moment."""

    revisions: dict[str, str]
    """Of the schema's parts that live in it."""
    server_major: int
    tools_major: int
    """Of the pg_dump that read it."""
    edition: Edition
    timescaledb: str | None
    """The extension's version."""
    roles: list[str]
    """Who owns something in it or has privileges of their own."""
    job_owners: list[str]
    """Who owns one of TimescaleDB's jobs."""
    tables: dict[str, Table]
    catalog: dict[str, list[str]] = {}
    """Its columns, keys, indexes, policies and the like, a line each, by kind."""
    carried: list[str] = []
    """Of some tables: those that came along because others need their rows."""

    def differences(self, found: "Part") -> Iterator[str]:
        """Tell what `found` has otherwise."""
        for name, table in self.tables.items():
            other = found.tables.get(name)
            if other is None:
                yield f"the table {name} is missing"
            elif other.rows != table.rows:
                yield f"{name} has {other.rows} rows of {table.rows}"
            elif other.checksum != table.checksum:
                yield f"{name} has other values"
        for kind in sorted(self.catalog | found.catalog):
            wanted = set(self.catalog.get(kind, []))
            there = set(found.catalog.get(kind, []))
            yield from (f"{kind} lack {line}" for line in sorted(wanted - there))
            yield from (f"{kind} have {line}" for line in sorted(there - wanted))


class Manifest(BaseModel):
    """What the member manifest.json holds."""

    format: int = FORMAT
    created_at: datetime
    whole: bool
    """All of the databases, by pg_dump; else some tables, by COPY, to load in order."""
    databases: dict[str, Part]

    def members(self) -> list[str]:
        """The names of the members beside the manifest."""
        if self.whole:
            return [dump_of(name) for name in self.databases]
        return [
            copy_of(table) for part in self.databases.values() for table in part.tables
        ]

    def summary(self) -> str:
        tables = [t for part in self.databases.values() for t in part.tables.values()]
        rows = sum(table.rows for table in tables)
        return f"{len(tables)} tables with {rows:,} rows"

    def lines(self) -> Iterator[str]:
        """Tell what each database has, a line each."""
        for part in self.databases.values():
            for name, table in part.tables.items():
                note = ", what was missing" if name in part.carried else ""
                yield f"{name:<24} {table.rows:>14,} rows{note}"
            counts = {k: len(v) for k, v in part.catalog.items() if "chunk" not in k}
            yield ", ".join(f"{count} {kind}" for kind, count in counts.items())


def dump_of(database: str) -> str:
    return f"{database}.dump"


def copy_of(table: str) -> str:
    return f"tables/{table}.copy"
