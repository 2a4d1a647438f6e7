"""What may be published, and how it is stored, on both editions."""

import asyncio
from collections.abc import AsyncIterator, Callable
from math import inf, log, nan, nextafter, sqrt
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.checks import COUNT, PRICE, SYMBOL, TIME
from quantplane_server.constraints import RULES, refusal
from quantplane_server.errors import InvalidRequest, Violation
from quantplane_server.models import checks, queries
from tests.conftest import both_editions
from tests.models import (
    HESTON,
    MODELS,
    Model,
    each_model,
    heston,
    ou,
    sabr,
    violations,
)

CHECKS = {
    pb.HestonParameters: checks.check_heston,
    pb.SabrParameters: checks.check_sabr,
    pb.OuParameters: checks.check_ou,
}
TABLES = {table.message: table for table in (queries.HESTON, queries.SABR, queries.OU)}
TINY = 5e-324  # the least number above 0


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


# --- Storing ------------------------------------------------------------------------


@both_editions
async def test_parameters_come_back_as_they_were(client: Client):
    for model in MODELS:
        rows = [model.row("A", 0), model.row("A", 1, **model.full)]
        await model.publish(client, rows)
        assert await model.listed(client) == rows


@both_editions
async def test_what_is_published_replaces_what_has_its_key(client: Client):
    for model in MODELS:
        first = model.row("A", 0, **model.full)
        others = [model.row("B", 0), model.row("A", 1)]
        await model.publish(client, [first, *others])
        second = model.row("A", 0, **{model.value: 0.7})
        await model.publish(client, [second])
        await model.publish(client, [second])
        assert await model.listed(client, "A") == [second, others[1]]
        assert await model.listed(client, "B") == others[:1]


async def test_one_bad_row_refuses_its_batch_and_stores_nothing(client: Client):
    for model in MODELS:
        bad = model.row("A", 1, **{model.value: -1.0})
        found = await violations(model.publish(client, [model.row("A", 0), bad]))
        assert [field for field, _ in found] == [f"parameters[1].{model.value}"]
        assert await model.listed(client) == []


async def test_what_the_database_refuses_is_told_as_the_checks_tell_it(
    client: Client, dsn: str
):
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "ALTER TABLE heston_parameters DROP CONSTRAINT valid_heston_v0,"
        " ADD CONSTRAINT valid_heston_v0 CHECK (v0 < 0.5)"
    )
    await connection.close()
    found = await violations(
        HESTON.publish(client, [heston(v0=0.1), heston("B", v0=1)])
    )
    assert found == [RULES["valid_heston_v0"]]
    assert await HESTON.listed(client) == []


@both_editions
async def test_two_who_store_the_same_rows_in_other_orders_both_succeed(dsn: str):
    async with asyncpg.create_pool(dsn, min_size=4) as pool:
        rows = [heston("A"), heston("B")]
        async with pool.acquire() as holder, pool.acquire() as watcher:
            await queries.store(holder, queries.HESTON, rows)
            pids: list[int] = []

            async def store(rows: list[Any]) -> None:
                async with pool.acquire() as conn:
                    pids.append(conn.get_server_pid())
                    await queries.store(conn, queries.HESTON, rows)

            async with holder.transaction():
                await queries.store(holder, queries.HESTON, rows[1:])
                tasks = []
                for order in (rows[::-1], rows):
                    tasks.append(asyncio.create_task(store(order)))
                    while len(pids) < len(tasks) or not await watcher.fetchval(
                        "SELECT cardinality(pg_blocking_pids($1)) > 0", pids[-1]
                    ):
                        await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)


# --- Rules --------------------------------------------------------------------------


def found(row: Any) -> list[Violation]:
    """Return the violations of a row, its fields without what precedes them."""
    try:
        CHECKS[type(row)]([row])
    except InvalidRequest as error:
        return [
            (field.removeprefix("parameters[0]."), rule)
            for field, rule in error.violations
        ]
    return []


