"""Sessions, signing keys and failed logins; roles for strategies, feeds and brokers."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# What processes need to do their work.
ROLES = {
    "strategy": {
        "market_data": ["read"],
        "options": ["read"],
        "models": ["read"],
        "signals": ["*"],
        "orders": ["*"],
        "portfolio": ["read"],
        "strategies": ["read"],
        "configurations": ["read"],
    },
    "feed": {
        "market_data": ["read", "publish"],
        "options": ["read", "publish"],
        "models": ["read", "publish"],
    },
    "broker": {
        "broker": ["*"],
        "orders": ["read"],
        "market_data": ["read"],
    },
}
# Table -> changes that all servers must notice, by whatever means they are made; that a
# user has logged in or a key was used says nothing new of what is permitted.
NOTICED = {
    "users": "INSERT OR UPDATE OF username, role, is_active OR DELETE OR TRUNCATE",
    "permissions": "INSERT OR UPDATE OR DELETE OR TRUNCATE",
    "api_keys": "INSERT OR UPDATE OF user_id, key_hash, role, strategy_id, expires_at,"
    " revoked_at OR DELETE OR TRUNCATE",
    "sessions": "UPDATE OF ended_at",
    "signing_keys": "INSERT OR UPDATE OR DELETE OR TRUNCATE",
}


def upgrade(part: str) -> None:
    globals()[f"upgrade_{part}"]()


def downgrade(part: str) -> None:
    globals()[f"downgrade_{part}"]()


def upgrade_timeseries() -> None:
    pass


def downgrade_timeseries() -> None:
    pass


def upgrade_reference() -> None:
    op.execute(
        """
        CREATE TABLE sessions (
            session_id      UUID PRIMARY KEY,
            user_id         UUID NOT NULL REFERENCES users (user_id),
            secret_hash     BYTEA NOT NULL,
            generation      BIGINT NOT NULL DEFAULT 1,
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            refreshed_at    TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            expires_at      TIMESTAMPTZ NOT NULL,
            ended_at        TIMESTAMPTZ
        )
        """
    )
    op.execute("ALTER TABLE audit_logs ADD COLUMN key_id UUID")
    op.execute("CREATE INDEX idx_sessions_user ON sessions (user_id, created_at)")
    op.execute(
        """
        CREATE TABLE signing_keys (
            key_id          TEXT PRIMARY KEY,
            secret          BYTEA NOT NULL,
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW()
        )
        """
    )
    op.execute(
        sa.text("INSERT INTO signing_keys VALUES (:id, :secret)").bindparams(
            id=secrets.token_hex(8), secret=secrets.token_bytes(32)
        )
    )
    op.execute(
        """
        CREATE TABLE login_failures (
            subject         TEXT PRIMARY KEY,
            forgotten_at    TIMESTAMPTZ NOT NULL,
            locked_until    TIMESTAMPTZ
        )
        """
    )
    op.execute(
        """
        CREATE TABLE identity_version (
            single          BOOLEAN PRIMARY KEY DEFAULT true,
            version         BIGINT NOT NULL
        )
        """
    )
    op.execute("INSERT INTO identity_version (version) VALUES (1)")
    op.execute(
        """
        CREATE FUNCTION notice_identity() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN
            UPDATE identity_version SET version = version + 1;
            RETURN NULL;
        END
        $$
        """
    )
    for table, changes in NOTICED.items():
        op.execute(
            f"CREATE TRIGGER notice_identity AFTER {changes} ON {table}"
            f" FOR EACH STATEMENT EXECUTE FUNCTION notice_identity()"
        )
    values = ", ".join(
        f"('{role}', '{resource}', '{action}')"
        for role, resources in ROLES.items()
        for resource, actions in resources.items()
        for action in actions
    )
    op.execute(
        f"INSERT INTO permissions (role, resource, action) VALUES {values}"
        " ON CONFLICT DO NOTHING"
    )


def downgrade_reference() -> None:
    roles = ", ".join(f"'{role}'" for role in ROLES)
    op.execute(f"DELETE FROM permissions WHERE role IN ({roles})")
    for table in ("users", "permissions", "api_keys"):
        op.execute(f"DROP TRIGGER notice_identity ON {table}")
    op.execute("ALTER TABLE audit_logs DROP COLUMN key_id")
    op.execute("DROP TABLE identity_version, login_failures, signing_keys, sessions")
    op.execute("DROP FUNCTION notice_identity")
