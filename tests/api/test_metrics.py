"""/metrics: every name of the table with an engine label, counted where and when it should be."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.api.metrics import Metrics, RequestClock
from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.metrics import ENGINE_METRICS, PREFIX, REQUEST_METRICS
from tests.api.conftest import Served

# What operators' dashboards ask for.
NAMES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "dummy_steps_total",
    "dp_vote_seconds",
    "dp_padding_tokens_total",
    "all2all_seconds",
    "load_phase_seconds",
}
Samples = dict[tuple[str, str, str], float]


def samples(text: str) -> Samples:
    """(name, engine, reason or phase) -> value."""
    return {
        (
            sample.name.removeprefix(PREFIX),
            sample.labels.get("engine", ""),
            sample.labels.get("finished_reason") or sample.labels.get("phase") or "",
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(served: Served) -> Samples:
    return samples(httpx.get(served.url + "/metrics").raise_for_status().text)


REPORTS = {
    0: LoadReport(num_running=2, num_waiting=3, waiting_tokens=40, free_blocks=15, num_blocks=20, num_preemptions=4,
                  prefix_cache_queries=100, prefix_cache_hits=60, steps=9, dummy_steps=5, naps=1, vote_seconds=0.5,
                  votes=7, padding_tokens=11, all2all_seconds=0.25, load_seconds={"load weights": 1.5}),
    1: LoadReport(num_running=1),
}  # fmt: skip


def test_reports_of_engines_are_shown_as_they_are() -> None:
    shown = samples(Metrics("m", range(3), lambda: REPORTS).render().decode())
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "num_tokens_waiting": 40,
        "kv_cache_usage_perc": 0.25,
        "num_preemptions_total": 4,
        "prefix_cache_queries_total": 100,
        "prefix_cache_hits_total": 60,
        "steps_total": 9,
        "dummy_steps_total": 5,
        "naps_total": 1,
        "dp_vote_seconds_sum": 0.5,
        "dp_vote_seconds_count": 7,
        "dp_padding_tokens_total": 11,
        "all2all_seconds_sum": 0.25,
        "all2all_seconds_count": 9,
    }
    for name, value in expected.items():
        assert shown[name, "0", ""] == value
    assert shown["load_phase_seconds", "0", "load weights"] == 1.5
    assert shown["num_requests_running", "1", ""] == 1
    assert shown["num_requests_running", "2", ""] == 0, "an engine that has not reported is idle"


def test_of_an_engine_that_is_not_served_nothing_is_said() -> None:
    shown = samples(Metrics("m", [1], lambda: {1: REPORTS[1]}).render().decode())
    assert {engine for _, engine, _ in shown if engine} == {"1"}


def test_every_name_that_dashboards_ask_for_is_there_with_zeros_from_the_start() -> None:
    text = (
        Metrics("m", range(2), lambda: {rank: LoadReport(load_seconds={"build": 1.0}) for rank in (0, 1)})
        .render()
        .decode()
    )
    shown = samples(text)
    for name in NAMES:
        assert f"# HELP {PREFIX}{name.removesuffix('_total')}" in text
        for engine in ("0", "1"):
            found = [key for key in shown if key[1] == engine and key[0] in (name, f"{name}_count")]
            assert found, f"{name} of engine {engine}"
    for reason in ("stop", "length", "abort", "error"):
        assert shown["request_success_total", "1", reason] == 0


def test_the_table_has_no_name_twice_and_keeps_to_prometheus_rules() -> None:
    names = [metric.name for metric in (*REQUEST_METRICS, *ENGINE_METRICS)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.endswith("_total")], "the library adds it to counters"
    assert all(metric.buckets == tuple(sorted(metric.buckets)) for metric in REQUEST_METRICS)
    assert all(bool(metric.buckets) == (metric.kind == "histogram") for metric in REQUEST_METRICS)


def test_answers_count_at_the_engine_that_gave_them(served: Served) -> None:
    before = scrape(served)
    body = {"prompt": [1, 2, 3], "max_tokens": 7, "ignore_eos": True, "n": 2}
    for _ in range(2):
        answer = httpx.post(
            served.url + "/v1/completions", json=body, headers=served.headers | {"X-data-parallel-rank": "1"}
        )
        assert answer.headers["X-data-parallel-rank"] == "1"
    after = scrape(served)

    def growth(name: str, engine: str, label: str = "") -> float:
        return after[name, engine, label] - before[name, engine, label]

    assert growth("prompt_tokens_total", "1") == 2 * 2 * 3
    assert growth("generation_tokens_total", "1") == 2 * 2 * 7
    assert growth("request_success_total", "1", "length") == 4
    assert growth("time_to_first_token_seconds_count", "1") == 4
    assert growth("inter_token_latency_seconds_count", "1") == 4 * 6
    assert growth("e2e_request_latency_seconds_count", "1") == 4
    for name in ("prompt_tokens_total", "generation_tokens_total", "e2e_request_latency_seconds_count"):
        assert growth(name, "0") == 0


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_an_answer_counts_once_however_it_ends(reason: str) -> None:
    metrics = Metrics("m", range(1), dict)
    clock = RequestClock(metrics, 5, arrival=0.0)
    clock.tokens(0, None)
    clock.tokens(3, 0)
    clock.end(reason)
    clock.end("abort")
    shown = samples(metrics.render().decode())
    assert shown["request_success_total", "0", reason] == 1
    assert sum(value for (name, _, _), value in shown.items() if name == "request_success_total") == 1
    assert shown["e2e_request_latency_seconds_count", "0", ""] == (reason in ("stop", "length"))
    assert shown["prompt_tokens_total", "0", ""] == 5


def test_a_model_name_with_quotes_is_escaped() -> None:
    text = Metrics('a "b"\n\\c', range(1), dict).render().decode()
    families = list(text_string_to_metric_families(text))
    assert families[0].samples[0].labels["model_name"] == 'a "b"\n\\c'
