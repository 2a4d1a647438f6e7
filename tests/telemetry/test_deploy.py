"""Alerts, dashboard and documents speak of metrics that there are."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import yaml

from quantplane import Client
from quantplane import v1 as pb
from quantplane_server.config import Settings
from quantplane_server.db import Database
from quantplane_server.main import recording
from quantplane_server.telemetry import endpoint
from quantplane_server.telemetry.metrics import Histogram, Instrument
from tests.market_data import until
from tests.orders import UNKNOWN_ID, fill, new_order, open_order, submit
from tests.telemetry.scraping import (
    Measured,
    accepted,
    feed,
    fill_up,
    measured,
    reader,
)

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
ALERTS = [
    alert
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for alert in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/quantplane.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())

OF_PROMETHEUS = {"up"}  # which it makes itself
BY_PROMETHEUS = {"instance", "job"}  # labels that it adds
WORDS = {"by", "or", "and", "unless", "on", "without", "ignoring", "group_left", "bool"}
Labels = dict[str, set[str]]


def named(expression: str) -> Labels:
    """Return the metrics of an expression, each with the labels it is expected to have.

    The labels of `by (…)` are expected of all of them.
    """
    expression = re.sub(r'"[^"]*"|\[[^]]*]', "", expression)
    grouped = {
        label.strip()
        for labels in re.findall(r"\bby\s*\(([^)]*)\)", expression)
        for label in labels.split(",")
    }
    rest = re.sub(r"\bby\s*\([^)]*\)", "", expression)
    found: Labels = {}
    for name, selector in re.findall(r"\b([a-z_:][\w:]*)\b(?!\s*\()({[^}]*})?", rest):
        if name not in WORDS and f"{{{name}" not in rest and not _in_braces(rest, name):
            labels = set(re.findall(r"(\w+)\s*[=!]", selector)) | grouped
            found.setdefault(name, set()).update(labels - BY_PROMETHEUS)
    return found


def _in_braces(expression: str, name: str) -> bool:
    outside = re.sub(r"{[^}]*}", "{}", expression)
    return re.search(rf"\b{name}\b", outside) is None


def expressions() -> Iterator[tuple[str, str]]:
    """Yield who says an expression, and what it says."""
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    (instance,) = DASHBOARD["templating"]["list"]
    yield "$instance", instance["query"]["query"].split("(")[1].split(",")[0]


# --- The live endpoint --------------------------------------------------------------


@pytest.fixture
async def live(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Labels]:
    """What the endpoints show once of everything some has happened."""
    monkeypatch.setattr(endpoint, "LOOK_S", 0.05)
    settings = settings.model_copy(update={"cap_mb": 1})
    async with measured(settings, recorder=False) as desk:
        await be_held_back(desk)
        await look_away(desk.client)
        await trade(desk.client)
        await be_refused(desk)
        await err(desk)
        calm = await settled(desk, 0)
        async with recording(desk.settings.process(1)):
            calm |= await settled(desk, 1)
        yield calm


async def be_held_back(desk: Measured) -> None:
    await reader(desk.client, min_interval={"nanos": 1_000_000})
    sender = await feed(desk.client)
    publishing = asyncio.create_task(fill_up(sender, 20))
    await desk.until(lambda page: page["quantplane_feeds_held"])
    async with recording(desk.settings.process(1)):
        await accepted(sender, 20)
        await publishing


async def look_away(client: Client) -> None:
    call = client.order.WatchOrders(pb.WatchOrdersRequest())
    await until(aiter(call), "snapshot_complete")
    call.cancel()


async def trade(client: Client) -> None:
    watching = client.order.WatchOrders(pb.WatchOrdersRequest())
    await until(aiter(watching), "snapshot_complete")
    await fill(client, await open_order(client), 4)
    with pytest.raises(grpc.aio.AioRpcError):
        await submit(client, new_order(signal_id=UNKNOWN_ID))


async def be_refused(desk: Measured) -> None:
    async with Client(desk.target, token="qp_" + 43 * "x") as stranger:
        with pytest.raises(grpc.aio.AioRpcError):
            await stranger.market_data.ListSymbols(pb.ListSymbolsRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await stranger.login("nobody", "not the password")


async def err(desk: Measured) -> None:
    assert desk.settings.postgres_dsn
    db = await Database.open(desk.settings.postgres_dsn)
    try:
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with db.connection() as conn:
                await conn.execute("SELECT 1 / 0")
    finally:
        await db.close()


async def settled(desk: Measured, number: int) -> Labels:
    """Return what a process shows, once its gauges have been looked at."""
    last = ("quantplane_log_tail_behind", "quantplane_audit_behind")[number]
    return (await desk.until(lambda page: last in page.labels(), number)).labels()


async def test_what_alerts_and_dashboard_ask_for_is_there(live: Labels):
    for who, expression in expressions():
        asked = named(expression)
        assert asked, who
        for name, labels in asked.items():
            if name not in OF_PROMETHEUS:
                assert name in live, (who, name)
                assert labels <= live[name], (who, name)


async def test_the_table_of_metrics_is_what_there_is(live: Labels):
    table = OPERATIONS.split("\n## Metrics\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", table, re.MULTILINE))
    shown = {}
    for name, labels in live.items():
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        is_histogram = f"{family}_bucket" in live
        if not name.startswith(("process_", "target_info")):
            shown[family if is_histogram else name] = labels - {"le"}
    assert documented.keys() == shown.keys()
    for name, labels in shown.items():
        assert set(re.findall(r"`(\w+)`", documented[name])) == labels, name


def test_the_table_says_what_the_endpoint_says():
    for instrument in Instrument.all:
        help = instrument.help.rstrip(".")
        assert f"| {help} |" in OPERATIONS, instrument.name


# --- Alerts -------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_has_its_cause_and_its_cure(alert: dict[str, Any]):
    name = alert["alert"]
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    section = OPERATIONS.split(f"\n### {name}\n")[1].split("\n#")[0]
    assert "**Cause**" in section and "**Do**" in section


def test_no_section_is_of_an_alert_that_is_gone():
    alerts = OPERATIONS.split("\n## Alerts\n")[1].split("\n## ")[0]
    headings = re.findall(r"^### (\w+)$", alerts, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]


def test_links_within_the_document_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", OPERATIONS)) <= anchors


# --- Dashboard and compose ----------------------------------------------------------


def test_panels_have_a_unit_and_a_place_of_their_own():
    places = set()
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        place = panel["gridPos"]
        places.add((place["x"], place["y"]))
        assert place["x"] + place["w"] <= 24
    assert len(places) == len(PANELS)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_the_dashboard_asks_sources_that_are_provisioned():
    folder = DEPLOY / "grafana/provisioning/datasources"
    known = yaml.safe_load((folder / "datasources.yml").read_text())["datasources"]
    asked = {panel["datasource"]["uid"] for panel in PANELS}
    assert asked <= {source["uid"] for source in known}
    for source in known:
        host = re.fullmatch(r"http://(\w+):\d+", source["url"])
        assert host and host[1] in COMPOSE["services"]


def test_compose_mounts_files_that_there_are():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]


def test_prometheus_reads_where_the_server_and_the_recorder_listen():
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    environment = COMPOSE["services"]["server"]["environment"]
    settings = Settings(
        metrics_listen=environment["QUANTPLANE_METRICS_LISTEN"],
        insecure="--insecure" in COMPOSE["services"]["server"]["command"],
    )
    wanted = []
    for number in (0, 1):
        address = settings.process(number).metrics_address()
        assert address
        wanted.append(f"server:{address[1]}")
    assert job["static_configs"] == [{"targets": wanted}]
    assert job["job_name"] == "quantplane"  # which alerts and the dashboard name
    assert all((DEPLOY / file).exists() for file in config["rule_files"])


def test_histograms_have_buckets_in_order():
    for instrument in Instrument.all:
        if isinstance(instrument, Histogram):
            assert list(instrument.buckets) == sorted(set(instrument.buckets))
