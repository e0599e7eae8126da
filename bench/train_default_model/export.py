"""The finished model in the Hugging Face layout, bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bench.train_default_model.model import Model, Sizes
from bench.train_default_model.tokens import END_OF_TEXT, TURN_END, TURN_START

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def export(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer into `folder`; files of the same names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in renamed(model).items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in (END_OF_TEXT, TURN_END)}
    _write(folder / "config.json", _config(model.sizes) | {"eos_token_id": ids[TURN_END]})
    ends = {"eos_token_id": [ids[TURN_END], ids[END_OF_TEXT]], "pad_token_id": ids[END_OF_TEXT]}
    _write(folder / "generation_config.json", ends | {"do_sample": True, "temperature": 0.7, "top_p": 0.95})
    _write(folder / "tokenizer_config.json", _tokenizer_config(model.sizes))


def renamed(model: Model) -> dict[str, Tensor]:
    """The checkpoint's names, with the experts one by one."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, last = f"model.{name}".rpartition(".")
        if last == "gate_up":
            for expert, (gate, up) in enumerate(value):
                tensors[f"{stem}.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.experts.{expert}.up_proj.weight"] = up
        elif last == "down":
            for expert, down in enumerate(value):
                tensors[f"{stem}.experts.{expert}.down_proj.weight"] = down
        elif last != "usage":
            tensors[f"model.{name}"] = value
    return tensors


def _config(sizes: Sizes) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": sizes.width * sizes.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }


def _tokenizer_config(sizes: Sizes) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": sizes.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_held_out(held: dict[str, dict[str, str]], folder: Path) -> None:
    """DOMAIN.txt: the held-out documents one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in held.items():
        (folder / f"{domain}.txt").write_text(
            "\n".join(documents[name] for name in sorted(documents)), encoding="utf-8"
        )


def _write(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
