"""All other tables: options, models, trading, portfolio, reference data, daily bars."""

import sqlalchemy as sa
from alembic import op

from quantplane_server.db import EDITION, Edition

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Each with the column that it is partitioned by.
HYPERTABLES = {
    "options_chains": "time",
    "heston_parameters": "time",
    "sabr_parameters": "time",
    "ou_parameters": "time",
    "signals": "time",
    "orders": "created_at",
    "executions": "time",
    "portfolio_snapshots": "time",
}
RETENTION = {
    "market_data": "5 years",
    "options_chains": "5 years",
    "signals": "5 years",
    "portfolio_snapshots": "10 years",
}


def upgrade(part: str) -> None:
    globals()[f"upgrade_{part}"]()


def downgrade(part: str) -> None:
    globals()[f"downgrade_{part}"]()


def upgrade_timeseries() -> None:
    create_options()
    create_models()
    create_keys()
    create_trading()
    create_portfolio()
    create_log()
    create_maintenance()
    create_daily_bars()


def downgrade_timeseries() -> None:
    drop_daily_bars()
    for table in reversed(HYPERTABLES):
        op.execute(f"DROP TABLE {table}")  # alone: TimescaleDB refuses them in a list
    op.execute(
        "DROP TABLE execution_keys, order_keys, signal_keys, positions, event_log,"
        " log_head, option_chain_times, retention_policies, maintenance_runs"
    )
    op.execute("DROP FUNCTION keep_signal_key, keep_order_key, keep_execution_key")


def edition() -> Edition:
    return Edition(op.get_bind().scalar(sa.text(EDITION)))


def create_hypertable(table: str) -> None:
    if edition() is Edition.PLAIN:
        return
    # The indexes that are wanted are made by name.
    op.execute(
        f"""
        SELECT create_hypertable('{table}', '{HYPERTABLES[table]}',
                                 create_default_indexes => false)
        """
    )


# --- Options ------------------------------------------------------------------------


def create_options() -> None:
    op.execute(
        """
        CREATE TABLE options_chains (
            time            TIMESTAMPTZ NOT NULL,
            underlying      TEXT NOT NULL,
            expiration      DATE NOT NULL,
            strike          DOUBLE PRECISION NOT NULL,
            option_type     TEXT NOT NULL,
            bid             DOUBLE PRECISION,
            ask             DOUBLE PRECISION,
            last_price      DOUBLE PRECISION,
            volume          INTEGER,
            open_interest   INTEGER,
            implied_vol     DOUBLE PRECISION,
            delta           DOUBLE PRECISION,
            gamma           DOUBLE PRECISION,
            theta           DOUBLE PRECISION,
            vega            DOUBLE PRECISION,
            rho             DOUBLE PRECISION,

            PRIMARY KEY (time, underlying, expiration, strike, option_type),
            CONSTRAINT valid_option_type CHECK (option_type IN ('call', 'put')),
            CONSTRAINT valid_strike CHECK (strike > 0 AND strike < 'Infinity'),
            CONSTRAINT valid_expiration
                CHECK (expiration >= (time AT TIME ZONE 'UTC')::date)
        )
        """
    )
    create_hypertable("options_chains")
    op.execute(
        "CREATE INDEX idx_options_underlying ON options_chains (underlying, time DESC)"
    )
    op.execute("CREATE INDEX idx_options_expiration ON options_chains (expiration)")
    op.execute(
        """
        CREATE TABLE option_chain_times (
            underlying  TEXT NOT NULL,
            time        TIMESTAMPTZ NOT NULL,
            whole       BOOLEAN NOT NULL,

            PRIMARY KEY (underlying, time)
        )
        """
    )


# --- Model parameters ---------------------------------------------------------------


