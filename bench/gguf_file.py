"""A qwen3_moe checkpoint in bfloat16 as a GGUF file with the same weights: `python gguf_file.py CHECKPOINT FILE`.

For bench.peers, in an interpreter that has the packages gguf and numpy. The file has no tokenizer: prompts are token
ids. As in files of llama.cpp's own converter, norms and routers are float32 and an expert matrix is one tensor a layer.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
FLOAT32 = re.compile(r"norm\.weight$|\.mlp\.gate\.weight$")


class Stored(NamedTuple):
    """A tensor of the new file by its name in the checkpoint; `load` gives bits of bfloat16 (uint16), or float32."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]


def main() -> None:
    checkpoint, path = map(Path, sys.argv[1:])
    write(checkpoint, path)


def read(checkpoint: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint as bits of bfloat16 (uint16), mapped from its files. Raises ValueError."""
    found: dict[str, Array] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        body = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] != "BF16":
                raise ValueError(f"{path.name}: {name} is {about['dtype']}, not BF16")
            begin, end = about["data_offsets"]
            found[name] = body[begin:end].view(np.uint16).reshape(about["shape"])
    return found


def stored(tensors: dict[str, Array]) -> Iterator[Stored]:
    """What the new file holds: experts of a layer stacked in their order, norms and routers widened."""
    experts: dict[str, dict[int, Array]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            before, number, matrix = match.groups()
            experts.setdefault(f"{before}.{matrix}", {})[int(number)] = tensor
        elif FLOAT32.search(name):
            yield Stored(name, tensor.shape, np.dtype(np.float32), lambda tensor=tensor: widened(tensor))
        else:
            yield Stored(name, tensor.shape, tensor.dtype, lambda tensor=tensor: np.ascontiguousarray(tensor))
    for name, by_number in experts.items():
        stack = [by_number[number] for number in range(len(by_number))]
        shape = (len(stack), *stack[0].shape)
        yield Stored(name, shape, stack[0].dtype, lambda stack=stack: np.stack(stack))


def widened(bits: Array) -> Array:
    """float32 of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(checkpoint: Path, path: Path) -> None:
    """Raises ValueError for a checkpoint of another kind."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3_moe" or not config["norm_topk_prob"]:
        raise ValueError(f"{checkpoint} is no qwen3_moe checkpoint whose top-k weights add up to one")
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    writer.add_block_count(layers)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    names, tensors = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, layers), list(stored(read(checkpoint)))
    for each in tensors:
        size = int(np.prod(each.shape)) * each.dtype.itemsize
        kind = gguf.GGMLQuantizationType.BF16 if each.dtype == np.uint16 else None
        writer.add_tensor_info(gguf_name(names, each.name), each.shape, each.dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(each.load())
    writer.close()


def rope_theta(config: dict[str, Any]) -> float:
    """Where transformers 5 writes it, or where everybody else does."""
    return float((config.get("rope_parameters") or config)["rope_theta"])


def gguf_name(names: Any, name: str) -> str:
    known = names.get_name(name, try_suffixes=(".weight",))
    if known is None:
        raise ValueError(f"llama.cpp has no name for {name}")
    return str(known)


if __name__ == "__main__":
    main()
