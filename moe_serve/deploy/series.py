"""What a metric of the table is called where Prometheus has scraped it, and how one asks for it."""

from __future__ import annotations

from moe_serve.base.metrics import Metric

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "summary": ("_sum", "_count"), "histogram": ("_bucket",)}


def series(metric: Metric) -> tuple[str, ...]:
    return tuple(metric.full_name + suffix for suffix in SUFFIXES[metric.kind])


def value(metric: Metric, selector: str) -> str:
    """Of a gauge or a counter."""
    return f"{series(metric)[0]}{selector}"


def rate(metric: Metric, selector: str, over: str) -> str:
    """Of a counter, for each second; of a summary, the seconds spent in each."""
    return f"rate({series(metric)[0]}{selector}[{over}])"


def mean(metric: Metric, selector: str, over: str, by: str) -> str:
    """Of a summary: its sum by its count."""
    total, count = series(metric)
    return f"sum by ({by}) (rate({total}{selector}[{over}])) / sum by ({by}) (rate({count}{selector}[{over}]))"


def quantile(metric: Metric, share: float, selector: str, over: str) -> str:
    """Of a histogram, over all its labels."""
    return f"histogram_quantile({share:g}, sum by (le) (rate({series(metric)[0]}{selector}[{over}])))"