def create_models() -> None:
    op.execute(
        """
        CREATE TABLE heston_parameters (
            time            TIMESTAMPTZ NOT NULL,
            symbol          TEXT NOT NULL,
            kappa           DOUBLE PRECISION NOT NULL,
            theta           DOUBLE PRECISION NOT NULL,
            sigma           DOUBLE PRECISION NOT NULL,
            rho             DOUBLE PRECISION NOT NULL,
            v0              DOUBLE PRECISION NOT NULL,
            feller_satisfied BOOLEAN NOT NULL,
            rmse            DOUBLE PRECISION,
            r_squared       DOUBLE PRECISION,
            n_options       INTEGER,
            calibration_time_ms INTEGER,

            PRIMARY KEY (time, symbol),
            CONSTRAINT valid_heston_kappa CHECK (kappa > 0 AND kappa < 'Infinity'),
            CONSTRAINT valid_heston_theta CHECK (theta > 0 AND theta < 'Infinity'),
            CONSTRAINT valid_heston_sigma CHECK (sigma > 0 AND sigma < 'Infinity'),
            CONSTRAINT valid_heston_rho CHECK (rho >= -1 AND rho <= 1),
            CONSTRAINT valid_heston_v0 CHECK (v0 > 0 AND v0 < 'Infinity'),
            CONSTRAINT valid_feller
                CHECK (feller_satisfied = (2 * kappa * theta > sigma * sigma))
        )
        """
    )
    create_hypertable("heston_parameters")
    op.execute(
        "CREATE INDEX idx_heston_symbol ON heston_parameters (symbol, time DESC)"
    )
    op.execute(
        """
        CREATE TABLE sabr_parameters (
            time            TIMESTAMPTZ NOT NULL,
            symbol          TEXT NOT NULL,
            maturity        DOUBLE PRECISION NOT NULL,
            alpha           DOUBLE PRECISION NOT NULL,
            beta            DOUBLE PRECISION NOT NULL,
            rho             DOUBLE PRECISION NOT NULL,
            nu              DOUBLE PRECISION NOT NULL,
            rmse            DOUBLE PRECISION,
            n_options       INTEGER,

            PRIMARY KEY (time, symbol, maturity),
            CONSTRAINT valid_sabr_maturity
                CHECK (maturity > 0 AND maturity < 'Infinity'),
            CONSTRAINT valid_sabr_alpha CHECK (alpha > 0 AND alpha < 'Infinity'),
            CONSTRAINT valid_sabr_beta CHECK (beta >= 0 AND beta <= 1),
            CONSTRAINT valid_sabr_rho CHECK (rho >= -1 AND rho <= 1),
            CONSTRAINT valid_sabr_nu CHECK (nu >= 0 AND nu < 'Infinity')
        )
        """
    )
    create_hypertable("sabr_parameters")
    op.execute("CREATE INDEX idx_sabr_symbol ON sabr_parameters (symbol, time DESC)")
    op.execute(
        """
        CREATE TABLE ou_parameters (
            time            TIMESTAMPTZ NOT NULL,
            pair_id         TEXT NOT NULL,
            asset1          TEXT NOT NULL,
            asset2          TEXT NOT NULL,
            hedge_ratio     DOUBLE PRECISION NOT NULL,
            theta           DOUBLE PRECISION NOT NULL,
            mu              DOUBLE PRECISION NOT NULL,
            sigma           DOUBLE PRECISION NOT NULL,
            half_life       DOUBLE PRECISION NOT NULL,
            adf_statistic   DOUBLE PRECISION,
            adf_pvalue      DOUBLE PRECISION,
            entry_lower     DOUBLE PRECISION,
            entry_upper     DOUBLE PRECISION,
            exit_target     DOUBLE PRECISION,
            stop_loss       DOUBLE PRECISION,

            PRIMARY KEY (time, pair_id),
            CONSTRAINT valid_ou_theta CHECK (theta > 0 AND theta < 'Infinity'),
            CONSTRAINT valid_ou_sigma CHECK (sigma > 0 AND sigma < 'Infinity'),
            CONSTRAINT valid_half_life
                CHECK (abs(half_life * theta / ln(2.0::float8) - 1) <= 1e-6)
        )
        """
    )
    create_hypertable("ou_parameters")
    op.execute("CREATE INDEX idx_ou_pair ON ou_parameters (pair_id, time DESC)")


# --- Trading ------------------------------------------------------------------------

