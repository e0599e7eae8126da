"""The planned world: every rank in one place, everything it holds counted, and what cannot be said by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig, load_model_config
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.launch.plan import WorldPlan, dp_ranks_of_nodes, plan_world, processes_of_node
from moe_serve.launch.ports import PortPlan, check_ports, ports_of_node
from moe_serve.launch.resolve import SHIPPED_MODEL, resolve

MODEL = load_model_config(SHIPPED_MODEL)
LARGE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
"""Of Qwen3-235B-A22B: what only its config.json says."""


def parallel(**options: object) -> ParallelConfig:
    return ParallelConfig(**({"enable_expert_parallel": True} | options))  # type: ignore[arg-type]


def plan(*, memory_bytes: int | None = None, **options: object) -> WorldPlan:
    resolved, model = resolve(Config.from_flat({"enable_expert_parallel": True, **options}), weights=False)
    return plan_world(resolved, model, memory_bytes=memory_bytes)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(LARGE))
    return str(folder)


@given(
    dp=st.integers(1, 5),
    tp=st.sampled_from([1, 2, 4]),
    redundant=st.integers(0, 32),
    strategy=st.sampled_from(["linear", "round_robin"]),
    per_node=st.integers(1, 5),
)
def test_every_rank_has_one_place_and_every_expert_somebody_who_holds_it(
    dp: int, tp: int, redundant: int, strategy: str, per_node: int
) -> None:
    options: dict[str, Any] = {"data_parallel_size": dp, "tensor_parallel_size": tp}
    if dp * tp > 1:
        redundant = min(redundant, MODEL.num_experts * (dp * tp - 1))
        options |= {"enable_eplb": True, "eplb_config": {"num_redundant_experts": redundant}}
        options |= {"expert_placement_strategy": strategy}
    world = plan(data_parallel_size_local=min(dp, per_node), **options)
    topology = parallel(**options).topology
    assert [each.rank for each in world.ranks] == list(range(dp * tp))
    assert [topology.coordinates(each.rank) for each in world.ranks] == [(r.dp, r.pp, r.tp) for r in world.ranks]
    assert [dp_rank for node in world.nodes for dp_rank in node.dp_ranks] == list(range(dp))
    places = Counter(rank for node in world.nodes for process in node.processes for rank in process.ranks)
    assert places == dict.fromkeys(range(dp * tp), 1)
    for node in world.nodes:
        here = [each for each in world.ranks if each.node == node.node]
        assert sorted({each.dp for each in here}) == node.dp_ranks
        assert [each.local_rank for each in here] == list(range(len(here)))
    slots = MODEL.num_experts + (redundant if dp * tp > 1 else 0)
    for layer in range(len(MODEL.moe_layers)):
        held = [expert for each in world.ranks for expert in each.experts[layer]]
        assert len(held) == slots
        assert set(held) == set(range(MODEL.num_experts))


def test_a_model_is_planned_from_its_config_alone(large: str) -> None:
    options = {"model": large, "data_parallel_size": 16, "data_parallel_size_local": 8, "max_model_len": 32768}
    world = plan(memory_bytes=80 * 2**30, **options)
    assert [node.dp_ranks for node in world.nodes] == [list(range(8)), list(range(8, 16))]
    # By hand: 128 experts over 16 ranks, three matrices each, in 94 layers, two bytes a number.
    assert {each.expert_weight_bytes for each in world.ranks} == {94 * 8 * 3 * 4096 * 1536 * 2}
    total = sum(each.expert_weight_bytes for each in world.ranks)
    assert total == pytest.approx(227e9 * 2, rel=0.01), "it has 235 billion weights, nearly all of experts"
    block_bytes = 94 * 2 * 4 * 128 * 2 * 16
    assert {each.kv_block_bytes for each in world.ranks} == {block_bytes}
    room = int(80 * 2**30 * 0.9) - world.ranks[0].weight_bytes
    assert world.ranks[0].kv_blocks == room // block_bytes
    assert world.kv_tokens == room // block_bytes * 16


def test_without_any_bytes_the_kv_cache_is_not_guessed() -> None:
    world = plan(data_parallel_size=2)
    assert world.kv_tokens is None
    assert {each.kv_blocks for each in world.ranks} == {None}


def test_given_bytes_of_kv_cache_need_no_memory_but_are_held_against_it() -> None:
    block_bytes = plan().ranks[0].kv_block_bytes
    asked = {"kv_cache_memory_bytes": 200 * block_bytes + 1, "max_model_len": 64}
    assert plan(**asked).kv_tokens == 200 * 16
    with pytest.raises(ConfigError, match=r"more than each rank can have: .* bytes .*lower --kv-cache-memory-bytes"):
        plan(memory_bytes=plan().ranks[0].weight_bytes + 100 * block_bytes, **asked)


def test_weights_that_do_not_fit_are_refused_with_what_would_help(large: str) -> None:
    with pytest.raises(ConfigError, match=r"weights of rank 0 .* spread the model over more ranks .* --dtype"):
        plan(memory_bytes=40 * 2**30, model=large, data_parallel_size=8)
    with pytest.raises(
        ConfigError, match=r"one sequence of max_model_len 32768 .* less .* of weights.*--max-model-len"
    ):
        plan(memory_bytes=73 * 10**9, model=large, data_parallel_size=8, gpu_memory_utilization=1.0)


def test_redundant_experts_take_memory_on_the_ranks_that_hold_them(large: str) -> None:
    plain = plan(model=large, data_parallel_size=8)
    balanced = plan(model=large, data_parallel_size=8, enable_eplb=True, eplb_config={"num_redundant_experts": 12})
    one = plain.ranks[0].expert_weight_bytes // 16
    more = [each.weight_bytes - plain.ranks[0].weight_bytes for each in balanced.ranks]
    assert sorted(more) == [one] * 4 + [2 * one] * 4


@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({"data_parallel_size": 5}, [[0, 1, 2, 3, 4]]),
        ({"data_parallel_size": 5, "data_parallel_size_local": 2}, [[0, 1], [2, 3], [4]]),
        ({"data_parallel_size": 3, "data_parallel_rank": 1}, [[0], [1], [2]]),
        (
            {"data_parallel_size": 7, "data_parallel_start_rank": 3, "data_parallel_size_local": 2, "headless": True},
            [[0, 1], [2], [3, 4], [5, 6]],
        ),
        ({"data_parallel_size": 5, "data_parallel_backend": "ray"}, [[0, 1, 2, 3, 4]]),
        (
            {"data_parallel_size": 5, "data_parallel_backend": "ray", "data_parallel_size_local": 2},
            [[0, 1], [2, 3], [4]],
        ),
    ],
    ids=str,
)
def test_nodes_are_by_the_local_ranks(options: dict[str, object], nodes: list[list[int]]) -> None:
    assert [list(each) for each in dp_ranks_of_nodes(parallel(**options))] == nodes


HOLDER = "launcher, with the coordinator"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[HOLDER, "engine dp 0", "engine dp 1", "API server"], ["launcher", "engine dp 2", "engine dp 3"]]),
        (
            {"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2},
            [
                [HOLDER, "engine dp 0", "engine dp 1", "API server"],
                ["launcher", "engine dp 2", "engine dp 3", "API server"],
            ],
        ),
    ],
    ids=["internal", "hybrid"],
)
def test_who_has_an_api_server_is_by_the_kind_of_load_balancing(
    options: dict[str, object], expected: list[list[str]]
) -> None:
    given = parallel(data_parallel_size=4, distributed_executor_backend="uni", **options)
    found = [processes_of_node(given, dp_ranks) for dp_ranks in ([0, 1], [2, 3])]
    assert [[process.name for process in node] for node in found] == expected
    listening = [ports_of_node(Config(parallel=given), dp_ranks) for dp_ranks in ([0, 1], [2, 3])]
    assert [port.what for port in listening[0]] == ["coordinator", "store of rank 0", "HTTP"]
    assert [port.what for port in listening[1]] == (["HTTP"] if options else [])


def test_where_each_rank_has_a_server_every_node_listens_and_only_rank_0_is_met() -> None:
    given = {"data_parallel_size": 2, "data_parallel_rank": 1, "data_parallel_rank_local": 1, "device": "cuda"}
    world = plan(**given)
    assert [[process.name for process in node.processes] for node in world.nodes] == [
        [HOLDER, "engine dp 0", "API server"],
        ["launcher", "engine dp 1", "API server"],
    ]
    assert [[port.what for port in node.ports] for node in world.nodes] == [
        ["coordinator", "store of rank 0", "HTTP"],
        ["HTTP"],
    ]
    assert [port.port for port in world.nodes[0].ports] == [29550, 0, 8000]
    assert [node.here for node in world.nodes] == [False, True]
    assert [rank.device for rank in world.ranks] == ["cuda:0", "cuda:1"], "only this launcher's place was told"


def test_a_supervisor_has_a_port_and_each_of_its_ranks_another() -> None:
    world = plan(
        data_parallel_size=4, data_parallel_size_local=2, node_rank=1, data_parallel_multi_port_external_lb=True
    )
    assert [node.here for node in world.nodes] == [False, True]
    assert [process.name for process in world.nodes[1].processes] == [
        "supervisor",
        *("launcher of rank 2", "engine dp 2", "API server of rank 2"),
        *("launcher of rank 3", "engine dp 3", "API server of rank 3"),
    ]
    assert world.nodes[0].processes[1].name == "launcher of rank 0, with the coordinator"
    ports = [[(port.what, port.port) for port in node.ports] for node in world.nodes]
    met = [("coordinator", 29550), ("store of rank 0", 0)]
    assert ports[0] == [*met, ("HTTP of rank 0", 8000), ("HTTP of rank 1", 8001), ("supervisor", 9256)]
    assert ports[1] == [("HTTP of rank 2", 8000), ("HTTP of rank 3", 8001), ("supervisor", 9256)]


def test_one_engine_over_nodes_is_planned_with_workers_on_each() -> None:
    world = plan(
        pipeline_parallel_size=2,
        tensor_parallel_size=2,
        nnodes=2,
        node_rank=1,
        master_addr="host0",
        device="cuda",
        enable_expert_parallel=False,
    )
    assert [(rank.node, rank.local_rank, rank.device) for rank in world.ranks] == [
        (0, 0, "cuda:0"),
        (0, 1, "cuda:1"),
        (1, 0, "cuda:0"),
        (1, 1, "cuda:1"),
    ]
    assert [node.here for node in world.nodes] == [False, True]
    workers = [f"worker dp 0 pp {stage} tp {tp} of node {stage}" for stage in (0, 1) for tp in (0, 1)]
    assert [[process.name for process in node.processes] for node in world.nodes] == [
        [HOLDER, "engine dp 0", *workers[:2], "API server"],
        ["launcher", *workers[2:]],
    ]
    assert [rank for process in world.nodes[1].processes for rank in process.ranks] == [2, 3]
    met = [(port.what, port.host, port.port, port.option) for port in world.nodes[0].ports]
    assert met[0] == ("coordinator", "host0", 29501, "--master-port")
    assert world.nodes[1].ports == []


def test_several_api_servers_are_processes_at_one_port() -> None:
    (node,) = plan(api_server_count=3).nodes
    names = [process.name for process in node.processes]
    assert names == [HOLDER, "engine dp 0", "API server 0", "API server 1", "API server 2"]
    assert [port.what for port in node.ports] == ["coordinator", "store of rank 0", "HTTP"]


def test_ranks_that_torchrun_starts_are_all_the_processes_there_are() -> None:
    config = Config.from_flat(
        {"data_parallel_size": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    )
    found = processes_of_node(config.parallel, [0, 1])
    assert [(each.name, each.ranks) for each in found] == [
        ("LLM of rank 0, worker dp 0 tp 0", [0]),
        ("LLM of rank 1, worker dp 0 tp 1", [1]),
        ("LLM of rank 2, worker dp 1 tp 0", [2]),
        ("LLM of rank 3, worker dp 1 tp 1", [3]),
    ]
    assert ports_of_node(config, [0, 1]) == []


def test_workers_are_processes_unless_an_executor_has_them_otherwise() -> None:
    two = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    found = processes_of_node(parallel(distributed_executor_backend="mp", **two), [0])
    assert [(each.name, each.ranks) for each in found[1:4]] == [
        ("engine dp 0", []),
        ("worker dp 0 tp 0", [0]),
        ("worker dp 0 tp 1", [1]),
    ]
    (engine,) = [
        each
        for each in processes_of_node(parallel(distributed_executor_backend="some.where:Else", **two), [0])
        if each.ranks
    ]
    assert engine.name == "engine dp 0, workers as some.where:Else has it"


def test_engines_and_workers_that_ray_starts_are_actors_and_one_command_starts_all() -> None:
    ray = {"data_parallel_backend": "ray", "data_parallel_size": 2, "data_parallel_size_local": 1}
    given = parallel(distributed_executor_backend="ray", tensor_parallel_size=2, **ray)
    assert [each.name for each in processes_of_node(given, [0])] == [
        HOLDER,
        *("engine dp 0, a Ray actor", "worker dp 0 tp 0, a Ray actor", "worker dp 0 tp 1, a Ray actor"),
        "API server",
    ]
    alone = parallel(distributed_executor_backend="uni", **ray)
    assert [(each.name, each.ranks) for each in processes_of_node(alone, [1])] == [("engine dp 1, a Ray actor", [1])]


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        ([("10.0.0.1", 80), ("10.0.0.1", 80)], "both listen at port 80 of 10.0.0.1"),
        ([("10.0.0.1", 80), ("0.0.0.0", 80)], "both listen at port 80"),
        ([("10.0.0.1", 80), ("127.0.0.1", 80)], ""),
        ([("10.0.0.1", 80), ("10.0.0.1", 81)], ""),
        ([("10.0.0.1", 0), ("10.0.0.1", 0)], ""),
    ],
)
def test_two_cannot_listen_at_one_port(ports: list[tuple[str, int]], words: str) -> None:
    planned = [
        PortPlan(what=f"number {index}", host=host, port=port, option=f"--port-{index}")
        for index, (host, port) in enumerate(ports)
    ]
    if not words:
        check_ports(planned)
        return
    with pytest.raises(ConfigError, match=words) as caught:
        check_ports(planned)
    assert "number 0 (--port-0) and number 1 (--port-1)" in str(caught.value)


def test_the_plan_is_that_of_the_very_placement_file(tmp_path: Path) -> None:
    model: ModelConfig = MODEL
    row = list(reversed(range(model.num_experts)))
    document = {
        "num_ranks": 2,
        "physical_to_logical": [row] * len(model.moe_layers),
        "rank_of_slot": [0] * 20 + [1] * (model.num_experts - 20),
    }
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(document))
    world = plan(data_parallel_size=2, expert_placement_file=str(file))
    assert [each.experts[0] for each in world.ranks] == [row[:20], row[20:]]


def test_ranks_that_share_a_cache_keep_as_many_times_less_of_a_token(large: str) -> None:
    alone, shared = (
        plan(model=large, tensor_parallel_size=16, decode_context_parallel_size=dcp, memory_bytes=2**37)
        for dcp in (1, 4)
    )
    assert alone.ranks[5].kv_block_bytes == 4 * shared.ranks[5].kv_block_bytes == 94 * 2 * 128 * 2 * 16
    assert "(KV cache shared by 4)" in shared.summary
    assert "shared" not in alone.summary