def up(value: float) -> float:
    return nextafter(value, inf)


def down(value: float) -> float:
    return nextafter(value, -inf)


POSITIVE = ((TINY, 1.7e308), (0.0, -TINY, nan, inf, -inf))
NOT_NEGATIVE = ((0.0, -0.0, TINY, 1.7e308), (-TINY, nan, inf))
CORRELATION = ((-1.0, 0.0, 1.0), (down(-1), up(1), nan, inf))
FRACTION = ((0.0, -0.0, 1.0), (-TINY, up(1), nan))
FINITE = ((-1.7e308, 0.0, 1.7e308), (nan, inf, -inf))
COUNTS = ((0, 2**31 - 1), (-1,))
NAMES = (("a", "é" * 64, "BRK B"), ("", "a" * 65, " a", "a ", "a\n", "a\x7f"))
HALF = log(2) / 2  # what takes half of a deviation away at the speed 2

BOUNDS = [
    (heston, "symbol", NAMES, SYMBOL),
    (heston, "v0", POSITIVE, "valid_heston_v0"),
    (heston, "rho", CORRELATION, "valid_heston_rho"),
    (heston, "rmse", NOT_NEGATIVE, "must be finite and at least 0"),
    (heston, "r_squared", ((1.0, 0.0, -1.7e308), (up(1), nan, -inf)), checks.AT_MOST_1),
    (heston, "n_options", COUNTS, COUNT),
    (heston, "calibration_time_ms", COUNTS, COUNT),
    (sabr, "symbol", NAMES, SYMBOL),
    (sabr, "maturity", POSITIVE, "valid_sabr_maturity"),
    (sabr, "alpha", POSITIVE, "valid_sabr_alpha"),
    (sabr, "beta", FRACTION, "valid_sabr_beta"),
    (sabr, "rho", CORRELATION, "valid_sabr_rho"),
    (sabr, "nu", NOT_NEGATIVE, "valid_sabr_nu"),
    (sabr, "rmse", NOT_NEGATIVE, "must be finite and at least 0"),
    (sabr, "n_options", COUNTS, COUNT),
    (ou, "pair_id", NAMES, SYMBOL),
    (ou, "asset1", NAMES, SYMBOL),
    (ou, "asset2", NAMES, SYMBOL),
    (ou, "hedge_ratio", FINITE, PRICE),
    (ou, "mu", FINITE, PRICE),
    (ou, "sigma", POSITIVE, "valid_ou_sigma"),
    (ou, "half_life", ((HALF * (1 + 0.9999e-6), HALF * (1 - 0.9999e-6)),
                       (HALF * (1 + 1.0001e-6), HALF * (1 - 1.0001e-6), 0.0, -HALF,
                        nan, inf)), "valid_half_life"),
    (ou, "adf_statistic", FINITE, PRICE),
    (ou, "adf_pvalue", FRACTION, "must be 0 to 1"),
    (ou, "entry_lower", FINITE, PRICE),
    (ou, "entry_upper", FINITE, PRICE),
    (ou, "exit_target", FINITE, PRICE),
    (ou, "stop_loss", FINITE, PRICE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "field", "bounds", "rule"),
    BOUNDS,
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_field_is_taken_within_its_bounds_and_refused_outside(
    make: Callable[..., Any], field: str, bounds: Any, rule: str
):
    rule = RULES[rule][1] if rule in RULES else rule
    inside, outside = bounds
    for value in inside:
        assert found(make(**{field: value})) == [], value
    for value in outside:
        assert found(make(**{field: value})) == [(field, rule)], value


@pytest.mark.parametrize("field", ["kappa", "theta", "sigma"])
def test_hestons_speed_level_and_volatility_are_above_0_and_finite(field: str):
    rule = RULES[f"valid_heston_{field}"]
    for value in (0.0, -TINY, nan, inf, -inf):
        assert found(heston(**{field: value})) == [rule]


def test_the_speed_of_reversion_is_above_0_and_finite():
    assert found(ou(theta=1e-300, half_life=log(2) * 1e300)) == []
    for value in (0.0, -2.0, nan, inf):
        assert RULES["valid_ou_theta"] in found(ou(theta=value))


@pytest.mark.parametrize(
    ("sigma", "satisfied"), [(down(1), True), (1.0, False), (up(1), False)]
)
def test_fellers_condition_is_told_as_it_is(sigma: float, satisfied: bool):
    parameters = {"kappa": 0.5, "theta": 1.0, "sigma": sigma}
    assert found(heston(**parameters, feller_satisfied=satisfied)) == []
    refused = found(heston(**parameters, feller_satisfied=not satisfied))
    assert refused == [RULES["valid_feller"]]


@pytest.mark.parametrize("satisfied", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [
        {"kappa": 1e200, "theta": 1e200},
        {"kappa": 1e308, "theta": 1e-300},
        {"kappa": 1e-200, "theta": 1e-200},
        {"sigma": 1e200},
        {"sigma": 1e-200},
    ],
)
def test_what_no_double_can_hold_is_refused(
    parameters: dict[str, float], satisfied: bool
):
    refused = found(heston(**parameters, feller_satisfied=satisfied))
    assert refused == [("feller_satisfied", checks.COMPUTABLE)]


@each_model
def test_a_time_is_required_and_lies_between_1900_and_tomorrow(model: Model):
    row = model.row()
    row.ClearField("time")
    assert found(row) == [("time", TIME)]
    row.time.FromJsonString("1900-01-01T00:00:00Z")
    assert found(row) == []
    row.time.FromJsonString("1899-12-31T23:59:59.999Z")
    assert found(row) == [("time", TIME)]
    row.time.GetCurrentTime()
    row.time.seconds += 86_390
    assert found(row) == []
    row.time.seconds += 20
    assert found(row) == [("time", TIME)]


async def test_every_violation_of_a_request_is_told_at_once(client: Client):
    rows = [heston("", kappa=0.0, rho=2.0, n_options=-1), heston(), heston(v0=-1.0)]
    rows[2].time.seconds = 1 << 40
    assert await violations(HESTON.publish(client, rows)) == [
        ("parameters[0].symbol", SYMBOL),
        ("parameters[0].kappa", RULES["valid_heston_kappa"][1]),
        ("parameters[0].rho", RULES["valid_heston_rho"][1]),
        ("parameters[0].n_options", COUNT),
        ("parameters[2].time", TIME),
        ("parameters[2].v0", RULES["valid_heston_v0"][1]),
    ]


async def test_a_batch_has_1_to_2_000_rows(client: Client):
    for model in MODELS:
        rows = [model.row("A", hour) for hour in range(2_001)]
        expected = [("parameters", "must be 1 to 2,000 rows")]
        assert await violations(model.publish(client, [])) == expected
        assert await violations(model.publish(client, rows)) == expected
        await model.publish(client, rows[:2_000])
        assert await model.listed(client) == rows[:2_000]


async def test_each_key_is_given_once_in_a_batch(client: Client):
    for model in MODELS:
        rows = [
            model.row("A", 0),
            model.row("B", 0),
            model.row("A", 1),
            model.row("A", 0),
        ]
        rows[3].time.nanos += 999  # the database keeps microseconds
        expected = [("parameters[3]", "must be given once")]
        assert await violations(model.publish(client, rows)) == expected


async def test_maturities_of_one_time_are_keys_of_their_own(client: Client):
    rows = [sabr(maturity=0.25), sabr(maturity=up(0.25)), sabr(maturity=0.25)]
    request = pb.PublishSabrRequest(parameters=rows)
    expected = [("parameters[2]", "must be given once")]
    assert await violations(client.model.PublishSabr(request)) == expected
    del request.parameters[2]
    await client.model.PublishSabr(request)


# --- The constraints behind the rules -----------------------------------------------

# Rows that break one constraint each. Where the columns of one stand in another too,
# NaN does it: the database takes it to be greater than every number.
BROKEN = {
    "valid_heston_kappa": heston(kappa=nan),
    "valid_heston_theta": heston(theta=nan),
    "valid_heston_sigma": heston(sigma=-0.3),
    "valid_heston_rho": heston(rho=up(1)),
    "valid_heston_v0": heston(v0=0.0),
    "valid_feller": heston(feller_satisfied=False),
    "valid_sabr_maturity": sabr(maturity=0.0),
    "valid_sabr_alpha": sabr(alpha=inf),
    "valid_sabr_beta": sabr(beta=up(1)),
    "valid_sabr_rho": sabr(rho=down(-1)),
    "valid_sabr_nu": sabr(nu=-TINY),
    "valid_ou_theta": ou(theta=-2.0, half_life=-HALF),
    "valid_ou_sigma": ou(sigma=nan),
    "valid_half_life": ou(half_life=HALF * (1 + 1.0001e-6)),
}


async def stored(connection: asyncpg.Connection, row: Any) -> Exception | None:
    """Return what the database refuses a row with, if it does; keep nothing."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await queries.store(connection, TABLES[type(row)], [row])
    except (
        asyncpg.CheckViolationError,
        asyncpg.NumericValueOutOfRangeError,  # of what the constraint computes
    ) as error:
        return error
    finally:
        await transaction.rollback()
    return None


@both_editions
async def test_the_database_refuses_what_the_checks_refuse_in_the_same_words(
    connection: asyncpg.Connection,
):
    for name, row in BROKEN.items():
        error = await stored(connection, row)
        assert isinstance(error, asyncpg.CheckViolationError), name
        assert error.constraint_name == name
        translated = refusal(error)
        assert translated
        assert translated.violations == found(row) == [RULES[name]]


def test_each_constraint_of_the_models_is_tried():
    models = {name for name in RULES if name.split("_")[1] in ("heston", "sabr", "ou")}
    assert set(BROKEN) == models | {"valid_feller", "valid_half_life"}


likely = st.floats(1e-3, 10)
number = st.one_of(likely, st.floats(), st.sampled_from([TINY, 1e-160, 1e160, 1e308]))
correlation = st.one_of(st.floats(-1, 1), st.floats(-1.1, 1.1), st.floats())


@st.composite
def near_feller(draw: st.DrawFn) -> pb.HestonParameters:
    """Return parameters a few roundings away from where the condition turns."""
    kappa, theta = draw(likely), draw(likely)
    sigma = sqrt(2 * kappa * theta)
    step = draw(st.sampled_from([up, down]))
    for _ in range(draw(st.integers(0, 3))):
        sigma = step(sigma)
    satisfied = draw(st.booleans())
    return heston(kappa=kappa, theta=theta, sigma=sigma, feller_satisfied=satisfied)


@st.composite
def near_half_life(draw: st.DrawFn) -> pb.OuParameters:
    theta = draw(number)
    off = draw(st.one_of(st.just(0.0), st.sampled_from([1e-6, -1e-6]), st.floats()))
    half_life = log(2) / theta * (1 + off) if theta else draw(number)
    step = draw(st.sampled_from([up, down]))
    for _ in range(draw(st.integers(0, 3))):
        half_life = step(half_life)
    return ou(theta=theta, half_life=half_life, sigma=draw(likely))


rows = st.one_of(
    st.builds(
        heston, kappa=number, theta=number, sigma=number, rho=correlation, v0=number,
        feller_satisfied=st.booleans(),
    ),
    near_feller(),
    st.builds(
        sabr, maturity=number, alpha=number, beta=correlation, rho=correlation,
        nu=number,
    ),
    st.builds(ou, theta=number, sigma=number, half_life=number),
    near_half_life(),
)  # fmt: skip


@both_editions
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(row=rows)
async def test_the_checks_and_the_constraints_agree(
    connection: asyncpg.Connection, row: Any
):
    assert bool(found(row)) == bool(await stored(connection, row)), row