# Keeps one row in the key table per row of the hypertable. Without the key row that
# an insert meets having the same time, an id could stand at two times.
KEEP_KEY = """
    CREATE FUNCTION {function}() RETURNS TRIGGER LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            DELETE FROM {keys} WHERE {id} = OLD.{id} AND {time} = OLD.{time};
            RETURN NULL;
        ELSIF TG_OP = 'UPDATE' THEN
            RAISE '{id} and {time} name the row and do not change'
                USING ERRCODE = 'restrict_violation';
        END IF;
        INSERT INTO {keys} ({id}, {time}{more})
        VALUES (NEW.{id}, NEW.{time}{new_more})
        ON CONFLICT ({id}) DO NOTHING;
        IF NOT FOUND
           AND (SELECT {time} FROM {keys} WHERE {id} = NEW.{id}) <> NEW.{time} THEN
            RAISE 'duplicate key: % is taken', NEW.{id}
                USING ERRCODE = 'unique_violation', CONSTRAINT = '{keys}_pkey',
                      TABLE = '{keys}';
        END IF;
        RETURN NEW;
    END
    $$
"""


def create_keys() -> None:
    op.execute(
        """
        CREATE TABLE signal_keys (
            signal_id       UUID PRIMARY KEY,
            time            TIMESTAMPTZ NOT NULL,
            request_hash    BYTEA
        )
        """
    )
    op.execute(
        """
        CREATE TABLE order_keys (
            order_id        UUID PRIMARY KEY,
            created_at      TIMESTAMPTZ NOT NULL,
            strategy_id     TEXT NOT NULL DEFAULT '',
            client_order_id TEXT,
            request_hash    BYTEA,

            UNIQUE (strategy_id, client_order_id)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE execution_keys (
            execution_id    UUID PRIMARY KEY,
            time            TIMESTAMPTZ NOT NULL,
            order_id        UUID REFERENCES order_keys (order_id),
            broker_exec_id  TEXT,

            UNIQUE (order_id, broker_exec_id)
        )
        """
    )


def keep_keys(table: str, keys: str, id: str, more: dict[str, str]) -> None:
    """Have triggers keep the identity of a table's rows in its key table."""
    time = HYPERTABLES[table]
    function = f"keep_{keys.removesuffix('s')}"
    op.execute(
        KEEP_KEY.format(
            function=function,
            keys=keys,
            id=id,
            time=time,
            more="".join(f", {column}" for column in more),
            new_more="".join(f", {value}" for value in more.values()),
        )
    )
    for name, event in {
        "insert": "BEFORE INSERT",
        "update": f"BEFORE UPDATE OF {id}, {time}",
        "delete": "AFTER DELETE",
    }.items():
        op.execute(
            f"CREATE TRIGGER {function}_on_{name} {event} ON {table}"
            f" FOR EACH ROW EXECUTE FUNCTION {function}()"
        )


