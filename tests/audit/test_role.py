"""A server as a role that can not change the audit log, as docs/audit.md says."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from quantplane import Client
from quantplane_server.config import Settings
from quantplane_server.main import recording, serving
from tests.admin import connected, until
from tests.admin.test_doctor import examined
from tests.audit import entered, listed
from tests.conftest import both_editions
from tests.market_data import quote
from tests.orders import fill, open_order
from tests.signals import publish, signal

PAGE = Path(__file__).parents[2] / "docs" / "audit.md"
ROLE = "quantplane_server"

pytestmark = both_editions


def documented() -> str:
    """Return the statements that make the role."""
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "CREATE ROLE" in block)
    return str(block)


@pytest.fixture
async def role_dsn(dsn: str) -> AsyncIterator[str]:
    """The database, for the role."""
    async with connected(dsn) as owner:
        user = await owner.fetchval("SELECT current_user")
        await owner.execute(documented())
        yield dsn.replace(f"//{user}@", f"//{ROLE}@")
        await owner.execute(f"DROP OWNED BY {ROLE}")
        await owner.execute(f"DROP ROLE {ROLE}")


async def test_the_server_works_as_the_role(
    settings: Settings, dsn: str, role_dsn: str
):
    assert ROLE in role_dsn
    settings = settings.model_copy(update={"postgres_dsn": role_dsn})
    async with recording(settings), serving(settings) as target:
        async with Client(target) as client:
            async with client.publish_quotes() as publisher:
                await publisher.send([quote("A", 1)])
                await publisher.durable()
            await publish(client, signal())
            order = await open_order(client)
            await fill(client, order, 10)
            await entered(dsn, 3, "orders")
            await entered(dsn, 1)
            found = await listed(client)
            actions = {entry.action for entry in found}
            assert actions == {"CREATED", "ACKNOWLEDGED", "TRADE", "PUBLISHED"}
            async with connected(dsn) as owner:
                tasks = "SELECT count(*) = 4 FROM maintenance_runs"
                await until(lambda: owner.fetchval(tasks))
                failed = "SELECT task, result FROM maintenance_runs WHERE NOT succeeded"
                assert await owner.fetch(failed) == []


async def test_the_doctor_finds_no_privilege_missing(settings: Settings, role_dsn: str):
    settings = settings.model_copy(update={"postgres_dsn": role_dsn})
    found = [finding.found for finding in (await examined(settings))["privileges"]]
    assert not any("lacks" in text for text in found)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_logs SET action = 'b'",
        "DELETE FROM audit_logs",
        "TRUNCATE audit_logs",
        "DROP TABLE audit_logs",
        "ALTER TABLE audit_logs DISABLE TRIGGER ALL",
        "GRANT UPDATE ON audit_logs TO quantplane_server",
    ],
)
async def test_the_role_can_add_to_the_audit_log_and_not_change_it(
    role_dsn: str, statement: str
):
    async with connected(role_dsn) as server:
        await server.execute(
            "INSERT INTO audit_logs (action, resource_type) VALUES ('a', 'b')"
        )
        try:
            await server.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            pass
        else:  # to grant what one does not have only warns
            assert statement.startswith("GRANT")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await server.execute("UPDATE audit_logs SET action = 'b'")
        assert await server.fetchval("SELECT action FROM audit_logs") == "a"


async def test_the_role_may_use_what_later_migrations_make(dsn: str, role_dsn: str):
    async with connected(dsn) as owner, connected(role_dsn) as server:
        await owner.execute("CREATE TABLE later (id SERIAL, name TEXT)")
        await server.execute("INSERT INTO later (name) VALUES ('a')")
        await server.execute("UPDATE later SET name = 'b'")
        assert await server.fetchval("SELECT name FROM later") == "b"
