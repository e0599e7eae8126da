"""Bytes worked out from the rules alone are those that loading takes: every architecture, world and type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.base.config import Config
from moe_serve.base.model_config import load_model_config
from moe_serve.model.footprint import footprints
from moe_serve.model.partition import make_partition, make_partitions
from moe_serve.worker.kv_cache import KVShape
from moe_serve.worker.loading.loader import load_weights
from tests.support.forward import empty_decoder
from tests.support.tiny_model import ARCHS, tiny_model

EXPERTS, REDUNDANT, BLOCK_SIZE = 10, 3, 4
BALANCED: dict[str, object] = {
    "data_parallel_size": 2,
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "eplb_config": {"num_redundant_experts": REDUNDANT},
}
WORLDS: list[dict[str, object]] = [
    {},
    {"tensor_parallel_size": 2},
    {"data_parallel_size": 3},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
    {"tensor_parallel_size": 4, "enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
    {"data_parallel_size": 3, "enable_expert_parallel": True},
    {"pipeline_parallel_size": 2},
    BALANCED | {"pipeline_parallel_size": 2},
    BALANCED,
    BALANCED | {"expert_placement_strategy": "round_robin"},
]
MODELS: list[tuple[str, dict[str, object]]] = [
    *((arch, {}) for arch in ARCHS),
    ("qwen2_moe", {"mlp_only_layers": [1], "intermediate_size": 45, "num_hidden_layers": 3}),
    ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
]
NAMES = [*ARCHS, "a dense layer", "tied, with biases"]


@pytest.fixture(scope="module", params=MODELS, ids=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, fields = request.param
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, arch, **fields)
    return made


def check(folder: Path, options: dict[str, object], dtype: torch.dtype) -> list[int]:
    """Each rank's bytes, having been held against its decoder once that is filled."""
    name = str(dtype).removeprefix("torch.")
    parallel = Config.from_flat(options).parallel
    found = footprints(make_partitions(load_model_config(folder), parallel), name)
    assert len(found) == parallel.topology.world_size
    for rank, expected in enumerate(found):
        decoder = empty_decoder(folder, rank, dtype=dtype, options=options)
        load_weights(decoder, folder)
        held = sum(len(decoder.partition.experts_of(m)) for m in range(len(decoder.moe_layers())))
        assert expected.weights == decoder.weight_bytes()
        assert expected.experts == held * decoder.expert_bytes()
        block_bytes = KVShape(decoder.token_kv, BLOCK_SIZE, dtype).block_bytes
        assert expected.token_kv * BLOCK_SIZE == block_bytes
    return [each.weights for each in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WORLDS, ids=str)
def test_a_rank_takes_what_was_worked_out_for_it(folder: Path, options: dict[str, object], dtype: torch.dtype) -> None:
    check(folder, options, dtype)


def test_ragged_slots_of_a_placement_file_count_on_the_ranks_that_have_them(folder: Path, tmp_path: Path) -> None:
    row = [*range(EXPERTS), 0, 0, 1]
    rows = [row] * len(load_model_config(folder).moe_layers)
    document = {"num_ranks": 4, "physical_to_logical": rows, "rank_of_slot": [0] * 6 + [1] * 4 + [2] * 1 + [3] * 2}
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(document))
    taken = check(folder, BALANCED | {"expert_placement_file": str(path)}, torch.float32)
    assert taken[0] > taken[1] > taken[3] > taken[2]


@pytest.mark.parametrize("options", WORLDS, ids=str)
def test_the_parts_of_all_ranks_are_those_of_each(folder: Path, options: dict[str, object]) -> None:
    config, parallel = load_model_config(folder), Config.from_flat(options).parallel
    for rank, together in enumerate(make_partitions(config, parallel)):
        alone = make_partition(config, parallel, rank)
        layers = range(len(config.moe_layers))
        assert [together.experts_of(m) for m in layers] == [alone.experts_of(m) for m in layers]
        assert (together.heads, together.kv_heads, together.vocab) == (alone.heads, alone.kv_heads, alone.vocab)
        assert (together.width, together.dense, together.num_slots) == (alone.width, alone.dense, alone.num_slots)