def create_trading() -> None:
    op.execute(
        """
        CREATE TABLE signals (
            signal_id       UUID NOT NULL DEFAULT gen_random_uuid(),
            time            TIMESTAMPTZ NOT NULL,
            strategy_id     TEXT NOT NULL,
            symbol          TEXT NOT NULL,
            signal_type     TEXT NOT NULL,
            strength        DOUBLE PRECISION NOT NULL,
            confidence      DOUBLE PRECISION NOT NULL,
            target_price    DOUBLE PRECISION,
            stop_loss       DOUBLE PRECISION,
            expiration      TIMESTAMPTZ,
            metadata        JSONB,
            status          TEXT DEFAULT 'active',
            trace_id        TEXT,

            PRIMARY KEY (signal_id, time),
            CONSTRAINT valid_strength CHECK (strength >= 0 AND strength <= 1),
            CONSTRAINT valid_confidence CHECK (confidence >= 0 AND confidence <= 1),
            CONSTRAINT valid_signal_type CHECK
                (signal_type IN ('LONG', 'SHORT', 'EXIT_LONG', 'EXIT_SHORT')),
            CONSTRAINT valid_signal_status CHECK
                (status IN ('active', 'executed', 'expired', 'cancelled'))
        )
        """
    )
    create_hypertable("signals")
    op.execute("CREATE INDEX idx_signals_strategy ON signals (strategy_id, time DESC)")
    op.execute("CREATE INDEX idx_signals_symbol ON signals (symbol, time DESC)")
    op.execute(
        "CREATE INDEX idx_signals_active ON signals (status) WHERE status = 'active'"
    )
    keep_keys("signals", "signal_keys", "signal_id", {})
    op.execute(
        """
        CREATE TABLE orders (
            order_id        UUID NOT NULL DEFAULT gen_random_uuid(),
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            updated_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            strategy_id     TEXT,
            signal_id       UUID REFERENCES signal_keys (signal_id),
            symbol          TEXT NOT NULL,
            side            TEXT NOT NULL,
            order_type      TEXT NOT NULL,
            quantity        DOUBLE PRECISION NOT NULL,
            price           DOUBLE PRECISION,
            stop_price      DOUBLE PRECISION,
            time_in_force   TEXT NOT NULL DEFAULT 'day',
            status          TEXT NOT NULL DEFAULT 'pending',
            filled_quantity DOUBLE PRECISION DEFAULT 0,
            avg_fill_price  DOUBLE PRECISION,
            broker_order_id TEXT,
            error_message   TEXT,
            client_order_id TEXT,
            version         BIGINT NOT NULL DEFAULT 1,
            pending_request TEXT,
            outcome_unknown BOOLEAN NOT NULL DEFAULT false,
            reject_code     TEXT,
            overfill_quantity DOUBLE PRECISION NOT NULL DEFAULT 0,
            triggered_at    TIMESTAMPTZ,
            trace_id        TEXT,

            PRIMARY KEY (order_id, created_at),
            CONSTRAINT valid_order_side CHECK (side IN ('buy', 'sell')),
            CONSTRAINT valid_order_type CHECK
                (order_type IN ('market', 'limit', 'stop', 'stop_limit')),
            CONSTRAINT valid_order_quantity CHECK
                (quantity > 0 AND quantity < 'Infinity'),
            CONSTRAINT valid_time_in_force CHECK
                (time_in_force IN ('day', 'gtc', 'ioc', 'fok')),
            CONSTRAINT valid_order_status CHECK
                (status IN ('pending', 'open', 'filled', 'cancelled', 'rejected',
                            'expired')),
            CONSTRAINT valid_pending_request CHECK
                (pending_request IN ('cancel', 'replace'))
        )
        """
    )
    create_hypertable("orders")
    op.execute(
        "CREATE INDEX idx_orders_strategy ON orders (strategy_id, created_at DESC)"
    )
    op.execute("CREATE INDEX idx_orders_symbol ON orders (symbol, created_at DESC)")
    op.execute(
        "CREATE INDEX idx_orders_status ON orders (status)"
        " WHERE status IN ('pending', 'open')"
    )
    # For the foreign key: what is deleted is looked for here.
    op.execute(
        "CREATE INDEX idx_orders_signal ON orders (signal_id)"
        " WHERE signal_id IS NOT NULL"
    )
    strategy = "coalesce(NEW.strategy_id, '')"
    named = {"strategy_id": strategy, "client_order_id": "NEW.client_order_id"}
    keep_keys("orders", "order_keys", "order_id", named)
    op.execute(
        """
        CREATE TABLE executions (
            execution_id    UUID NOT NULL DEFAULT gen_random_uuid(),
            time            TIMESTAMPTZ NOT NULL,
            order_id        UUID REFERENCES order_keys (order_id),
            symbol          TEXT NOT NULL,
            side            TEXT NOT NULL,
            quantity        DOUBLE PRECISION NOT NULL,
            price           DOUBLE PRECISION NOT NULL,
            commission      DOUBLE PRECISION DEFAULT 0,
            venue           TEXT,
            broker_exec_id  TEXT,

            PRIMARY KEY (execution_id, time),
            CONSTRAINT valid_execution_side CHECK (side IN ('buy', 'sell'))
        )
        """
    )
    create_hypertable("executions")
    op.execute("CREATE INDEX idx_executions_order ON executions (order_id)")
    op.execute("CREATE INDEX idx_executions_symbol ON executions (symbol, time DESC)")
    named = {"order_id": "NEW.order_id", "broker_exec_id": "NEW.broker_exec_id"}
    keep_keys("executions", "execution_keys", "execution_id", named)


