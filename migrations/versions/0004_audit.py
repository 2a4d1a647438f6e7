"""What the audit log keeps beside the first schema."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade(part: str) -> None:
    globals()[f"upgrade_{part}"]()


def downgrade(part: str) -> None:
    globals()[f"downgrade_{part}"]()


def upgrade_timeseries() -> None:
    pass


def downgrade_timeseries() -> None:
    pass


def upgrade_reference() -> None:
    op.execute("ALTER TABLE audit_logs ADD COLUMN trace_id TEXT")
    # How far the logs of signals and orders are entered: the last revision, and a
    # check of its entry.
    op.execute(
        """
        CREATE TABLE audit_positions (
            log             TEXT PRIMARY KEY,
            revision        BIGINT NOT NULL,
            entry_check     BYTEA NOT NULL
        )
        """
    )


def downgrade_reference() -> None:
    op.execute("DROP TABLE audit_positions")
    op.execute("ALTER TABLE audit_logs DROP COLUMN trace_id")
