"""A Grafana dashboard made of the table of metrics: a row for each kind of thing measured, a panel for each metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_serve.base import metrics as table
from moe_serve.base.metrics import Metric
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.scraping import RANK, WORLD
from moe_serve.deploy.series import mean, quantile, rate, value

SOURCE: Manifest = {"type": "prometheus", "uid": "${source}"}
SELECTOR = '{namespace=~"$namespace",world=~"$world"}'
OVER = "$__rate_interval"
PER_ROW, COLUMNS, HEIGHT = 3, 24, 8
SCHEMA_VERSION = 39
ROWS: tuple[tuple[str, Sequence[Metric]], ...] = (
    ("Balance of experts", table.BALANCE_METRICS),
    ("Ranks", table.ENGINE_METRICS),
    ("Requests", table.REQUEST_METRICS),
    ("HTTP servers", table.SERVER_METRICS),
)
RATIOS = {table.KV_CACHE_USAGE, table.EPLB_BALANCEDNESS, table.EPLB_MEAN_OF_RATIOS}
QUANTILES = (0.5, 0.9, 0.99)


def dashboard() -> Manifest:
    return {
        "uid": "moe-serve",
        "title": "moe-serve",
        "tags": ["moe-serve"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [{"id": number, **panel} for number, panel in enumerate(_panels(), start=1)],
    }


def _variables() -> list[Manifest]:
    source: Manifest = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    steps = value(table.STEPS, "")
    return [source, _variable("namespace", steps), _variable(WORLD, f'{steps}{{namespace=~"$namespace"}}')]


def _variable(label: str, found_in: str) -> Manifest:
    """A choice among the values of a label."""
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values({found_in}, {label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> Iterator[Manifest]:
    y = 0
    for title, metrics in ROWS:
        yield {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, COLUMNS, 1)}
        y += 1
        width = COLUMNS // PER_ROW
        for index, metric in enumerate(metrics):
            row, column = divmod(index, PER_ROW)
            yield _panel(metric, _place(column * width, y + row * HEIGHT, width, HEIGHT))
        y += -(-len(metrics) // PER_ROW) * HEIGHT


def _place(x: int, y: int, width: int, height: int) -> Manifest:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(metric: Metric, place: Manifest) -> Manifest:
    return {
        "type": "timeseries",
        "title": metric.name.replace("_", " "),
        "description": metric.help,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": _defaults(metric), "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for number, (expression, legend) in enumerate(queries(metric))
        ],
    }


def _defaults(metric: Metric) -> Manifest:
    limits = {"min": 0, "max": 1} if metric in RATIOS else {"min": 0}
    return {"unit": _unit(metric), **limits}


def _unit(metric: Metric) -> str:
    """As Grafana calls it."""
    if metric in RATIOS:
        return "percentunit"
    if metric.name.endswith("timestamp"):
        return "dateTimeFromNow"
    if "seconds" in metric.name:
        return "s"
    if "bytes" in metric.name:
        return "Bps"
    return "ops" if metric.kind == "counter" else "short"


def queries(metric: Metric) -> list[tuple[str, str]]:
    """PromQL and legend of each line: by rank where ranks differ, by the metric's own labels too."""
    if metric in table.BALANCE_METRICS:
        return [_of_the_world(metric)]
    if metric.kind == "histogram":
        return [(quantile(metric, share, SELECTOR, OVER), f"p{share * 100:g}") for share in QUANTILES]
    labels = [WORLD, RANK, *metric.labels]
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    by = ", ".join(labels)
    if metric.kind == "summary":
        return [(mean(metric, SELECTOR, OVER, by), legend)]
    amount = rate(metric, SELECTOR, OVER) if metric.kind == "counter" else value(metric, SELECTOR)
    return [(f"sum by ({by}) ({amount})", legend)]


def _of_the_world(metric: Metric) -> tuple[str, str]:
    """Every rank tells the same."""
    labels = [WORLD, *metric.labels]
    by, legend = ", ".join(labels), " ".join(f"{{{{{label}}}}}" for label in labels)
    if metric.kind == "summary":
        return mean(metric, SELECTOR, OVER, by), legend
    amount = rate(metric, SELECTOR, OVER) if metric.kind == "counter" else value(metric, SELECTOR)
    scaled = f"1000 * {amount}" if metric is table.EPLB_LAST_SUCCESS else amount  # Grafana counts in milliseconds
    return f"max by ({by}) ({scaled})", legend