def create_portfolio() -> None:
    op.execute(
        """
        CREATE TABLE portfolio_snapshots (
            time            TIMESTAMPTZ NOT NULL,
            total_value     DOUBLE PRECISION NOT NULL,
            cash            DOUBLE PRECISION NOT NULL,
            positions_value DOUBLE PRECISION NOT NULL,
            total_pnl       DOUBLE PRECISION NOT NULL,
            unrealized_pnl  DOUBLE PRECISION NOT NULL,
            realized_pnl    DOUBLE PRECISION NOT NULL,
            total_exposure  DOUBLE PRECISION NOT NULL,
            net_exposure    DOUBLE PRECISION NOT NULL,
            n_positions     INTEGER NOT NULL,

            PRIMARY KEY (time)
        )
        """
    )
    create_hypertable("portfolio_snapshots")
    op.execute(
        """
        CREATE TABLE positions (
            symbol          TEXT PRIMARY KEY,
            quantity        DOUBLE PRECISION NOT NULL,
            average_cost    DOUBLE PRECISION NOT NULL,
            realized_pnl    DOUBLE PRECISION DEFAULT 0,
            strategy_id     TEXT,
            opened_at       TIMESTAMPTZ NOT NULL,
            updated_at      TIMESTAMPTZ NOT NULL DEFAULT NOW()
        )
        """
    )


def create_log() -> None:
    op.execute(
        """
        CREATE TABLE event_log (
            log         TEXT NOT NULL,
            revision    BIGINT NOT NULL,
            time        TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            type        TEXT NOT NULL,
            key         TEXT NOT NULL,
            actor       TEXT,
            trace_id    TEXT,
            payload     BYTEA NOT NULL,

            PRIMARY KEY (log, revision)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE log_head (
            log         TEXT PRIMARY KEY,
            revision    BIGINT NOT NULL DEFAULT 0
        )
        """
    )


# --- Maintenance --------------------------------------------------------------------


def create_maintenance() -> None:
    op.execute(
        """
        CREATE TABLE retention_policies (
            table_name  TEXT PRIMARY KEY,
            drop_after  INTERVAL NOT NULL
        )
        """
    )
    op.execute(
        """
        CREATE TABLE maintenance_runs (
            task        TEXT PRIMARY KEY,
            started_at  TIMESTAMPTZ NOT NULL,
            duration    INTERVAL NOT NULL,
            succeeded   BOOLEAN NOT NULL,
            result      TEXT NOT NULL
        )
        """
    )
    # No policy of the database is for a plain table.
    op.execute(
        "INSERT INTO retention_policies VALUES ('option_chain_times', '5 years')"
    )
    community = edition() is Edition.COMMUNITY
    for table, age in RETENTION.items():
        if not community:
            op.execute(f"INSERT INTO retention_policies VALUES ('{table}', '{age}')")
        elif table in HYPERTABLES:  # that of market_data exists
            op.execute(f"SELECT add_retention_policy('{table}', INTERVAL '{age}')")


# --- Daily bars ---------------------------------------------------------------------

DAY_COLUMNS = (
    "day, symbol, open, high, low, close, volume, avg_price, first_price, highest,"
    " lowest, vwap_value, vwap_volume, bid, ask, bid_size, ask_size"
)

# The first six are as specified. The others let bars of whole days be computed from
# these days as from the rows: rows without open, high or low count with their close.
DAY_VALUES = """
    first(open, time) AS open,
    max(high) AS high,
    min(low) AS low,
    last(close, time) AS close,
    sum(volume) AS volume,
    avg(close) AS avg_price,
    first(coalesce(open, close), time) AS first_price,
    max(coalesce(high, close)) AS highest,
    min(coalesce(low, close)) AS lowest,
    sum(vwap * volume) AS vwap_value,
    sum(volume) FILTER (WHERE vwap IS NOT NULL) AS vwap_volume,
    last(bid, time) AS bid,
    last(ask, time) AS ask,
    last(bid_size, time) AS bid_size,
    last(ask_size, time) AS ask_size
"""


