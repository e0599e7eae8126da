"""MixtralForCausalLM: experts named w1 (gate), w3 (up) and w2 (down); always renormalises the top-k weights."""

from __future__ import annotations

from moe_serve.base.model_config import ModelConfig
from moe_serve.model.archs.base import ModelSpec, common_weights, expert_weights


def spec(config: ModelConfig) -> ModelSpec:
    """Where its weights come from; transformers 5 calls the block `mlp` when it writes stacked experts."""
    return ModelSpec(common_weights(config) + expert_weights("w1", "w3", "w2", blocks=("block_sparse_moe", "mlp")))
