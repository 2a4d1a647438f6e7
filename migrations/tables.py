"""The schema as it is after all migrations, for Alembic to compare with.

It has two parts, which may live in two databases: the time series, with all that
must commit together with them, and the reference data.
"""

from sqlalchemy import (
    ARRAY,
    TIMESTAMP,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import INET, JSONB, UUID

from quantplane_server.db import Edition

timeseries = MetaData()
reference = MetaData()
PARTS = {"timeseries": timeseries, "reference": reference}

TIME = TIMESTAMP(timezone=True)
NEW_ID = text("gen_random_uuid()")
NOW = text("now()")


def finite(column: str) -> str:
    return f"{column} < 'Infinity'"  # NaN is greater than Infinity


# --- Market data --------------------------------------------------------------------

Table(
    "market_data",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("open", Double),
    Column("high", Double),
    Column("low", Double),
    Column("close", Double, nullable=False),
    Column("volume", BigInteger),
    Column("vwap", Double),
    Column("bid", Double),
    Column("ask", Double),
    Column("bid_size", Integer),
    Column("ask_size", Integer),
    Index("idx_market_data_symbol", "symbol", text("time DESC")),
)

# Up to where each shard of the bus is recorded, written with the rows it covers.
Table(
    "bus_positions",
    timeseries,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
)

# The days of symbols whose rows have changed since they were last aggregated.
Table(
    "pending_days",
    timeseries,
    Column("symbol", Text, primary_key=True),
    Column("day", TIME, primary_key=True),
    Column("version", BigInteger, Identity(), nullable=False),
)

# The daily bars of all days but the pending ones, where the database has no continuous
# aggregate.
Table(
    "aggregated_days",
    timeseries,
    Column("day", TIME, primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("open", Double),
    Column("high", Double),
    Column("low", Double),
    Column("close", Double),
    Column("volume", Numeric),
    Column("avg_price", Double),
    Column("first_price", Double),
    Column("highest", Double),
    Column("lowest", Double),
    Column("vwap_value", Double),
    Column("vwap_volume", Numeric),
    Column("bid", Double),
    Column("ask", Double),
    Column("bid_size", Integer),
    Column("ask_size", Integer),
    Index("idx_aggregated_days_symbol", "symbol", text("day DESC")),
    info={"editions": {Edition.PLAIN, Edition.APACHE}},
)

# The chains that were published; options_chains has their contracts.
Table(
    "option_chain_times",
    timeseries,
    Column("underlying", Text, primary_key=True),
    Column("time", TIME, primary_key=True),
    Column("whole", Boolean, nullable=False),
)

Table(
    "options_chains",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("underlying", Text, primary_key=True),
    Column("expiration", Date, primary_key=True),
    Column("strike", Double, primary_key=True),
    Column("option_type", Text, primary_key=True),
    Column("bid", Double),
    Column("ask", Double),
    Column("last_price", Double),
    Column("volume", Integer),
    Column("open_interest", Integer),
    Column("implied_vol", Double),
    Column("delta", Double),
    Column("gamma", Double),
    Column("theta", Double),
    Column("vega", Double),
    Column("rho", Double),
    CheckConstraint("option_type IN ('call', 'put')", name="valid_option_type"),
    CheckConstraint(f"strike > 0 AND {finite('strike')}", name="valid_strike"),
    CheckConstraint(
        "expiration >= (time AT TIME ZONE 'UTC')::date", name="valid_expiration"
    ),
    Index("idx_options_underlying", "underlying", text("time DESC")),
    Index("idx_options_expiration", "expiration"),
)

# --- Model parameters ---------------------------------------------------------------

Table(
    "heston_parameters",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("kappa", Double, nullable=False),
    Column("theta", Double, nullable=False),
    Column("sigma", Double, nullable=False),
    Column("rho", Double, nullable=False),
    Column("v0", Double, nullable=False),
    Column("feller_satisfied", Boolean, nullable=False),
    Column("rmse", Double),
    Column("r_squared", Double),
    Column("n_options", Integer),
    Column("calibration_time_ms", Integer),
    CheckConstraint(f"kappa > 0 AND {finite('kappa')}", name="valid_heston_kappa"),
    CheckConstraint(f"theta > 0 AND {finite('theta')}", name="valid_heston_theta"),
    CheckConstraint(f"sigma > 0 AND {finite('sigma')}", name="valid_heston_sigma"),
    CheckConstraint("rho >= -1 AND rho <= 1", name="valid_heston_rho"),
    CheckConstraint(f"v0 > 0 AND {finite('v0')}", name="valid_heston_v0"),
    CheckConstraint(
        "feller_satisfied = (2 * kappa * theta > sigma * sigma)", name="valid_feller"
    ),
    Index("idx_heston_symbol", "symbol", text("time DESC")),
)

Table(
    "sabr_parameters",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("maturity", Double, primary_key=True),
    Column("alpha", Double, nullable=False),
    Column("beta", Double, nullable=False),
    Column("rho", Double, nullable=False),
    Column("nu", Double, nullable=False),
    Column("rmse", Double),
    Column("n_options", Integer),
    CheckConstraint(
        f"maturity > 0 AND {finite('maturity')}", name="valid_sabr_maturity"
    ),
    CheckConstraint(f"alpha > 0 AND {finite('alpha')}", name="valid_sabr_alpha"),
    CheckConstraint("beta >= 0 AND beta <= 1", name="valid_sabr_beta"),
    CheckConstraint("rho >= -1 AND rho <= 1", name="valid_sabr_rho"),
    CheckConstraint(f"nu >= 0 AND {finite('nu')}", name="valid_sabr_nu"),
    Index("idx_sabr_symbol", "symbol", text("time DESC")),
)

Table(
    "ou_parameters",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("pair_id", Text, primary_key=True),
    Column("asset1", Text, nullable=False),
    Column("asset2", Text, nullable=False),
    Column("hedge_ratio", Double, nullable=False),
    Column("theta", Double, nullable=False),
    Column("mu", Double, nullable=False),
    Column("sigma", Double, nullable=False),
    Column("half_life", Double, nullable=False),
    Column("adf_statistic", Double),
    Column("adf_pvalue", Double),
    Column("entry_lower", Double),
    Column("entry_upper", Double),
    Column("exit_target", Double),
    Column("stop_loss", Double),
    CheckConstraint(f"theta > 0 AND {finite('theta')}", name="valid_ou_theta"),
    CheckConstraint(f"sigma > 0 AND {finite('sigma')}", name="valid_ou_sigma"),
    CheckConstraint(
        "abs(half_life * theta / ln(2.0::float8) - 1) <= 1e-6", name="valid_half_life"
    ),
    Index("idx_ou_pair", "pair_id", text("time DESC")),
)

# --- Trading ------------------------------------------------------------------------

# A hypertable's primary key contains its time, so it can neither make an id unique nor
# be referenced. Identity lives in a plain table beside each: one row per id, kept by
# triggers.

Table(
    "signal_keys",
    timeseries,
    Column("signal_id", UUID, primary_key=True),
    Column("time", TIME, nullable=False),
    Column("request_hash", LargeBinary),
)

Table(
    "order_keys",
    timeseries,
    Column("order_id", UUID, primary_key=True),
    Column("created_at", TIME, nullable=False),
    Column("strategy_id", Text, nullable=False, server_default=""),
    Column("client_order_id", Text),
    Column("request_hash", LargeBinary),
    UniqueConstraint("strategy_id", "client_order_id"),
)

Table(
    "execution_keys",
    timeseries,
    Column("execution_id", UUID, primary_key=True),
    Column("time", TIME, nullable=False),
    Column("order_id", UUID, ForeignKey("order_keys.order_id")),
    Column("broker_exec_id", Text),
    UniqueConstraint("order_id", "broker_exec_id"),
)

Table(
    "signals",
    timeseries,
    Column("signal_id", UUID, primary_key=True, server_default=NEW_ID),
    Column("time", TIME, primary_key=True),
    Column("strategy_id", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("signal_type", Text, nullable=False),
    Column("strength", Double, nullable=False),
    Column("confidence", Double, nullable=False),
    Column("target_price", Double),
    Column("stop_loss", Double),
    Column("expiration", TIME),
    Column("metadata", JSONB),
    Column("status", Text, server_default="active"),
    Column("trace_id", Text),
    CheckConstraint("strength >= 0 AND strength <= 1", name="valid_strength"),
    CheckConstraint("confidence >= 0 AND confidence <= 1", name="valid_confidence"),
    CheckConstraint(
        "signal_type IN ('LONG', 'SHORT', 'EXIT_LONG', 'EXIT_SHORT')",
        name="valid_signal_type",
    ),
    CheckConstraint(
        "status IN ('active', 'executed', 'expired', 'cancelled')",
        name="valid_signal_status",
    ),
    Index("idx_signals_strategy", "strategy_id", text("time DESC")),
    Index("idx_signals_symbol", "symbol", text("time DESC")),
    Index(
        "idx_signals_active", "status", postgresql_where=text("status = 'active'::text")
    ),
)

Table(
    "orders",
    timeseries,
    Column("order_id", UUID, primary_key=True, server_default=NEW_ID),
    Column("created_at", TIME, primary_key=True, server_default=NOW),
    Column("updated_at", TIME, nullable=False, server_default=NOW),
    Column("strategy_id", Text),
    Column("signal_id", UUID, ForeignKey("signal_keys.signal_id")),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("order_type", Text, nullable=False),
    Column("quantity", Double, nullable=False),
    Column("price", Double),
    Column("stop_price", Double),
    Column("time_in_force", Text, nullable=False, server_default="day"),
    Column("status", Text, nullable=False, server_default="pending"),
    Column("filled_quantity", Double, server_default="0"),
    Column("avg_fill_price", Double),
    Column("broker_order_id", Text),
    Column("error_message", Text),
    Column("client_order_id", Text),
    Column("version", BigInteger, nullable=False, server_default="1"),
    Column("pending_request", Text),
    Column("outcome_unknown", Boolean, nullable=False, server_default=text("false")),
    Column("reject_code", Text),
    Column("overfill_quantity", Double, nullable=False, server_default="0"),
    Column("triggered_at", TIME),
    Column("trace_id", Text),
    Column("submitted_at", TIME),
    Column("pending_version", BigInteger),
    Column("pending_quantity", Double),
    Column("pending_price", Double),
    Column("pending_stop_price", Double),
    CheckConstraint("side IN ('buy', 'sell')", name="valid_order_side"),
    CheckConstraint(
        "order_type IN ('market', 'limit', 'stop', 'stop_limit')",
        name="valid_order_type",
    ),
    CheckConstraint(
        f"quantity > 0 AND {finite('quantity')}", name="valid_order_quantity"
    ),
    CheckConstraint(
        "time_in_force IN ('day', 'gtc', 'ioc', 'fok')", name="valid_time_in_force"
    ),
    CheckConstraint(
        "status IN ('pending', 'open', 'filled', 'cancelled', 'rejected', 'expired')",
        name="valid_order_status",
    ),
    CheckConstraint(
        "pending_request IN ('cancel', 'replace')", name="valid_pending_request"
    ),
    Index("idx_orders_strategy", "strategy_id", text("created_at DESC")),
    Index("idx_orders_symbol", "symbol", text("created_at DESC")),
    Index(
        "idx_orders_signal",
        "signal_id",
        postgresql_where=text("signal_id IS NOT NULL"),
    ),
    Index(
        "idx_orders_status",
        "status",
        postgresql_where=text("status = ANY (ARRAY['pending'::text, 'open'::text])"),
    ),
)

Table(
    "executions",
    timeseries,
    Column("execution_id", UUID, primary_key=True, server_default=NEW_ID),
    Column("time", TIME, primary_key=True),
    Column("order_id", UUID, ForeignKey("order_keys.order_id")),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("quantity", Double, nullable=False),
    Column("price", Double, nullable=False),
    Column("commission", Double, server_default="0"),
    Column("venue", Text),
    Column("broker_exec_id", Text),
    Column("strategy_id", Text),
    Column("ref_execution_id", UUID),
    Column("late", Boolean),
    Column("position_number", BigInteger),
    Column("position_quantity", Double),
    Column("realized_pnl", Double),
    CheckConstraint("side IN ('buy', 'sell')", name="valid_execution_side"),
    Index("idx_executions_order", "order_id"),
    Index("idx_executions_symbol", "symbol", text("time DESC")),
)

Table(
    "portfolio_snapshots",
    timeseries,
    Column("time", TIME, primary_key=True),
    Column("total_value", Double, nullable=False),
    Column("cash", Double, nullable=False),
    Column("positions_value", Double, nullable=False),
    Column("total_pnl", Double, nullable=False),
    Column("unrealized_pnl", Double, nullable=False),
    Column("realized_pnl", Double, nullable=False),
    Column("total_exposure", Double, nullable=False),
    Column("net_exposure", Double, nullable=False),
    Column("n_positions", Integer, nullable=False),
)

Table(
    "positions",
    timeseries,
    Column("symbol", Text, primary_key=True),
    Column("quantity", Double, nullable=False),
    Column("average_cost", Double, nullable=False),
    Column("realized_pnl", Double, server_default="0"),
    Column("strategy_id", Text),
    Column("opened_at", TIME, nullable=False),
    Column("updated_at", TIME, nullable=False, server_default=NOW),
    Column("n_executions", BigInteger, nullable=False, server_default="0"),
)

# The same of each strategy, whose sums make the account's cash; '' is no strategy.
Table(
    "strategy_positions",
    timeseries,
    Column("strategy_id", Text, primary_key=True),
    Column("symbol", Text, primary_key=True),
    Column("quantity", Double, nullable=False),
    Column("average_cost", Double, nullable=False),
    Column("realized_pnl", Double, nullable=False),
    Column("cash_flow", Double, nullable=False),
    Column("commission", Double, nullable=False),
    Column("opened_at", TIME, nullable=False),
    Column("updated_at", TIME, nullable=False),
)

# --- The event log ------------------------------------------------------------------

# What happened, by log, numbered without gaps in the order of commits.
Table(
    "event_log",
    timeseries,
    Column("log", Text, primary_key=True),
    Column("revision", BigInteger, primary_key=True),
    Column("time", TIME, nullable=False, server_default=NOW),
    Column("type", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("actor", Text),
    Column("trace_id", Text),
    Column("payload", LargeBinary, nullable=False),
)

Table(
    "log_head",
    timeseries,
    Column("log", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False, server_default="0"),
)

# --- The server's own ---------------------------------------------------------------

# Random keys that all servers of this installation share.
Table(
    "server_keys",
    timeseries,
    Column("purpose", Text, primary_key=True),
    Column("key", LargeBinary, nullable=False),
)

# How long rows are kept, where the database has no policies of its own.
Table(
    "retention_policies",
    timeseries,
    Column("table_name", Text, primary_key=True),
    Column("drop_after", Interval, nullable=False),
)

# The last run of each task of the server's maintenance.
Table(
    "maintenance_runs",
    timeseries,
    Column("task", Text, primary_key=True),
    Column("started_at", TIME, nullable=False),
    Column("duration", Interval, nullable=False),
    Column("succeeded", Boolean, nullable=False),
    Column("result", Text, nullable=False),
)

# --- Reference data -----------------------------------------------------------------

Table(
    "strategies",
    reference,
    Column("strategy_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="stopped"),
    Column("parameters", JSONB, nullable=False, server_default="{}"),
    Column("risk_limits", JSONB, nullable=False, server_default="{}"),
    Column("symbols", ARRAY(Text), nullable=False, server_default="{}"),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("updated_at", TIME, nullable=False, server_default=NOW),
    Column("created_by", Text, nullable=False),
    Index("idx_strategies_status", "status"),
    Index("idx_strategies_type", "type"),
)

Table(
    "users",
    reference,
    Column("user_id", UUID, primary_key=True, server_default=NEW_ID),
    Column("username", Text, nullable=False, unique=True),
    Column("email", Text, nullable=False, unique=True),
    Column("password_hash", Text, nullable=False),
    Column("role", Text, nullable=False, server_default="viewer"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("last_login", TIME),
)

Table(
    "permissions",
    reference,
    Column("permission_id", Integer, primary_key=True),
    Column("role", Text, nullable=False),
    Column("resource", Text, nullable=False),
    Column("action", Text, nullable=False),
    UniqueConstraint("role", "resource", "action"),
)

Table(
    "configurations",
    reference,
    Column("key", Text, primary_key=True),
    Column("value", JSONB, nullable=False),
    Column("description", Text),
    Column("updated_at", TIME, nullable=False, server_default=NOW),
    Column("updated_by", Text),
)

Table(
    "audit_logs",
    reference,
    Column("log_id", BigInteger, primary_key=True),
    Column("timestamp", TIME, nullable=False, server_default=NOW),
    Column("user_id", UUID, ForeignKey("users.user_id")),
    Column("action", Text, nullable=False),
    Column("resource_type", Text, nullable=False),
    Column("resource_id", Text),
    Column("old_value", JSONB),
    Column("new_value", JSONB),
    Column("ip_address", INET),
    Column("user_agent", Text),
    Column("trace_id", Text),
    Column("key_id", UUID),
    Index("idx_audit_timestamp", text("timestamp DESC")),
    Index("idx_audit_user", "user_id", text("timestamp DESC")),
    Index("idx_audit_resource", "resource_type", "resource_id"),
)

# How far the logs of signals and orders are entered in the audit log.
Table(
    "audit_positions",
    reference,
    Column("log", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("entry_check", LargeBinary, nullable=False),
)

# Keys of processes; only their hashes are kept.
Table(
    "api_keys",
    reference,
    Column("key_id", UUID, primary_key=True, server_default=NEW_ID),
    Column("user_id", UUID, ForeignKey("users.user_id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("key_hash", LargeBinary, nullable=False, unique=True),
    Column("role", Text, nullable=False),
    Column("strategy_id", Text),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("expires_at", TIME),
    Column("revoked_at", TIME),
    Column("last_used_at", TIME),
    Index("idx_api_keys_user", "user_id"),
)

# Logins that go on by refresh tokens, which hold the session's secret and a number.
Table(
    "sessions",
    reference,
    Column("session_id", UUID, primary_key=True),
    Column("user_id", UUID, ForeignKey("users.user_id"), nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("generation", BigInteger, nullable=False, server_default=text("1")),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("refreshed_at", TIME, nullable=False, server_default=NOW),
    Column("expires_at", TIME, nullable=False),
    Column("ended_at", TIME),
    Index("idx_sessions_user", "user_id", "created_at"),
)

# What access tokens are signed with.
Table(
    "signing_keys",
    reference,
    Column("key_id", Text, primary_key=True),
    Column("secret", LargeBinary, nullable=False),
    Column("created_at", TIME, nullable=False, server_default=NOW),
)

# When failed logins will be forgotten, which says how many they were.
Table(
    "login_failures",
    reference,
    Column("subject", Text, primary_key=True),
    Column("forgotten_at", TIME, nullable=False),
    Column("locked_until", TIME),
)

# Counts changes of what is permitted, so that servers notice them.
Table(
    "identity_version",
    reference,
    Column("single", Boolean, primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False),
)
