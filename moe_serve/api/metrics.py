"""Prometheus objects made from the table in base/metrics.py, in a registry of their own.

The API servers of one launcher count into files of one folder (prometheus_client's multiprocess mode), and whoever is
scraped shows the sums over all of them: also over one that is slow, stopped or gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from moe_serve.base import metrics as table
from moe_serve.base.engine_messages import FinishReason, LoadReport
from moe_serve.base.errors import RefusalReason
from moe_serve.base.metrics import COMMON_LABELS, Metric

Family = CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily
UNKNOWN_RANK = "unknown"


class Metrics:
    """Request metrics are observed here; engine metrics are read from `reports()` when somebody scrapes.

    `engines` are the DP ranks that this server serves: of others it knows nothing, and says so by silence. `folder`
    of the counts, where it is not the only API server.
    """

    def __init__(
        self,
        model_name: str,
        engines: Collection[int],
        reports: Callable[[], Mapping[int, LoadReport]],
        *,
        folder: str | None = None,
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._shown = self._registry if folder is None else CollectorRegistry(auto_describe=False)
        self._shown.register(EngineCollector(model_name, engines, reports))
        if folder is not None:
            MultiProcessCollector(self._shown, folder)  # type: ignore[no-untyped-call]
        self._folder = folder
        self._model_name = model_name
        self._counters = {m: self._counter(m) for m in table.REQUEST_METRICS if m.kind == "counter"}
        self._histograms = {m: self._histogram(m) for m in table.REQUEST_METRICS if m.kind == "histogram"}
        self._refused = Counter(
            table.REQUESTS_REFUSED.full_name,
            table.REQUESTS_REFUSED.help,
            ("model_name", *table.REQUESTS_REFUSED.labels),
            registry=self._registry,
        )
        self._connections = Gauge(
            table.NUM_CONNECTIONS.full_name,
            table.NUM_CONNECTIONS.help,
            ("model_name",),
            registry=self._registry,
            multiprocess_mode="livesum",
        ).labels(model_name)
        for reason in get_args(RefusalReason):
            self._refused.labels(model_name, reason)
        for rank in engines:
            self._show_zeros(rank)

    def render(self) -> bytes:
        """The text a scraper gets."""
        return generate_latest(self._shown)

    def total(self, metric: Metric) -> float:
        """Of a counter, over all labels."""
        families = (family for family in self._shown.collect() if family.name == metric.full_name)
        return sum(each.value for family in families for each in family.samples if each.name.endswith("_total"))

    def close(self) -> None:
        """This API server has no connections any more; what it counted stays."""
        if self._folder is not None:
            mark_process_dead(os.getpid(), self._folder)  # type: ignore[no-untyped-call]

    def add(self, metric: Metric, amount: float, rank: int | None, *labels: str) -> None:
        self._counters[metric].labels(self._model_name, _engine(rank), *labels).inc(amount)

    def refused(self, reason: RefusalReason) -> None:
        """An HTTP request was not served."""
        self._refused.labels(self._model_name, reason).inc()

    def connections(self, count: int) -> None:
        """So many HTTP connections are open now."""
        self._connections.set(count)

    def observe(self, metric: Metric, value: float, rank: int | None) -> None:
        self._histograms[metric].labels(self._model_name, _engine(rank)).observe(value)

    def _show_zeros(self, rank: int) -> None:
        """A rate needs the zero before the first count."""
        for metric, counter in self._counters.items():
            for labels in [(reason,) for reason in get_args(FinishReason)] if metric.labels else [()]:
                counter.labels(self._model_name, str(rank), *labels)
        for histogram in self._histograms.values():
            histogram.labels(self._model_name, str(rank))

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.full_name, metric.help, (*COMMON_LABELS, *metric.labels), registry=self._registry)

    def _histogram(self, metric: Metric) -> Histogram:
        labels = (*COMMON_LABELS, *metric.labels)
        return Histogram(metric.full_name, metric.help, labels, registry=self._registry, buckets=metric.buckets)


class RequestClock:
    """One sequence's times and counts on their way into the metrics."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, arrival: float) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._arrival = arrival
        self._last: float | None = None
        self._rank: int | None = None
        self._ended = False

    def tokens(self, count: int, rank: int | None) -> None:
        """Some tokens came from DP rank `rank`."""
        if not count:
            return
        now = time.monotonic()
        self._rank = rank
        if self._last is None:
            self._metrics.add(table.PROMPT_TOKENS, self._num_prompt_tokens, rank)
            self._metrics.observe(table.TIME_TO_FIRST_TOKEN, now - self._arrival, rank)
        else:
            self._metrics.observe(table.INTER_TOKEN_LATENCY, (now - self._last) / count, rank)
        self._metrics.add(table.GENERATION_TOKENS, count, rank)
        self._last = now

    def end(self, reason: str) -> None:
        """The sequence ended; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.add(table.REQUEST_SUCCESS, 1, self._rank, reason)
        if reason in ("stop", "length"):
            self._metrics.observe(table.E2E_REQUEST_LATENCY, time.monotonic() - self._arrival, self._rank)


class EngineCollector(Collector):
    """The engines' latest reports as metrics; an engine that has not reported yet counts as idle."""

    def __init__(
        self, model_name: str, engines: Collection[int], reports: Callable[[], Mapping[int, LoadReport]]
    ) -> None:
        self._model_name = model_name
        self._engines = engines
        self._reports = reports

    def collect(self) -> Iterator[Family]:
        reports = dict.fromkeys(self._engines, LoadReport()) | dict(self._reports())
        for metric in table.ENGINE_METRICS:
            labels = (*COMMON_LABELS, *metric.labels)
            family = _FAMILIES[metric.kind](metric.full_name, metric.help, labels=labels)
            for rank, report in sorted(reports.items()):
                for extra, value in _values(metric, report):
                    _add(family, [self._model_name, str(rank), *extra], value)
            yield family


