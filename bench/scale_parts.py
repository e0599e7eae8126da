"""What a larger world costs elsewhere than in its coordinator: to plan it, place a request, hear loads, vote."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import msgspec

from bench.scale_coordinator import Shape
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Events, FromEngine, LoadReport
from moe_serve.engine.lockstep import Vote, decide
from moe_serve.engine.router import Balancer
from moe_serve.launch.plan import plan_world
from moe_serve.launch.resolve import resolve

LEAST_SECONDS = 0.2
REPORTS_PER_SECOND = 2
VOTE_BYTES = 8 * len(Vote(1, 1, True, 1).to_ints())
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 129280,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
"""As wide as DeepSeek-V3, in an architecture that is built."""


def parts(shape: Shape) -> dict[str, float]:
    """CPU and bytes by name; the least of several tries where one is short."""
    plan_seconds, plan_bytes = plan(shape)
    return {
        "ranks": shape.ranks,
        "plan_ms": plan_seconds * 1000,
        "plan_json_bytes": plan_bytes,
        "place_request_ms": _least(placing(shape.ranks)) * 1000,
        "load_reports_ms_per_second": _least(hearing(shape.ranks)) * REPORTS_PER_SECOND * 1000,
        "decide_votes_ms": _least(voting(shape.ranks)) * 1000,
        "vote_messages_per_rank": shape.ranks - 1,
        "vote_bytes_per_rank": (shape.ranks - 1) * VOTE_BYTES,
    }


def plan(shape: Shape) -> tuple[float, int]:
    """`moe-serve plan --json`: seconds, and bytes of what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_hidden_layers": shape.layers, "num_experts": shape.experts}
        (Path(folder) / "config.json").write_text(json.dumps(MODEL | sizes))
        begun = time.process_time()
        options = {"data_parallel_size": shape.ranks, "data_parallel_size_local": min(shape.node_size, shape.ranks)}
        balancing = {"enable_eplb": True, "eplb_config": {"num_redundant_experts": shape.redundant}}
        apart = {"data_parallel_address": "127.0.0.1", "enable_expert_parallel": True}
        resolved, model = resolve(Config.from_flat({"model": folder, **options, **balancing, **apart}), weights=False)
        text = json.dumps(asdict(plan_world(resolved, model)))
        return time.process_time() - begun, len(text)


def placing(ranks: int) -> Callable[[], object]:
    """One request among ranks that have all reported since the last."""
    balancer = Balancer(ranks, clock=time.monotonic, shared=True)
    report = LoadReport(step=100, num_running=3, num_blocks=1000, free_blocks=500)

    def place() -> object:
        return balancer.choose(1000, {rank: msgspec.structs.replace(report, num_running=rank % 7) for rank in some})

    some = range(ranks)
    place()
    return place


def hearing(ranks: int) -> Callable[[], object]:
    """One report of every rank, from its bytes."""
    decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
    report = LoadReport(step=10**6, num_running=60, free_blocks=500, steps=10**6, votes=10**6, vote_seconds=123.456)
    encoded = [msgspec.msgpack.encode(Events(dp, [], report)) for dp in range(ranks)]
    return lambda: [decoder.decode(each) for each in encoded]


def voting(ranks: int) -> Callable[[], object]:
    """What each engine makes of all votes before each step."""
    votes = [Vote(1000, 3, True, 64, generation=2**47).to_ints() for _ in range(ranks)]
    return lambda: decide([Vote.from_ints(each) for each in votes])


def _least(work: Callable[[], object]) -> float:
    begun, least = time.monotonic(), float("inf")
    while time.monotonic() - begun < LEAST_SECONDS:
        before = time.process_time()
        work()
        least = min(least, time.process_time() - before)
    return least
