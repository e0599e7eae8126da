"""Every metric: name, type, help, labels, buckets, in one table. Names get the prefix `moe_serve:`; counters end in
`_total` where they are exposed. All carry the labels model_name and engine (the DP rank)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "moe_serve:"
COMMON_LABELS = ("model_name", "engine")

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` beyond the common ones. A summary is a sum and a count, without quantiles."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "summary"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


# Observed where answers are sent.
PROMPT_TOKENS = Metric("prompt_tokens", "counter", "Prompt tokens of requests whose answer began.")
GENERATION_TOKENS = Metric("generation_tokens", "counter", "Tokens generated.")
REQUEST_SUCCESS = Metric("request_success", "counter", "Answers that ended, by how.", ("finished_reason",))
TIME_TO_FIRST_TOKEN = Metric(
    "time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.", buckets=_LATENCY
)
INTER_TOKEN_LATENCY = Metric(
    "inter_token_latency_seconds", "histogram", "Between two tokens of an answer.", buckets=_LATENCY
)
E2E_REQUEST_LATENCY = Metric(
    "e2e_request_latency_seconds", "histogram", "From a request's arrival to its last token.", buckets=_LATENCY
)

# Of the HTTP server; without an engine label.
REQUESTS_REFUSED = Metric("requests_refused", "counter", "HTTP requests that were refused, by why.", ("reason",))
NUM_CONNECTIONS = Metric("http_connections", "gauge", "Open HTTP connections.")

# Read from each engine's latest report.
NUM_REQUESTS_RUNNING = Metric("num_requests_running", "gauge", "Requests being computed.")
NUM_REQUESTS_WAITING = Metric("num_requests_waiting", "gauge", "Requests that wait for room.")
NUM_TOKENS_WAITING = Metric("num_tokens_waiting", "gauge", "Prompt tokens of waiting requests.")
KV_CACHE_USAGE = Metric("kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1.")
NUM_PREEMPTIONS = Metric("num_preemptions", "counter", "Requests set back because KV blocks ran out.")
PREFIX_CACHE_QUERIES = Metric("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.")
PREFIX_CACHE_HITS = Metric("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.")
STEPS = Metric("steps", "counter", "Steps, dummy steps included.")
DUMMY_STEPS = Metric("dummy_steps", "counter", "Steps without work of its own, run for the other DP ranks.")
NAPS = Metric("naps", "counter", "Times this engine went to sleep.")
DP_VOTE_SECONDS = Metric("dp_vote_seconds", "summary", "Waiting for the DP ranks' votes before a step.")
DP_PADDING_TOKENS = Metric(
    "dp_padding_tokens", "counter", "Rows without a token sent to experts to make shares equal, over all layers."
)
ALL2ALL_SECONDS = Metric("all2all_seconds", "summary", "Exchanging tokens between expert-parallel ranks, per step.")
LOAD_PHASE_SECONDS = Metric("load_phase_seconds", "gauge", "How long each phase of starting took.", ("phase",))

# Told by the coordinator, where load is balanced; without an engine label.
EPLB_BALANCEDNESS = Metric(
    "eplb_balancedness", "gauge", "Sum over layers of the mean rank load / sum of the largest, over the window."
)
EPLB_MEAN_OF_RATIOS = Metric(
    "eplb_balancedness_mean_of_ratios", "gauge", "Mean over layers of mean / max rank load, over the window."
)
EPLB_MEAN_EXCESS = Metric("eplb_mean_excess", "gauge", "Mean over layers of (max - mean) / mean rank load.")
EPLB_PEAK_TO_AVERAGE = Metric(
    "eplb_peak_to_average_p95", "gauge", "Max / mean rank load that 95 % of the layers stay below."
)
EPLB_REBALANCES = Metric("eplb_rebalances", "counter", "Rearrangements of experts that were applied.")
EPLB_SKIPPED = Metric("eplb_rebalances_skipped", "counter", "Rearrangements that were not made.", ("reason",))
EPLB_MOVED_EXPERTS = Metric("eplb_moved_experts", "counter", "Experts that moved to a rank that did not hold them.")
EPLB_MOVED_BYTES = Metric("eplb_moved_bytes", "counter", "Weights that moved between ranks.")
EPLB_STAGE_SECONDS = Metric("eplb_stage_seconds", "summary", "Fetching the weights of a chunk, while serving goes on.")
EPLB_COMMIT_SECONDS = Metric("eplb_commit_seconds", "summary", "Switching to a chunk, between two steps.")
EPLB_LAST_SUCCESS = Metric("eplb_last_success_timestamp", "gauge", "Unix time of the last rearrangement; 0 if none.")

REQUEST_METRICS = (
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    REQUEST_SUCCESS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_REQUEST_LATENCY,
)
ENGINE_METRICS = (
    NUM_REQUESTS_RUNNING,
    NUM_REQUESTS_WAITING,
    NUM_TOKENS_WAITING,
    KV_CACHE_USAGE,
    NUM_PREEMPTIONS,
    PREFIX_CACHE_QUERIES,
    PREFIX_CACHE_HITS,
    STEPS,
    DUMMY_STEPS,
    NAPS,
    DP_VOTE_SECONDS,
    DP_PADDING_TOKENS,
    ALL2ALL_SECONDS,
    LOAD_PHASE_SECONDS,
)
SERVER_METRICS = (REQUESTS_REFUSED, NUM_CONNECTIONS)
BALANCE_METRICS = (
    EPLB_BALANCEDNESS,
    EPLB_MEAN_OF_RATIOS,
    EPLB_MEAN_EXCESS,
    EPLB_PEAK_TO_AVERAGE,
    EPLB_REBALANCES,
    EPLB_SKIPPED,
    EPLB_MOVED_EXPERTS,
    EPLB_MOVED_BYTES,
    EPLB_STAGE_SECONDS,
    EPLB_COMMIT_SECONDS,
    EPLB_LAST_SUCCESS,
)