def create_daily_bars() -> None:
    """Create what holds finished days, and views that add the others from the rows."""
    op.execute(
        """
        CREATE TABLE pending_days (
            symbol      TEXT NOT NULL,
            day         TIMESTAMPTZ NOT NULL,
            version     BIGINT NOT NULL GENERATED BY DEFAULT AS IDENTITY,

            PRIMARY KEY (symbol, day)
        )
        """
    )
    op.execute(
        """
        INSERT INTO pending_days (symbol, day)
        SELECT DISTINCT symbol, time_bucket('1 day', time) FROM market_data
        """
    )
    if edition() is Edition.COMMUNITY:
        create_continuous_aggregate()
        create_exact_days("daily_bars", "market_data_daily")
    else:
        create_aggregated_days()
        create_exact_days("daily_bars", "aggregated_days")
        op.execute("CREATE VIEW market_data_daily AS SELECT * FROM daily_bars")


def create_continuous_aggregate() -> None:
    op.execute(
        f"""
        CREATE MATERIALIZED VIEW market_data_daily
        WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
        SELECT time_bucket('1 day', time) AS day, symbol, {DAY_VALUES}
          FROM market_data
         GROUP BY day, symbol
        WITH NO DATA
        """
    )
    op.execute(
        """
        SELECT add_continuous_aggregate_policy('market_data_daily',
            start_offset => INTERVAL '3 days',
            end_offset => INTERVAL '1 hour',
            schedule_interval => INTERVAL '1 hour'
        )
        """
    )


def create_aggregated_days() -> None:
    op.execute(
        """
        CREATE TABLE aggregated_days (
            day         TIMESTAMPTZ NOT NULL,
            symbol      TEXT NOT NULL,
            open        DOUBLE PRECISION,
            high        DOUBLE PRECISION,
            low         DOUBLE PRECISION,
            close       DOUBLE PRECISION,
            volume      NUMERIC,
            avg_price   DOUBLE PRECISION,
            first_price DOUBLE PRECISION,
            highest     DOUBLE PRECISION,
            lowest      DOUBLE PRECISION,
            vwap_value  DOUBLE PRECISION,
            vwap_volume NUMERIC,
            bid         DOUBLE PRECISION,
            ask         DOUBLE PRECISION,
            bid_size    INTEGER,
            ask_size    INTEGER,

            PRIMARY KEY (day, symbol)
        )
        """
    )
    op.execute(
        "CREATE INDEX idx_aggregated_days_symbol ON aggregated_days (symbol, day DESC)"
    )


def create_exact_days(view: str, aggregated: str) -> None:
    """Create a view of all days: aggregated, or from the rows while they are pending.

    24 hours, since a day would differ from them in a session's time zone. LATERAL, so
    that each pending day is a search of the index, and without one no row is read.
    """
    op.execute(
        f"""
        CREATE VIEW {view} AS
        SELECT {DAY_COLUMNS} FROM {aggregated} AS a
         WHERE NOT EXISTS (SELECT FROM pending_days AS p
                            WHERE p.symbol = a.symbol AND p.day = a.day)
        UNION ALL
        SELECT p.day, p.symbol, m.*
          FROM pending_days AS p,
               LATERAL (SELECT {DAY_VALUES}
                          FROM market_data AS m
                         WHERE m.symbol = p.symbol AND m.time >= p.day
                           AND m.time < p.day + INTERVAL '24 hours'
                        HAVING count(*) > 0) AS m
        """
    )


def drop_daily_bars() -> None:
    if edition() is Edition.COMMUNITY:
        op.execute("DROP VIEW daily_bars")
        op.execute("DROP MATERIALIZED VIEW market_data_daily")
    else:
        op.execute("DROP VIEW market_data_daily, daily_bars")
        op.execute("DROP TABLE aggregated_days")
    op.execute("DROP TABLE pending_days")


