"""The coordinator's figures about load balancing as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from moe_serve.base import metrics as table

Family = CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily
_GAUGES = {
    table.EPLB_BALANCEDNESS: "ratio_of_sums",
    table.EPLB_MEAN_OF_RATIOS: "mean_of_ratios",
    table.EPLB_MEAN_EXCESS: "mean_excess",
    table.EPLB_PEAK_TO_AVERAGE: "peak_to_average_p95",
}
_COUNTERS = {
    table.EPLB_REBALANCES: "rebalances",
    table.EPLB_MOVED_EXPERTS: "moved_experts",
    table.EPLB_MOVED_BYTES: "moved_bytes",
}
_SUMMARIES = {table.EPLB_STAGE_SECONDS: "stage_seconds", table.EPLB_COMMIT_SECONDS: "commit_seconds"}


def render_balance(figures: Mapping[str, Any], model_name: str) -> bytes:
    """`figures` is what eplb/surface.py answers to "metrics"."""
    registry = CollectorRegistry()
    registry.register(_Figures(figures, model_name))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, figures: Mapping[str, Any], model_name: str) -> None:
        self._figures = figures
        self._labels = [model_name]

    def collect(self) -> Iterator[Family]:
        figures = self._figures
        for metric, name in _GAUGES.items():
            yield self._gauge(metric, figures["balancedness"][name])
        yield self._gauge(table.EPLB_LAST_SUCCESS, figures["last_success"])
        for metric, name in _COUNTERS.items():
            counter = CounterMetricFamily(metric.full_name, metric.help, labels=["model_name"])
            counter.add_metric(self._labels, figures[name])
            yield counter
        skipped = CounterMetricFamily(
            table.EPLB_SKIPPED.full_name, table.EPLB_SKIPPED.help, labels=["model_name", *table.EPLB_SKIPPED.labels]
        )
        for reason, count in sorted(figures["skipped"].items()):
            skipped.add_metric([*self._labels, reason], count)
        yield skipped
        for metric, name in _SUMMARIES.items():
            count, total = figures[name]
            summary = SummaryMetricFamily(metric.full_name, metric.help, labels=["model_name"])
            summary.add_metric(self._labels, count_value=count, sum_value=total)
            yield summary

    def _gauge(self, metric: table.Metric, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(metric.full_name, metric.help, labels=["model_name"])
        gauge.add_metric(self._labels, value)
        return gauge
