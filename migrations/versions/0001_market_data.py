"""Market data, the recorder's positions and the servers' shared keys."""

import secrets

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

from quantplane_server.db import EDITION, Edition

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INSUFFICIENT_PRIVILEGE = "42501"


def upgrade(part: str) -> None:
    if part == "timeseries":  # the reference data begin later
        upgrade_timeseries()


def downgrade(part: str) -> None:
    if part == "timeseries":
        downgrade_timeseries()


def upgrade_timeseries() -> None:
    create_extension()
    create_market_data()
    create_server_tables()
    match edition():
        case Edition.PLAIN:
            create_shims()
        case Edition.APACHE:
            create_hypertable()
        case Edition.COMMUNITY:
            create_hypertable()
            create_policies()


def downgrade_timeseries() -> None:
    """Drop everything but the extension, which belongs to the database."""
    op.execute("DROP TABLE market_data")  # alone: TimescaleDB refuses it in a list
    op.execute("DROP TABLE bus_positions, server_keys")
    if edition() is Edition.PLAIN:
        drop_shims()


def edition() -> Edition:
    return Edition(op.get_bind().scalar(sa.text(EDITION)))


def create_extension() -> None:
    """Create TimescaleDB's extension where the server has it loaded.

    Only here: a database that began as the plain edition stays one.
    """
    offered = op.get_bind().scalar(
        sa.text(
            """
            SELECT EXISTS (SELECT FROM pg_available_extensions
                            WHERE name = 'timescaledb' AND installed_version IS NULL)
               -- Who may not read shared_preload_libraries still sees the setting
               -- that only the preloaded library defines.
               AND current_setting('timescaledb.max_background_workers', true)
                   IS NOT NULL
            """
        )
    )
    if not offered:
        return
    try:
        op.execute("CREATE EXTENSION timescaledb")
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != INSUFFICIENT_PRIVILEGE:
            raise
        raise CommandError(
            "TimescaleDB is installed on this PostgreSQL server, but this user may "
            "not create the extension: have an administrator run "
            "`CREATE EXTENSION timescaledb` in this database, then migrate again"
        ) from error


def create_market_data() -> None:
    op.execute(
        """
        CREATE TABLE market_data (
            time        TIMESTAMPTZ NOT NULL,
            symbol      TEXT NOT NULL,
            open        DOUBLE PRECISION,
            high        DOUBLE PRECISION,
            low         DOUBLE PRECISION,
            close       DOUBLE PRECISION NOT NULL,
            volume      BIGINT,
            vwap        DOUBLE PRECISION,
            bid         DOUBLE PRECISION,
            ask         DOUBLE PRECISION,
            bid_size    INTEGER,
            ask_size    INTEGER,

            PRIMARY KEY (time, symbol)
        )
        """
    )
    op.execute("CREATE INDEX idx_market_data_symbol ON market_data (symbol, time DESC)")


def create_server_tables() -> None:
    op.execute(
        """
        CREATE TABLE bus_positions (
            shard   SMALLINT PRIMARY KEY,
            epoch   BIGINT NOT NULL,
            number  BIGINT NOT NULL
        )
        """
    )
    op.execute(
        "CREATE TABLE server_keys (purpose TEXT PRIMARY KEY, key BYTEA NOT NULL)"
    )
    op.execute(
        sa.text("INSERT INTO server_keys VALUES ('tokens', :key)").bindparams(
            key=secrets.token_bytes(32)
        )
    )


def create_hypertable() -> None:
    # The primary key already leads with time: the default index would repeat it.
    op.execute(
        """
        SELECT create_hypertable('market_data', 'time',
                                 create_default_indexes => false)
        """
    )


def create_policies() -> None:
    op.execute(
        """
        ALTER TABLE market_data SET (
            timescaledb.compress,
            timescaledb.compress_segmentby = 'symbol'
        )
        """
    )
    op.execute("SELECT add_compression_policy('market_data', INTERVAL '7 days')")
    op.execute("SELECT add_retention_policy('market_data', INTERVAL '5 years')")


# What queries use of TimescaleDB, for PostgreSQL alone: the same names, arguments
# and results.

