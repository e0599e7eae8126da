"""Every architecture's logits equal transformers' in float32, on one rank and cut over two and four.

Tolerance: 1e-4 x max(1, largest |logit| / 10). Norm weights and biases are random too.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import load_model_config
from moe_serve.base.topology import Topology
from moe_serve.model.partition import make_partition
from moe_serve.parallel.groups import build_groups
from tests.support.forward import all_logits, alone, load_decoder, rank_logits
from tests.support.ranks import Ranks
from tests.support.tiny_model import ARCHS, SIZES, tiny_model

VOCAB = SIZES["vocab_size"]
WORLDS = {
    "tp2": {"tensor_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4, "all2all_backend": "naive"},
    "dp2 tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "dp4": {"data_parallel_size": 4, "all2all_backend": "torch_a2a"},
}
SPREADS: dict[str, dict[str, object]] = {
    "sharded": {},
    "linear": {"enable_expert_parallel": True},
    "round_robin": {"enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
}


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def expected(model: Any, prompt: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-4 * max(1.0, theirs.abs().max().item() / 10)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


def check_alone(folder: Path, oracle: Any, chunk: int | None = None) -> None:
    asked = prompts([19, 1, 8])
    found = all_logits(load_decoder(folder, alone()), [asked], chunk=chunk)
    for prompt, logits in zip(asked, found, strict=True):
        assert_same_logits(logits, expected(oracle, prompt))


@pytest.mark.parametrize("fused", [False, True], ids=["expert by expert", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_equal_those_of_transformers(arch: str, tied: bool, fused: bool, tmp_path: Path) -> None:
    oracle = tiny_model(tmp_path, arch, tie_word_embeddings=tied, fused=fused)
    check_alone(tmp_path, oracle)


@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_do_not_depend_on_how_a_prompt_is_cut_into_steps(arch: str, chunk: int, tmp_path: Path) -> None:
    check_alone(tmp_path, tiny_model(tmp_path, arch, seed=1), chunk)


VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"head_dim": 10, "num_key_value_heads": 1}),
    ("qwen3_moe", {"mlp_only_layers": [0], "intermediate_size": 45}),
    ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 45, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "intermediate_size": 45, "num_hidden_layers": 3}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    ("mixtral", {"head_dim": 32}),
    ("mixtral", {"num_experts": 3, "num_experts_per_tok": 3}),
    ("olmoe", {"attention_bias": True}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 1}),
    ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("arch", "fields"), VARIANTS, ids=lambda value: str(value))
def test_a_field_that_changes_the_mathematics_changes_ours_too(
    arch: str, fields: dict[str, object], tmp_path: Path
) -> None:
    check_alone(tmp_path, tiny_model(tmp_path, arch, **fields))


@pytest.mark.parametrize("arch", ARCHS)
def test_older_spellings_of_config_give_the_same_logits(arch: str, tmp_path: Path) -> None:
    oracle = tiny_model(tmp_path, arch, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert "rope_theta" not in values
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["torch_dtype"] = values.pop("dtype")
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
    name = next(name for name in other if name in values)
    values[other[name]] = values.pop(name)
    path.write_text(json.dumps(values))
    check_alone(tmp_path, oracle)


def test_a_rope_theta_that_is_not_read_would_be_noticed(tmp_path: Path) -> None:
    oracle = tiny_model(tmp_path, "mixtral", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"]["rope_theta"] = 10_000.0
    path.write_text(json.dumps(values))
    with pytest.raises(AssertionError):
        check_alone(tmp_path, oracle)


def check_world(
    ranks: Ranks, folder: Path, oracle: Any, options: dict[str, object], *, chunk: int | None = None
) -> None:
    """Engines bring different prompts, of different lengths; one of four brings none."""
    topology = Config.from_flat(options).parallel.topology
    asked = [prompts(lengths, seed) for seed, lengths in enumerate([[13, 2], [1], [], [5, 5, 1]][: topology.dp])]
    answers = ranks.run(rank_logits, folder, asked, chunk, options, only=topology.world_size)
    for rank, found in enumerate(answers):
        mine = asked[topology.coordinates(rank)[0]]
        assert len(found) == len(mine)
        for prompt, logits in zip(mine, found, strict=True):
            assert_same_logits(torch.from_numpy(logits), expected(oracle, prompt))


@pytest.mark.ranks
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_cut_over_ranks_gives_the_same_logits(
    ranks: Ranks, arch: str, world: str, spread: str, tmp_path: Path
) -> None:
    """10 experts on 4 ranks, width 40 in eights on 4 ranks, 131 tokens and 2 KV heads on 4 ranks: little divides."""
    oracle = tiny_model(tmp_path, arch, expert_size=40, fused=world == "dp2 tp2", seed=2)
    check_world(ranks, tmp_path, oracle, WORLDS[world] | SPREADS[spread])


@pytest.mark.ranks
@pytest.mark.parametrize("arch", ARCHS)
def test_a_tied_model_with_biases_cut_over_ranks_in_small_steps_gives_the_same_logits(
    ranks: Ranks, arch: str, tmp_path: Path
) -> None:
    fields = {"attention_bias": True} if arch in ("qwen3_moe", "olmoe") else {}
    oracle = tiny_model(tmp_path, arch, tie_word_embeddings=True, seed=3, **fields)
    check_world(ranks, tmp_path, oracle, WORLDS["dp2 tp2"] | SPREADS["round_robin"], chunk=2)
    check_world(ranks, tmp_path, oracle, WORLDS["tp4"] | SPREADS["sharded"], chunk=2)  # width 24 as 6 + 6 + 6 + 6


@pytest.mark.ranks
@pytest.mark.parametrize("spread", ["sharded", "linear"])
@pytest.mark.parametrize("world", ["tp2", "dp2", "dp2 tp2"])
def test_a_model_with_a_dense_layer_cut_over_ranks_gives_the_same_logits(
    ranks: Ranks, world: str, spread: str, tmp_path: Path
) -> None:
    oracle = tiny_model(tmp_path, "qwen3_moe", mlp_only_layers=[0], intermediate_size=45, seed=4)
    check_world(ranks, tmp_path, oracle, WORLDS[world] | SPREADS[spread])


def test_a_dense_layer_narrower_than_the_ranks_it_would_be_cut_over_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen3_moe", mlp_only_layers=[0], intermediate_size=3)
    parallel = Config.from_flat({"tensor_parallel_size": 4, "enable_expert_parallel": True}).parallel
    with pytest.raises(ConfigError, match="width 3 cannot be cut over 4 ranks; lower --tensor-parallel-size"):
        make_partition(load_model_config(tmp_path), parallel, 0)


def test_experts_are_placed_in_the_layers_that_have_them_only(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen3_moe", decoder_sparse_step=2, num_hidden_layers=5)
    parallel = Config.from_flat({"data_parallel_size": 2, "enable_expert_parallel": True}).parallel
    partition = make_partition(load_model_config(tmp_path), parallel, 1)
    assert partition.config.moe_layers == (1, 3)
    assert partition.placement is not None
    assert partition.placement.num_layers == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 .* 4 query heads and 2 KV heads; .* 1, 2, 4"),
        ({"tensor_parallel_size": 8}, "--tensor-parallel-size 8"),
        ({"data_parallel_size": 32}, "width 24 cannot be cut over 32 ranks .*--enable-expert-parallel"),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_refused(options: dict[str, object], named: str, tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral")
    with pytest.raises(ConfigError, match=named):
        make_partition(load_model_config(tmp_path), Config.from_flat(options).parallel, 0)


def test_with_more_ranks_than_experts_some_ranks_hold_none(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral", num_experts=3)
    parallel = Config.from_flat({"data_parallel_size": 4, "enable_expert_parallel": True}).parallel
    config = load_model_config(tmp_path)
    held = [make_partition(config, parallel, rank).experts_of(1) for rank in range(4)]
    assert held == [[0], [1], [2], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk", [None, 3], ids=["whole prompts", "small steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_the_same_on_a_cuda_device(arch: str, dtype: torch.dtype, chunk: int | None, tmp_path: Path) -> None:
    """In bfloat16 only their direction is compared: rounding may send a row to another expert."""
    oracle = tiny_model(tmp_path, arch)
    device = torch.device("cuda")
    groups = build_groups(Topology(), 0, store_host="", store_port=0, token="", device=device)
    asked = prompts([19, 1, 8])
    found = all_logits(load_decoder(tmp_path, groups, dtype=dtype, device=device), [asked], chunk=chunk)
    for prompt, logits in zip(asked, found, strict=True):
        theirs = expected(oracle, prompt)
        if dtype == torch.float32:
            assert_same_logits(logits.cpu(), theirs)
        else:
            assert torch.cosine_similarity(logits.cpu().flatten(), theirs.flatten(), dim=0) > 0.98