# --- Reference data -----------------------------------------------------------------


def upgrade_reference() -> None:
    op.execute(
        """
        CREATE TABLE strategies (
            strategy_id     TEXT PRIMARY KEY,
            name            TEXT NOT NULL,
            type            TEXT NOT NULL,
            status          TEXT NOT NULL DEFAULT 'stopped',
            parameters      JSONB NOT NULL DEFAULT '{}',
            risk_limits     JSONB NOT NULL DEFAULT '{}',
            symbols         TEXT[] NOT NULL DEFAULT '{}',
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            updated_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            created_by      TEXT NOT NULL
        )
        """
    )
    op.execute("CREATE INDEX idx_strategies_status ON strategies (status)")
    op.execute("CREATE INDEX idx_strategies_type ON strategies (type)")
    op.execute(
        """
        CREATE TABLE users (
            user_id         UUID PRIMARY KEY DEFAULT gen_random_uuid(),
            username        TEXT UNIQUE NOT NULL,
            email           TEXT UNIQUE NOT NULL,
            password_hash   TEXT NOT NULL,
            role            TEXT NOT NULL DEFAULT 'viewer',
            is_active       BOOLEAN NOT NULL DEFAULT true,
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            last_login      TIMESTAMPTZ
        )
        """
    )
    op.execute(
        """
        CREATE TABLE permissions (
            permission_id   SERIAL PRIMARY KEY,
            role            TEXT NOT NULL,
            resource        TEXT NOT NULL,
            action          TEXT NOT NULL,

            UNIQUE (role, resource, action)
        )
        """
    )
    op.execute(
        """
        INSERT INTO permissions (role, resource, action) VALUES
            ('admin', '*', '*'),
            ('trader', 'strategies', 'read'),
            ('trader', 'strategies', 'update'),
            ('trader', 'signals', 'read'),
            ('trader', 'orders', '*'),
            ('trader', 'portfolio', 'read'),
            ('viewer', 'strategies', 'read'),
            ('viewer', 'signals', 'read'),
            ('viewer', 'portfolio', 'read')
        """
    )
    op.execute(
        """
        CREATE TABLE configurations (
            key             TEXT PRIMARY KEY,
            value           JSONB NOT NULL,
            description     TEXT,
            updated_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            updated_by      TEXT
        )
        """
    )
    op.execute(
        """
        CREATE TABLE audit_logs (
            log_id          BIGSERIAL PRIMARY KEY,
            timestamp       TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            user_id         UUID REFERENCES users (user_id),
            action          TEXT NOT NULL,
            resource_type   TEXT NOT NULL,
            resource_id     TEXT,
            old_value       JSONB,
            new_value       JSONB,
            ip_address      INET,
            user_agent      TEXT
        )
        """
    )
    op.execute("CREATE INDEX idx_audit_timestamp ON audit_logs (timestamp DESC)")
    op.execute("CREATE INDEX idx_audit_user ON audit_logs (user_id, timestamp DESC)")
    op.execute(
        "CREATE INDEX idx_audit_resource ON audit_logs (resource_type, resource_id)"
    )
    op.execute(
        """
        CREATE TABLE api_keys (
            key_id          UUID PRIMARY KEY DEFAULT gen_random_uuid(),
            user_id         UUID NOT NULL REFERENCES users (user_id),
            name            TEXT NOT NULL,
            key_hash        BYTEA UNIQUE NOT NULL,
            role            TEXT NOT NULL,
            strategy_id     TEXT,
            created_at      TIMESTAMPTZ NOT NULL DEFAULT NOW(),
            expires_at      TIMESTAMPTZ,
            revoked_at      TIMESTAMPTZ,
            last_used_at    TIMESTAMPTZ
        )
        """
    )
    op.execute("CREATE INDEX idx_api_keys_user ON api_keys (user_id)")


def downgrade_reference() -> None:
    op.execute(
        "DROP TABLE api_keys, audit_logs, configurations, permissions, users,"
        " strategies"
    )
