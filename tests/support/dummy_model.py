"""A model folder that is only a config.json, for `load_format="dummy"`: random weights that all ranks agree on."""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 10,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "dtype": "float32",
}


def dummy_model(folder: Path, **fields: object) -> Path:
    """Write config.json into `folder` and return the folder; `fields` replace its values."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | fields))
    return folder
