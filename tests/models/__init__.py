"""Short ways to say what calibrations publish, and how the models' calls are named."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from math import log
from typing import Any, NamedTuple

import grpc
import pytest

from quantplane import Client, reason_of, violations_of
from quantplane import v1 as pb

START = datetime(2024, 1, 1, tzinfo=UTC)


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def heston(symbol: str = "A", hour: float = 0, **fields: Any) -> pb.HestonParameters:
    fields = {
        "kappa": 1.5, "theta": 0.04, "sigma": 0.3, "rho": -0.7, "v0": 0.05,
        "feller_satisfied": True,
    } | fields  # fmt: skip
    return timed(pb.HestonParameters(symbol=symbol, **fields), hour)


def sabr(
    symbol: str = "A", hour: float = 0, maturity: float = 0.5, **fields: Any
) -> pb.SabrParameters:
    fields = {"alpha": 0.2, "beta": 0.5, "rho": -0.3, "nu": 0.4} | fields
    return timed(pb.SabrParameters(symbol=symbol, maturity=maturity, **fields), hour)


def ou(pair_id: str = "A", hour: float = 0, **fields: Any) -> pb.OuParameters:
    fields = {
        "asset1": "X", "asset2": "Y", "hedge_ratio": 1.1, "theta": 2.0, "mu": -0.5,
        "sigma": 0.3, "half_life": log(2) / 2,
    } | fields  # fmt: skip
    return timed(pb.OuParameters(pair_id=pair_id, **fields), hour)


def timed(row: Any, hour: float) -> Any:
    row.time.FromDatetime(at(hour))
    return row


class Model(NamedTuple):
    """What differs between the models, to those who call them."""

    name: str  # in the names of its calls
    row: Callable[..., Any]
    key: str  # the field that says what a row is about
    value: str  # a field that can have any value above 0
    full: dict[str, Any]  # the fields that may be omitted

    async def publish(self, client: Client, rows: Iterable[Any]) -> None:
        request = getattr(pb, f"Publish{self.name}Request")(parameters=rows)
        await getattr(client.model, f"Publish{self.name}")(request)

    async def latest(self, client: Client, *names: str, **fields: Any) -> Any:
        kind = getattr(pb, f"GetLatest{self.name}Request")
        request = kind(**{f"{self.key}s": names}, **fields)
        return await getattr(client.model, f"GetLatest{self.name}")(request)

    async def page(self, client: Client, name: str = "A", **fields: Any) -> Any:
        request = getattr(pb, f"List{self.name}Request")(**{self.key: name}, **fields)
        return await getattr(client.model, f"List{self.name}")(request)

    async def listed(self, client: Client, name: str = "A", **fields: Any) -> list[Any]:
        """Return the rows of all pages."""
        page = await self.page(client, name, **fields)
        rows = list(page.parameters)
        while page.next_page_token:
            page = await self.page(
                client, name, page_token=page.next_page_token, **fields
            )
            assert page.parameters
            rows += page.parameters
        return rows

    def unknown(self, response: Any) -> list[str]:
        """Return the names that a response says are unknown."""
        return list(getattr(response, f"unknown_{self.key}s"))


HESTON = Model(
    "Heston", heston, "symbol", "v0",
    {"rmse": 0.01, "r_squared": -0.5, "n_options": 0, "calibration_time_ms": 7},
)  # fmt: skip
SABR = Model("Sabr", sabr, "symbol", "alpha", {"rmse": 0.0, "n_options": 12})
OU = Model(
    "Ou", ou, "pair_id", "sigma",
    {
        "adf_statistic": -3.5, "adf_pvalue": 0.0, "entry_lower": -1.0,
        "entry_upper": 1.0, "exit_target": 0.0, "stop_loss": 2.5,
    },
)  # fmt: skip

MODELS = (HESTON, SABR, OU)
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), reason_of(raised.value)


async def violations(call: Any) -> list[tuple[str, str]]:
    """Return what a call is refused for: fields, and the rules that they break."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return violations_of(raised.value)
