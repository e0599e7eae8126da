"""Whether the weight files of a model folder can be what its config.json says, told by their sizes alone.

Asked before anything is made of the numbers: what a config.json claims beyond its own files is never allocated.
"""

from __future__ import annotations

from pathlib import Path

from moe_serve.base.errors import CheckpointError
from moe_serve.base.model_config import ModelConfig

LEAST_BYTES = 2
"""Of one stored parameter; smaller types are not read."""


def check_size(folder: Path, model: ModelConfig) -> None:
    """Raise CheckpointError if the weight files are smaller than the model; a folder without any is named later."""
    held = sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.is_file())
    needed = least_parameters(model) * LEAST_BYTES
    if held and held < needed:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of at least {needed:,} bytes ({model.num_layers} layers, "
            f"{model.num_experts} experts, hidden_size {model.hidden_size}, vocab_size {model.vocab_size}), but the "
            f"weight files beside it have {held:,}: they are incomplete, or the numbers are wrong"
        )


def least_parameters(model: ModelConfig) -> int:
    """Parameters of a model, less its norms and biases, and less a head that may be the embedding."""
    hidden = model.hidden_size
    attention = 2 * hidden * model.head_dim * (model.num_heads + model.num_kv_heads)
    experts = hidden * model.num_experts * (3 * model.expert_size + 1)
    shared = 3 * hidden * (model.shared_expert_size or 0)
    dense = 3 * hidden * (model.dense_size or 0)
    num_moe = len(model.moe_layers)
    layers = model.num_layers * attention + num_moe * (experts + shared) + (model.num_layers - num_moe) * dense
    return hidden * model.vocab_size + layers
