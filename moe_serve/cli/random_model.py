"""make_model: a small random-weight checkpoint in the Hugging Face layout, for trying, testing and measuring.

Its text means nothing, but every part of the way of a request is exercised: tokenizer, chat template, router, experts.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import DTYPES, ModelConfig, load_model_config
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.weight_files import INDEX, SINGLE
from moe_serve.model.archs.base import find_spec
from moe_serve.model.partition import make_partition
from moe_serve.worker.loading.loader import byte_progress, random_weight

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}


@dataclass(frozen=True, slots=True)
class Preset:
    """Sizes of a model; `width` of one expert."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    width: int
    vocab: int = 2048
    context: int = 4096


PRESETS = {
    "tiny": Preset(hidden=256, layers=4, heads=4, kv_heads=2, experts=32, top_k=4, width=128),
    "small": Preset(hidden=1024, layers=12, heads=16, kv_heads=4, experts=64, top_k=8, width=512),
}


def make_model(
    folder: Path | str,
    preset: Literal["tiny", "small"] = "tiny",
    arch: str = "qwen3_moe",
    seed: int = 0,
    dtype: str = "bfloat16",
    num_shards: int = 1,
    *,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Write a checkpoint into a folder and return it. `arch` may also be a Hugging Face class name.

    The folder must be empty or absent, unless `force`: then the model in it is replaced and other files stay.
    Same arguments, same weights. `show_progress` draws a bar if stderr is a terminal. Raises ConfigError.
    """
    _check_choice("preset", preset, tuple(PRESETS))
    _check_choice("dtype", dtype, DTYPES)
    arch = next((short for short, name in CLASSES.items() if name == arch), arch)
    _check_choice("arch", arch, tuple(CLASSES))
    if num_shards < 1:
        raise ConfigError(f"num_shards must be at least 1, not {num_shards}")
    folder = _prepare_folder(Path(folder).expanduser(), force=force)
    sizes = PRESETS[preset]
    tokenizer = _train_tokenizer(sizes.vocab)
    end_ids = [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(sizes))
        _write_json(folder / "generation_config.json", {"eos_token_id": end_ids, "pad_token_id": end_ids[1]})
        _write_json(folder / "config.json", _config(arch, sizes, dtype) | {"eos_token_id": end_ids[0]})
        _write_weights(folder, seed, getattr(torch, dtype), num_shards, show_progress=show_progress)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the model cannot be written to {folder}: {error}") from error
    return folder


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"unknown {name} {value!r}; known are: {', '.join(allowed)} (option --{name})")


def _prepare_folder(folder: Path, *, force: bool) -> Path:
    """Make the folder; with `force` remove the weights in it, which the new ones need not overwrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not force:
            raise ConfigError(f"{folder} is not empty; choose another folder, or --force to replace the model in it")
        for old in (*folder.glob("*.safetensors"), folder / INDEX):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made a model folder: {error}") from error
    return folder


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(arch: str, sizes: Preset, dtype: str) -> dict[str, object]:
    """config.json as the hub's own checkpoints have it."""
    values: dict[str, object] = {
        "architectures": [CLASSES[arch]],
        "model_type": arch,
        "torch_dtype": dtype,
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "num_experts_per_tok": sizes.top_k,
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
    }
    if arch == "mixtral":
        return values | {"num_local_experts": sizes.experts, "intermediate_size": sizes.width}
    values |= {"num_experts": sizes.experts, "norm_topk_prob": True}
    if arch == "olmoe":
        return values | {"intermediate_size": sizes.width, "pad_token_id": None}
    values |= {"moe_intermediate_size": sizes.width, "intermediate_size": 2 * sizes.width}
    if arch == "qwen2_moe":
        return values | {"shared_expert_intermediate_size": 2 * sizes.width}
    return values | {"head_dim": sizes.hidden // sizes.heads}


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE over Python's own help texts, which every installation has. Training is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return tokenizer


def _tokenizer_config(sizes: Preset) -> dict[str, object]:
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


def _write_weights(folder: Path, seed: int, dtype: torch.dtype, num_shards: int, *, show_progress: bool) -> None:
    """One file, or `num_shards` of about equal size with an index."""
    shapes = dict(_shapes(load_model_config(folder)))
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    number, done = 1, 0
    with byte_progress("Making weights", total, show=show_progress) as report_done:
        for name, shape in shapes.items():
            if done >= total * number / num_shards:
                _save(folder, shard, number, num_shards)
                number, shard = number + 1, {}
            shard[name] = random_weight(name, shape, generator).to(dtype)
            where[name] = _file_name(number, num_shards)
            done += shard[name].nbytes
            report_done(done)
        _save(folder, shard, number, num_shards)
    if num_shards > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, experts one by one."""
    whole = make_partition(config, ParallelConfig(), 0)
    for rule in find_spec(config).weights:
        for layer, expert in rule.places(config):
            yield rule.names[0].format(layer=layer, expert=expert), tuple(map(whole.size, rule.axes))


def _file_name(number: int, num_shards: int) -> str:
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else SINGLE


def _save(folder: Path, tensors: dict[str, Tensor], number: int, num_shards: int) -> None:
    path = folder / _file_name(number, num_shards)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read
