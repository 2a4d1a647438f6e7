"""Entries of the audit log as text."""

from collections.abc import Sequence
from typing import IO, Any

from quantplane import v1 as pb
from quantplane.tables.rows import print_rows
from quantplane.tables.text import milliseconds
from quantplane.tables.values import contents, differences, listed, plain

# Keys of values that are told before all others.
LEADING = (
    *("status", "value", "symbol", "side", "signal_type", "quantity", "price"),
    *("filled_quantity", "code", "text", "name", "type"),
)
# Keys that tell nothing which an entry does not say itself.
HIDDEN = {
    *("strategy_id", "key", "known", "revision", "actor"),
    *("created_at", "created_by", "updated_at", "updated_by"),
}


def print_audit_logs(out: IO[str], entries: Sequence[pb.AuditLog]) -> None:
    print_rows(out, [_row(entry) for entry in entries], ("from", "who"))


def _row(entry: pb.AuditLog) -> dict[str, str]:
    return {
        "time": milliseconds(entry.time),
        "who": entry.username or _actor(entry),
        "from": entry.ip_address,
        "action": entry.action,
        "resource": f"{entry.resource_type} {entry.resource_id}".strip(),
        "change": listed(_change(entry)),
    }


def _actor(entry: pb.AuditLog) -> str:
    """Return whom an event names who is no user, or none any more."""
    value = plain(entry.new_value)
    return str(value.get("actor", "")) if isinstance(value, dict) else ""


def _change(entry: pb.AuditLog) -> list[str]:
    """Return what differs; of what came or went, what it was."""
    values = [
        _ordered(plain(value))
        for value, given in (
            (entry.old_value, entry.HasField("old_value")),
            (entry.new_value, entry.HasField("new_value")),
        )
        if given
    ]
    if len(values) == 2:
        # A secret is not shown, so that it differs is not either.
        return differences(*values) or contents(values[1])
    return [text for value in values for text in contents(value)]


def _ordered(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    keys = dict.fromkeys((*LEADING, *value))
    return {key: value[key] for key in keys if key in value and key not in HIDDEN}
