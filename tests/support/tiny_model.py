"""Random two-layer checkpoints made with transformers itself, the independent oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

ARCHS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "dtype": "float32",
}


def tiny_config(arch: str, **overrides: Any) -> PretrainedConfig:
    """A transformers config; `overrides` by its own field names, `num_experts` (10) and `expert_size` (24) by ours."""
    experts = overrides.pop("num_experts", 10)
    width = overrides.pop("expert_size", 24)
    values = SIZES | overrides
    if arch == "qwen3_moe":
        own = {"num_experts": experts, "moe_intermediate_size": width, "head_dim": 24, "norm_topk_prob": True}
        return Qwen3MoeConfig(**(values | own | overrides))
    if arch == "qwen2_moe":
        own = {"num_experts": experts, "moe_intermediate_size": width, "shared_expert_intermediate_size": 40}
        return Qwen2MoeConfig(**(values | own | overrides))
    if arch == "mixtral":
        return MixtralConfig(**(values | {"num_local_experts": experts, "intermediate_size": width}))
    if arch == "olmoe":
        return OlmoeConfig(**(values | {"num_experts": experts, "intermediate_size": width}))
    raise ValueError(f"unknown arch {arch!r}; known are {', '.join(ARCHS)}")


def tiny_model(
    folder: Path, arch: str, *, seed: int = 0, fused: bool = False, max_shard_size: str = "5GB", **overrides: Any
) -> PreTrainedModel:
    """Write a checkpoint into `folder` and return transformers' model of it, in float32.

    `fused` stacks the experts in one tensor, as transformers 5 holds them; else one tensor each, as the hub has them.
    """
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(tiny_config(arch, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            numbers = _random(name, parameter.shape, generator)
            tied = model.config.tie_word_embeddings and "embed" in name
            parameter.copy_(numbers / parameter.shape[-1] ** 0.5 if tied else numbers)
    model.train(False)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not fused)
    return model


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms and biases random too, and experts strong enough to matter."""
    numbers = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * numbers
    if len(shape) == 1:
        return 0.3 * numbers
    return numbers if "embed" in name else 1.5 * numbers / shape[-1] ** 0.5
