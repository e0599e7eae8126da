"""What the tokenizer classes of transformers that the supported architectures use assume where a folder is silent.

These classes build normalizer and pre-tokenizer anew, whatever tokenizer.json says. Here tokenizer.json is used as it
is, and a difference is said.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

_END = "<|endoftext|>"
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLASS_OF_MODEL = {
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "olmoe": "GPTNeoXTokenizer",
}
_DEFAULTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
        "GPTNeoXTokenizer": {
            "unk_token": _END,
            "bos_token": _END,
            "eos_token": _END,
            "pad_token": "<|padding|>",
        },
        "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    }
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PIPELINES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "Qwen2Tokenizer": {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _QWEN_PATTERN}, "behavior": "Isolated", "invert": False},
                    _BYTE_LEVEL | {"use_regex": False},
                ],
            },
        },
        "GPTNeoXTokenizer": {"normalizer": {"type": "NFC"}, "pre_tokenizer": _BYTE_LEVEL},
    }
)
log = logging.getLogger(__name__)


def default_tokens(config: Mapping[str, object], model: Mapping[str, object]) -> Mapping[str, str]:
    """Names and texts of special tokens; `config` is tokenizer_config.json, `model` config.json."""
    return _DEFAULTS.get(_class_name(config, model), {})


def warn_of_pipeline(
    core: tokenizers.Tokenizer, config: Mapping[str, object], model: Mapping[str, object], path: Path
) -> None:
    """Say where transformers would not use what `path` says, since a model can have been trained with either."""
    name = _class_name(config, model)
    if name not in _PIPELINES:
        return
    there = {"normalizer": core.normalizer, "pre_tokenizer": core.pre_tokenizer}
    different = [part for part, wanted in _PIPELINES[name].items() if _built(there[part]) != wanted]
    if different:
        log.warning(
            "%s has its own %s, which is used; transformers 5 would use that of %s, and can cut texts otherwise",
            path,
            " and ".join(different),
            name,
        )


def _class_name(config: Mapping[str, object], model: Mapping[str, object]) -> str:
    """The class that transformers takes; "" for one that takes everything from tokenizer.json."""
    model_type = str(model.get("model_type", ""))
    if model_type == "mixtral":
        return ""
    given = config.get("tokenizer_class") or model.get("tokenizer_class") or _CLASS_OF_MODEL.get(model_type, "")
    return str(given).removesuffix("Fast")


def _built(part: Any) -> Any:
    return None if part is None else _bare(json.loads(part.__getstate__()))


def _bare(part: Any) -> Any:
    """Without what only concerns offsets."""
    if isinstance(part, dict):
        return {name: _bare(value) for name, value in part.items() if name != "trim_offsets"}
    return [_bare(each) for each in part] if isinstance(part, list) else part
