"""Qwen3MoeForCausalLM: q and k normed per head, no biases unless attention_bias."""

from __future__ import annotations

from moe_serve.base.model_config import ModelConfig
from moe_serve.model.archs.base import ModelSpec, common_weights, dense_weights, expert_weights, layer_rule


def spec(config: ModelConfig) -> ModelSpec:
    """Where its weights come from."""
    return ModelSpec(
        common_weights(config)
        + expert_weights("gate_proj", "up_proj", "down_proj")
        + dense_weights()
        + (
            layer_rule("attention.q_norm.weight", "self_attn.q_norm.weight", "head_dim"),
            layer_rule("attention.k_norm.weight", "self_attn.k_norm.weight", "head_dim"),
        )
    )
