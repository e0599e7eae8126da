"""Qwen2MoeForCausalLM: biases on q, k and v, and a shared expert behind a sigmoid gate."""

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
            layer_rule("shared.gate", "mlp.shared_expert.gate_proj.weight", "shared", "hidden", layers="moe"),
            layer_rule("shared.up", "mlp.shared_expert.up_proj.weight", "shared", "hidden", layers="moe"),
            layer_rule("shared.down", "mlp.shared_expert.down_proj.weight", "hidden", "shared", layers="moe"),
            layer_rule("shared.scale", "mlp.shared_expert_gate.weight", "one", "hidden", layers="moe"),
        )
    )
