"""The database's constraints, in the words of the checks that stand before them.

A slice's checks refuse a bad value before it reaches the database; the constraint
is the backstop. Both take the rule from here, so a caller reads the same either way.
"""

import asyncpg

from quantplane_server.errors import InvalidRequest, Violation

POSITIVE = "must be finite and above 0"
NOT_NEGATIVE = "must be finite and at least 0"
CORRELATION = "must be -1 to 1"
FRACTION = "must be 0 to 1"
ONCE = "must be given once"

# Constraint -> the field it is about, and its rule.
RULES: dict[str, Violation] = {
    "valid_option_type": ("option_type", "must be CALL or PUT"),
    "valid_strike": ("strike", POSITIVE),
    "valid_expiration": (
        "expiration",
        "must be a date, not before the date (UTC) of its chain",
    ),
    "valid_heston_kappa": ("kappa", POSITIVE),
    "valid_heston_theta": ("theta", POSITIVE),
    "valid_heston_sigma": ("sigma", POSITIVE),
    "valid_heston_rho": ("rho", CORRELATION),
    "valid_heston_v0": ("v0", POSITIVE),
    "valid_feller": (
        "feller_satisfied",
        "must be true exactly where 2 kappa theta > sigma^2",
    ),
    "valid_sabr_maturity": ("maturity", POSITIVE),
    "valid_sabr_alpha": ("alpha", POSITIVE),
    "valid_sabr_beta": ("beta", FRACTION),
    "valid_sabr_rho": ("rho", CORRELATION),
    "valid_sabr_nu": ("nu", NOT_NEGATIVE),
    "valid_ou_theta": ("theta", POSITIVE),
    "valid_ou_sigma": ("sigma", POSITIVE),
    "valid_half_life": ("half_life", "must be ln 2 / theta, within 1e-6 of it"),
    "valid_strength": ("strength", FRACTION),
    "valid_confidence": ("confidence", FRACTION),
    "valid_signal_type": (
        "signal_type",
        "must be LONG, SHORT, EXIT_LONG or EXIT_SHORT",
    ),
    "valid_signal_status": (
        "status",
        "must be ACTIVE, EXECUTED, EXPIRED or CANCELLED",
    ),
    "valid_order_side": ("side", "must be BUY or SELL"),
    "valid_order_type": ("order_type", "must be MARKET, LIMIT, STOP or STOP_LIMIT"),
    "valid_order_quantity": ("quantity", POSITIVE),
    "valid_time_in_force": ("time_in_force", "must be DAY, GTC, IOC or FOK"),
    "valid_order_status": (
        "status",
        "must be PENDING, OPEN, FILLED, CANCELLED, REJECTED or EXPIRED",
    ),
    "valid_pending_request": ("pending_request", "must be CANCEL or REPLACE"),
    "valid_execution_side": ("side", "must be BUY or SELL"),
    # Identity
    "signal_keys_pkey": ("signal_id", ONCE),
    "order_keys_pkey": ("order_id", ONCE),
    "order_keys_strategy_id_client_order_id_key": ("client_order_id", ONCE),
    "execution_keys_pkey": ("execution_id", ONCE),
    "execution_keys_order_id_broker_exec_id_key": ("broker_exec_id", ONCE),
}


def refusal(error: Exception) -> InvalidRequest | None:
    """Return the error for the caller whose values a constraint has refused."""
    if not isinstance(error, asyncpg.IntegrityConstraintViolationError):
        return None
    rule = RULES.get(error.constraint_name or "")
    return InvalidRequest([rule]) if rule else None
