"""Configurations as text."""

from collections.abc import Iterator, Sequence
from typing import IO

from quantplane import v1 as pb
from quantplane.tables.rows import print_details, print_rows
from quantplane.tables.text import milliseconds
from quantplane.tables.values import plain, short, value_text


def print_configurations(
    out: IO[str], configurations: Sequence[pb.Configuration]
) -> None:
    rows = [_row(configuration) for configuration in configurations]
    print_rows(out, rows, ("description", "by", "set"))


def _row(configuration: pb.Configuration) -> dict[str, str]:
    return {
        "key": configuration.key,
        "setting": short(_value(configuration)),
        "set": _time(configuration),
        "by": configuration.updated_by,
        "description": configuration.description,
    }


def print_configuration(
    out: IO[str], configurations: Sequence[pb.Configuration]
) -> None:
    """Print all there is to know of each, whole."""
    for configuration in configurations:
        print_details(out, _details(configuration))


def _details(configuration: pb.Configuration) -> Iterator[tuple[str, str]]:
    by = f" by {configuration.updated_by}" if configuration.updated_by else ""
    yield "key", configuration.key
    yield "value", _value(configuration)
    yield "description", configuration.description
    yield "set", _time(configuration) + by
    yield "read by", "servers" if configuration.known else ""
    yield "etag", configuration.etag


def _value(configuration: pb.Configuration) -> str:
    return value_text(plain(configuration.value))


def _time(configuration: pb.Configuration) -> str:
    if configuration.HasField("updated_at"):
        return milliseconds(configuration.updated_at)
    return "no, the default"
