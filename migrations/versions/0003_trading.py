"""What the order lifecycle, positions and the log keep beside the first schema."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Column -> type. All may be null: rows written as specified know nothing of them.
COLUMNS = {
    "orders": {
        "submitted_at": "TIMESTAMPTZ",
        "pending_version": "BIGINT",
        "pending_quantity": "DOUBLE PRECISION",
        "pending_price": "DOUBLE PRECISION",
        "pending_stop_price": "DOUBLE PRECISION",
    },
    "executions": {
        "strategy_id": "TEXT",
        "ref_execution_id": "UUID",
        "late": "BOOLEAN",
        "position_number": "BIGINT",
        "position_quantity": "DOUBLE PRECISION",
        "realized_pnl": "DOUBLE PRECISION",
    },
    "positions": {
        "n_executions": "BIGINT NOT NULL DEFAULT 0",
    },
}
LOG_KEPT = "30 days"


def upgrade(part: str) -> None:
    globals()[f"upgrade_{part}"]()


def downgrade(part: str) -> None:
    globals()[f"downgrade_{part}"]()


def upgrade_timeseries() -> None:
    for table, columns in COLUMNS.items():
        for name, kind in columns.items():
            op.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
    op.execute(
        """
        CREATE TABLE strategy_positions (
            strategy_id     TEXT NOT NULL,
            symbol          TEXT NOT NULL,
            quantity        DOUBLE PRECISION NOT NULL,
            average_cost    DOUBLE PRECISION NOT NULL,
            realized_pnl    DOUBLE PRECISION NOT NULL,
            cash_flow       DOUBLE PRECISION NOT NULL,
            commission      DOUBLE PRECISION NOT NULL,
            opened_at       TIMESTAMPTZ NOT NULL,
            updated_at      TIMESTAMPTZ NOT NULL,

            PRIMARY KEY (strategy_id, symbol)
        )
        """
    )
    op.execute(f"INSERT INTO retention_policies VALUES ('event_log', '{LOG_KEPT}')")


def downgrade_timeseries() -> None:
    op.execute("DELETE FROM retention_policies WHERE table_name = 'event_log'")
    op.execute("DROP TABLE strategy_positions")
    for table, columns in COLUMNS.items():
        for name in columns:
            op.execute(f"ALTER TABLE {table} DROP COLUMN {name}")


def upgrade_reference() -> None:
    pass


def downgrade_reference() -> None:
    pass