# Buckets of whole months are counted from January 2000, others from Monday,
# 3 January 2000; both in UTC. The planner folds the CASE for a constant width.
TIME_BUCKET = """
    CREATE FUNCTION time_bucket(bucket_width INTERVAL, ts TIMESTAMPTZ)
    RETURNS TIMESTAMPTZ LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
        SELECT CASE
            WHEN extract(year FROM bucket_width) * 12
                 + extract(month FROM bucket_width) = 0
                THEN date_bin(bucket_width, ts, '2000-01-03 00:00:00+00')
            ELSE month_bucket(bucket_width, ts)
        END
    $$
"""

MONTH_BUCKET = """
    CREATE FUNCTION month_bucket(bucket_width INTERVAL, ts TIMESTAMPTZ)
    RETURNS TIMESTAMPTZ LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
    AS $$
    DECLARE
        width  INTEGER := extract(year FROM bucket_width) * 12
                          + extract(month FROM bucket_width);
        utc    TIMESTAMP := ts AT TIME ZONE 'UTC';
        months INTEGER;
    BEGIN
        IF bucket_width - make_interval(months => width) <> INTERVAL '0' THEN
            RAISE 'month intervals cannot have day or time component'
                USING ERRCODE = 'feature_not_supported';
        ELSIF width < 0 THEN
            RAISE 'period must be greater than 0'
                USING ERRCODE = 'invalid_parameter_value';
        ELSIF NOT isfinite(ts) THEN
            RETURN ts;
        END IF;
        months := (extract(year FROM utc) - 2000) * 12 + extract(month FROM utc) - 1;
        months := floor(months::NUMERIC / width) * width;
        RETURN (TIMESTAMP '2000-01-01' + make_interval(months => months))
               AT TIME ZONE 'UTC';
    END
    $$
"""

# A value type stands beside the suffix of its aggregates' state.
SHIM_TYPES = {"DOUBLE PRECISION": "double", "BIGINT": "bigint", "INTEGER": "integer"}

# The state of first and last is one row: a row's time and its value, which may be
# null. Rows without a time do not count. Of equal times the row met first stays.
STATE = "CREATE TYPE timed_{suffix} AS (at TIMESTAMPTZ, value {type})"

STEP = """
    CREATE FUNCTION {name}_step(state timed_{suffix}, value {type}, at TIMESTAMPTZ)
    RETURNS timed_{suffix} LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    AS $$
    BEGIN
        IF at {before} state.at OR (state.at IS NULL AND at IS NOT NULL) THEN
            RETURN (at, value);
        END IF;
        RETURN state;
    END
    $$
"""

MERGE = """
    CREATE FUNCTION {name}_merge(state timed_{suffix}, other timed_{suffix})
    RETURNS timed_{suffix} LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    AS $$
    BEGIN
        RETURN {name}_step(state, other.value, other.at);
    END
    $$
"""

VALUE = """
    CREATE FUNCTION timed_value(state timed_{suffix})
    RETURNS {type} LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN state.value
"""

AGGREGATE = """
    CREATE AGGREGATE {name}(value {type}, at TIMESTAMPTZ) (
        SFUNC = {name}_step, STYPE = timed_{suffix}, FINALFUNC = timed_value,
        COMBINEFUNC = {name}_merge, PARALLEL = SAFE
    )
"""


def create_shims() -> None:
    op.execute(MONTH_BUCKET)
    op.execute(TIME_BUCKET)
    for type, suffix in SHIM_TYPES.items():
        op.execute(STATE.format(type=type, suffix=suffix))
        op.execute(VALUE.format(type=type, suffix=suffix))
        for name, before in {"first": "<", "last": ">"}.items():
            for statement in STEP, MERGE, AGGREGATE:
                op.execute(
                    statement.format(name=name, before=before, type=type, suffix=suffix)
                )


def drop_shims() -> None:
    op.execute("DROP FUNCTION time_bucket(INTERVAL, TIMESTAMPTZ)")
    op.execute("DROP FUNCTION month_bucket(INTERVAL, TIMESTAMPTZ)")
    for suffix in SHIM_TYPES.values():
        # CASCADE takes along the functions and aggregates over this state.
        op.execute(f"DROP TYPE timed_{suffix} CASCADE")
