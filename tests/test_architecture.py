"""The rules that keep the code base small enough to hold in the head."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions

from quantplane import v1 as pb
from quantplane.client import services

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "server" / "quantplane_server"
CORE = {
    "bus",
    "checks",
    "config",
    "constraints",
    "db",
    "errors",
    "coalescing",
    "fanout",
    "log",
    "log_stream",
    "migrate",
    "origin",
    "pages",
    "principal",
    "stamps",
    "streams",
    "structs",
    "tasks",
    "waiting",
    "telemetry",
    "tokens",
    "watch",
}
CLIENTS = {"demo", "paper"}  # of any server; they know nothing of this one
COMPOSERS = {
    *("main", "cli", "processes", "demo", "testing", "rescue", "__main__"),
    "readings",
}
SLICES = {
    *("market_data", "options", "models", "signals", "orders", "portfolio"),
    *("reference", "audit", "admin", "identity"),
}
# What a slice may use of others, inside its own transactions.
MAY_USE = {
    "orders": {
        *("signals.queries", "signals.events", "portfolio.queries"),
        *("portfolio.booking", "reference.queries", "reference.settings"),
        "reference.limits",
    },
    "portfolio": {"reference.settings"},
    "reference": {"audit.queries"},
    "identity": {"audit.queries", "reference.pages"},
}
TABLES = {
    "market_data": "market_data/queries.py",
    "bus_positions": "market_data/queries.py",
    "pending_days": "market_data/queries.py",
    "aggregated_days": "market_data/queries.py",
    "daily_bars": "market_data/queries.py",
    "options_chains": "options/queries.py",
    "option_chain_times": "options/queries.py",
    "heston_parameters": "models/queries.py",
    "sabr_parameters": "models/queries.py",
    "ou_parameters": "models/queries.py",
    "signals": "signals/queries.py",
    "signal_keys": "signals/queries.py",
    "orders": "orders/queries.py",
    "order_keys": "orders/queries.py",
    "executions": "portfolio/queries.py",
    "execution_keys": "portfolio/queries.py",
    "positions": "portfolio/queries.py",
    "strategy_positions": "portfolio/queries.py",
    "portfolio_snapshots": "portfolio/queries.py",
    "strategies": "reference/queries.py",
    "configurations": "reference/queries.py",
    "users": "identity/queries.py",
    "permissions": "identity/queries.py",
    "api_keys": "identity/queries.py",
    "sessions": "identity/queries.py",
    "signing_keys": "identity/queries.py",
    "login_failures": "identity/queries.py",
    "identity_version": "identity/queries.py",
    "audit_logs": "audit/queries.py",
    "audit_positions": "audit/queries.py",
    "retention_policies": "admin/queries.py",
    "maintenance_runs": "admin/queries.py",
    "staged_quotes": "market_data/queries.py",
    "server_keys": "tokens.py",
    "event_log": "log.py",
    "log_head": "log.py",
}


def modules() -> Iterator[tuple[str, set[str]]]:
    """Yield each server module's path and the server packages that it imports."""
    for path in sorted(SERVER.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        yield str(path.relative_to(SERVER)), names


def imported_parts(names: set[str]) -> set[str]:
    """Return the first level below quantplane_server of what is imported."""
    return {
        name.split(".")[1] for name in names if name.startswith("quantplane_server.")
    }


def part_of(path: str) -> str:
    """Return the first level below quantplane_server that a module is in."""
    return path.split("/")[0].removesuffix(".py")


def used_of(part: str, names: set[str]) -> set[str]:
    """Return the modules of another slice that are imported."""
    found = set()
    for name in names:
        _, *parts = name.split(".")
        if parts[:1] == [part] and len(parts) > 1:
            found.add(".".join(parts[:2]))
    return found


def test_a_slice_imports_the_core_the_adapter_and_itself():
    for path, names in modules():
        owner = path.split("/")[0]
        if owner in SLICES:
            used = imported_parts(names) - CORE - {"rpc", owner}
            lent = MAY_USE.get(owner, set())
            assert used <= {name.split(".")[0] for name in lent}, path
            for part in used:
                assert used_of(part, names) <= lent, path


def test_the_core_imports_only_the_core():
    for path, names in modules():
        if part_of(path) in CORE:
            assert imported_parts(names) <= CORE, path


def test_rpc_knows_no_slice():
    for path, names in modules():
        if path.startswith("rpc/"):
            known = {"errors", "origin", "principal", "rpc", "streams", "telemetry"}
            assert imported_parts(names) <= known, path


def test_backups_know_no_slice():
    for path, names in modules():
        if path.startswith("backup/"):
            allowed = {"db", "migrate", "tasks", "embedded", "backup"}
            assert imported_parts(names) <= allowed, path


def test_nobody_imports_what_composes():
    for path, names in modules():
        if path.removesuffix(".py") not in COMPOSERS:
            assert not imported_parts(names) & COMPOSERS, path


def test_clients_know_nothing_of_the_server():
    for path, names in modules():
        if (client := part_of(path)) in CLIENTS:
            assert imported_parts(names) <= {client}, path


def test_only_clients_use_the_client():
    allowed = {"quantplane.ids", "quantplane.ids.new_id"}
    # Files and variables that both sides know, and the health check's channel.
    common = tuple(
        f"quantplane.{name}"
        for name in ("v1", "tls", "credentials", "state", "descriptors")
    )
    for path, names in modules():
        client = {
            name
            for name in names
            if name.split(".")[0] == "quantplane"
            and name != "quantplane"
            and not name.startswith(common)
        }
        if part_of(path) not in CLIENTS:
            assert client <= allowed, path


def test_the_client_never_imports_the_server():
    for path in (ROOT / "client").rglob("*.py"):
        named = re.search(r"(import|from) +quantplane_server", path.read_text())
        assert not named, path


def test_only_its_owner_names_a_table():
    for path in SERVER.rglob("*.py"):
        if "backup" in path.parts:  # which is of all tables
            continue
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        statements = [text for text in strings if re.search(r"\b(FROM|INTO)\b", text)]
        for table, owner in TABLES.items():
            named = any(re.search(rf"\b{table}\b", text) for text in statements)
            assert not named or str(path.relative_to(SERVER)) == owner, (path, table)


def test_only_config_reads_the_environment():
    for path in SERVER.rglob("*.py"):
        # embedded hands its environment on to PostgreSQL, processes to its children
        if "embedded" in path.parts or path.name == "processes.py":
            continue
        if path != SERVER / "__init__.py":  # which sets what gRPC reads
            assert not re.search(r"os\.environ|getenv", path.read_text()), path


# What makes a new secret each time, or asks for the old: nobody repeats it by itself.
ONCE = {"Login", "CreateApiKey", "SetPassword"}


def methods() -> list[MethodDescriptor]:
    return [method for service, _ in services() for method in service.methods]


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
def test_every_rpc_has_its_options(method: MethodDescriptor):
    options = method.GetOptions()
    permission = options.Extensions[pb.permission]
    if permission.resource:
        assert permission.action in {"read", "publish", "create", "update", "delete"}
    if method.name not in ONCE:
        assert options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN


def test_every_error_has_a_reason_of_the_enum_and_every_reason_an_error():
    from quantplane_server import errors

    kinds = errors.QuantplaneError.__subclasses__()
    reasons = {kind.reason for kind in kinds}
    assert reasons | {pb.ERROR_REASON_UNSPECIFIED} == set(pb.ErrorReason.values())


def test_the_stubs_are_up_to_date():
    check = [sys.executable, ROOT / "protos" / "generate.py", "--check"]
    subprocess.run(check, check=True, capture_output=True)
