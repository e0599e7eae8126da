"""Alerts and panels ask for series that a server exposes, in words that Prometheus understands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from moe_serve.api.balance_metrics import render_balance
from moe_serve.api.metrics import Metrics
from moe_serve.base import metrics as table
from moe_serve.base.engine_messages import LoadReport
from moe_serve.deploy.dashboard import ROWS, dashboard, queries
from moe_serve.deploy.series import series
from tests.support.manifests import objects_of

SERIES = re.compile(r"\bmoe_serve:\w+")
GRAFANA = {"$__rate_interval": "5m", "$namespace": ".*", "$world": ".*"}
FIGURES = {
    "balancedness": {"ratio_of_sums": 1.0, "mean_of_ratios": 1.0, "mean_excess": 0.0, "peak_to_average_p95": 1.0},
    "last_success": 0.0,
    "rebalances": 0,
    "moved_experts": 0,
    "moved_bytes": 0,
    "skipped": {"no_load": 1},
    "stage_seconds": (0, 0.0),
    "commit_seconds": (0, 0.0),
}


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    """Names of series that a server with a balancer has."""
    metrics = Metrics("m", range(1), lambda: {0: LoadReport(load_seconds={"weights": 1.0})})
    texts = metrics.render().decode() + render_balance(FIGURES, "m").decode()
    return {match[0] for line in texts.splitlines() if (match := SERIES.match(line))}


def rules(command: str) -> dict[str, Any]:
    (group,) = objects_of(command).one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def panels() -> Iterator[dict[str, Any]]:
    for panel in dashboard()["panels"]:  # type: ignore[attr-defined]
        if panel["type"] != "row":
            yield panel


def test_every_metric_of_the_table_is_exposed_under_the_names_that_are_asked_for(exposed: set[str]) -> None:
    for _, metrics in ROWS:
        for metric in metrics:
            assert set(series(metric)) <= exposed, metric.name


def test_alerts_ask_for_series_that_exist_and_can_be_parsed(exposed: set[str]) -> None:
    for rule in rules("--name w --image i -dp 2 -ep --enable-eplb --namespace ns").values():
        promql_parser.parse(rule["expr"])
        assert set(SERIES.findall(rule["expr"])) <= exposed
        assert rule["expr"].count('{world="w",namespace="ns"') >= 1


def test_alerts_are_those_that_the_options_make_possible() -> None:
    every = {"MoEServeRanksMissing", "MoEServeOverloaded"}
    several = {"MoEServeRankSkew", "MoEServeLoadSkew"}
    balanced = {"MoEServeExpertsUnbalanced", "MoEServeRebalanceStuck"}
    assert set(rules("--name w --image i")) == every
    assert set(rules("--name w --image i -dp 2")) == every | several
    assert set(rules("--name w --image i -dp 2 -ep --enable-eplb")) == every | several | balanced


@pytest.mark.parametrize(("alert", "least"), [("MoEServeRankSkew", "min"), ("MoEServeLoadSkew", "avg")])
def test_ranks_are_compared_by_what_each_says_of_itself(alert: str, least: str) -> None:
    """One figure for each rank, however many servers tell it."""
    expression = rules("--name w --image i -dp 2")[alert]["expr"]
    assert f"{least} by (namespace) (sum by (namespace, rank) (" in expression
    for comparing in ("max", "min", "avg"):
        assert not re.search(rf"\b{comparing} by \(namespace\) \((?!sum by)", expression)


def test_a_rearrangement_is_stuck_after_two_of_the_operators_own_intervals() -> None:
    command = "--name w --image i -dp 2 -ep --enable-eplb --eplb-config.step-interval 700"
    assert rules(command)["MoEServeRebalanceStuck"]["expr"].endswith("> 1400")


def test_ranks_that_are_missing_are_counted_against_all_of_them() -> None:
    assert "< 12 " in rules("--name w --image i -dp 12")["MoEServeRanksMissing"]["expr"]


def test_no_monitoring_writes_none() -> None:
    objects = objects_of("--name w --image i -dp 2 --no-monitoring")
    assert not objects.has("PodMonitor")
    assert not objects.has("PrometheusRule")


def test_the_dashboard_has_a_panel_for_each_metric_of_the_table() -> None:
    described = sorted(panel["description"] for panel in panels())
    metrics = [value for value in vars(table).values() if isinstance(value, table.Metric)]
    assert described == sorted(metric.help for metric in metrics)


def test_panels_ask_for_series_that_exist_and_can_be_parsed(exposed: set[str]) -> None:
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            promql_parser.parse(expression)
            assert SERIES.findall(expression)
            assert set(SERIES.findall(expression)) <= exposed


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:  # type: ignore[attr-defined]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_labels_of_a_metric_are_lines_of_their_own() -> None:
    ((expression, legend),) = queries(table.REQUESTS_REFUSED)
    assert "by (world, rank, reason)" in expression
    assert "{{reason}}" in legend


def test_the_kept_dashboard_is_json_that_grafana_would_import() -> None:
    kept = json.loads((Path(__file__).parents[2] / "docs" / "kubernetes" / "dashboard.json").read_text())
    assert kept == json.loads(json.dumps(dashboard()))
    assert kept["uid"]
    assert len({panel["id"] for panel in kept["panels"]}) == len(kept["panels"])