_FAMILIES: Mapping[str, type[Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "summary": SummaryMetricFamily,
}

# Metric -> how a report tells its value.
_READERS: Mapping[Metric, Callable[[LoadReport], float]] = {
    table.NUM_REQUESTS_RUNNING: lambda report: report.num_running,
    table.NUM_REQUESTS_WAITING: lambda report: report.num_waiting,
    table.NUM_TOKENS_WAITING: lambda report: report.waiting_tokens,
    table.KV_CACHE_USAGE: lambda report: 1 - report.free_blocks / report.num_blocks if report.num_blocks else 0.0,
    table.NUM_PREEMPTIONS: lambda report: report.num_preemptions,
    table.PREFIX_CACHE_QUERIES: lambda report: report.prefix_cache_queries,
    table.PREFIX_CACHE_HITS: lambda report: report.prefix_cache_hits,
    table.STEPS: lambda report: report.steps,
    table.DUMMY_STEPS: lambda report: report.dummy_steps,
    table.NAPS: lambda report: report.naps,
    table.DP_PADDING_TOKENS: lambda report: report.padding_tokens,
}
_SUMMARIES: Mapping[Metric, Callable[[LoadReport], tuple[int, float]]] = {
    table.DP_VOTE_SECONDS: lambda report: (report.votes, report.vote_seconds),
    table.ALL2ALL_SECONDS: lambda report: (report.steps, report.all2all_seconds),
}


def _values(metric: Metric, report: LoadReport) -> list[tuple[list[str], float | tuple[int, float]]]:
    """(extra labels, value) for each series of a metric; the value of a summary is (count, sum)."""
    if metric is table.LOAD_PHASE_SECONDS:
        return [([phase], seconds) for phase, seconds in sorted(report.load_seconds.items())]
    if metric in _SUMMARIES:
        return [([], _SUMMARIES[metric](report))]
    return [([], _READERS[metric](report))]


def _add(family: Family, labels: list[str], value: float | tuple[int, float]) -> None:
    if isinstance(family, SummaryMetricFamily):
        assert isinstance(value, tuple)
        family.add_metric(labels, count_value=value[0], sum_value=value[1])
    else:
        assert not isinstance(value, tuple)
        family.add_metric(labels, value)


def _engine(rank: int | None) -> str:
    return UNKNOWN_RANK if rank is None else str(rank)
