"""The supported architectures as config.json names them: their defaults (those of transformers 5) and fixed choices.

Also the fields that change the mathematics of any of them and are not computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an architecture assumes where config.json is silent, and what it fixes by its code.

    `norm_topk_prob` None: the checkpoint says. `free_head_dim`: head_dim need not be hidden_size / heads.
    `sliding_window_switch`: a sliding_window counts only if use_sliding_window is true. `dense_size_field`, where the
    checkpoint says which layers are dense (DENSE_LAYER_FIELDS): their width.
    """

    fields: Mapping[str, object]
    expert_size_field: str
    qk_norm: QKNorm = "none"
    bias_field: str | None = None
    output_bias: bool = False
    norm_topk_prob: bool | None = None
    shared_expert: bool = False
    free_head_dim: bool = True
    sliding_window_switch: bool = False
    dense_size_field: str | None = None


_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "decoder_sparse_step": 1,
}
ARCHITECTURES: Mapping[str, Defaults] = MappingProxyType(
    {
        "Qwen3MoeForCausalLM": Defaults(
            fields=_QWEN
            | {
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "intermediate_size": 6144,
                "attention_bias": False,
            },
            expert_size_field="moe_intermediate_size",
            qk_norm="head",
            sliding_window_switch=True,
            dense_size_field="intermediate_size",
            bias_field="attention_bias",
            output_bias=True,
        ),
        "Qwen2MoeForCausalLM": Defaults(
            fields=_QWEN
            | {
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "intermediate_size": 5632,
                "shared_expert_intermediate_size": 5632,
                "qkv_bias": True,
            },
            expert_size_field="moe_intermediate_size",
            bias_field="qkv_bias",
            shared_expert=True,
            sliding_window_switch=True,
            dense_size_field="intermediate_size",
        ),
        "MixtralForCausalLM": Defaults(
            fields={
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096 * 32,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            expert_size_field="intermediate_size",
            norm_topk_prob=True,
        ),
        "OlmoeForCausalLM": Defaults(
            fields={
                "vocab_size": 50304,
                "hidden_size": 2048,
                "intermediate_size": 2048,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10_000.0,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "attention_bias": False,
                "eos_token_id": 50279,
            },
            expert_size_field="intermediate_size",
            qk_norm="full",
            bias_field="attention_bias",
            output_bias=True,
            free_head_dim=False,
        ),
    }
)
# No model comes near these; a file that goes beyond them lies, and whoever counts up to what it says never ends.
LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "vocab_size": 2**24,
        "hidden_size": 2**20,
        "intermediate_size": 2**24,
        "moe_intermediate_size": 2**24,
        "shared_expert_intermediate_size": 2**24,
        "num_hidden_layers": 2**12,
        "num_attention_heads": 2**16,
        "num_key_value_heads": 2**16,
        "head_dim": 2**16,
        "num_experts": 2**16,
        "num_experts_per_tok": 2**16,
        "decoder_sparse_step": 2**31,
        "max_position_embeddings": 2**28,
    }
)
MAX_EXPERTS_OF_ALL_LAYERS = 2**20
OF_MODEL_TYPE: Mapping[str, str] = MappingProxyType(
    {
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "olmoe": "OlmoeForCausalLM",
    }
)
DENSE_LAYER_FIELDS = ("mlp_only_layers", "decoder_sparse_step")
# Fields that change what is computed, each with the values under which they do not.
HARMLESS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "quantization_config": (None,),
        "compression_config": (None,),
        "clip_qkv": (None,),
        "hidden_act": ("silu", "swish"),
        "mlp_only_layers": (None, []),
        "decoder_sparse_step": (1,),
        "partial_rotary_factor": (None, 1.0),
        "attention_chunk_size": (None,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "mlp_bias": (None, False),
        "is_causal": (None, True),
        "is_encoder_decoder": (None, False),
        "add_cross_attention": (None, False),
        "per_layer_config": (None, {}),
        "routed_scaling_factor": (None, 1.0),
        "scoring_func": (None, "softmax"),
        "transformers_weights": (None,),
        "n_group": (None, 1),
    }
)
