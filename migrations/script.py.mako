"""${message}"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(part: str) -> None:
    globals()[f"upgrade_{part}"]()


def downgrade(part: str) -> None:
    globals()[f"downgrade_{part}"]()


def upgrade_timeseries() -> None:
    ${context.get("timeseries_upgrades") or "pass"}


def downgrade_timeseries() -> None:
    ${context.get("timeseries_downgrades") or "pass"}


def upgrade_reference() -> None:
    ${context.get("reference_upgrades") or "pass"}


def downgrade_reference() -> None:
    ${context.get("reference_downgrades") or "pass"}
