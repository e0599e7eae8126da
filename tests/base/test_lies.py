"""A config.json that lies: one sentence that names the field, at once, before anybody counts up to what it says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moe_serve.base.architectures import ARCHITECTURES, LIMITS
from moe_serve.base.checkpoint_size import check_size, least_parameters
from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError, ConfigError
from moe_serve.base.fields import MAX_JSON_BYTES, read_object
from moe_serve.base.fingerprint import model_fingerprint
from moe_serve.base.model_config import load_model_config
from moe_serve.launch.resolve import resolve

SMALL: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 10,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
COUNTS = sorted(LIMITS)
NUMBERS = ("rms_norm_eps", "rope_theta")
WRONG = [
    "0",
    "-1",
    "-1000000000",
    "1.5",
    "1e999",
    '"8"',
    "true",
    "NaN",
    "Infinity",
    "[8]",
    "{}",
    "1" + "0" * 400,
    "1" + "0" * 5000,
]
DEEP = 200_000
SECONDS = 2.0


def folder_with(folder: Path, **literals: str) -> Path:
    """A model folder whose config.json has these JSON texts as values."""
    values = {name: json.dumps(value) for name, value in SMALL.items()} | literals
    text = ", ".join(f'"{name}": {value}' for name, value in values.items())
    (folder / "config.json").write_text("{" + text + "}")
    return folder


def refusal(folder: Path, word: str) -> str:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=word) as caught:
        load_model_config(folder)
    assert time.monotonic() - started < SECONDS
    message = str(caught.value)
    assert "config.json" in message
    assert len(message) < 400 + len(str(folder))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: value[:12])
def test_a_count_that_is_none_is_named(tmp_path: Path, field: str, value: str) -> None:
    refusal(folder_with(tmp_path, **{field: value}), "JSON" if len(value) > 4300 else field)


@pytest.mark.parametrize("field", [name for name in COUNTS if name != "decoder_sparse_step"])
def test_a_count_that_no_model_has_is_named(tmp_path: Path, field: str) -> None:
    for value in ("1000000000", str(LIMITS[field] + 1)):
        message = refusal(folder_with(tmp_path, **{field: value}), field)
        assert str(LIMITS[field]) in message or "must divide" in message or "head_dim" in message


def test_a_step_that_leaves_no_experts_is_named(tmp_path: Path) -> None:
    refusal(folder_with(tmp_path, decoder_sparse_step="1000000000"), "decoder_sparse_step")


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", '"8"', "true", "NaN", "Infinity", "1e999", "[8]", "1" + "0" * 400])
def test_a_number_that_is_none_is_named(tmp_path: Path, field: str, value: str) -> None:
    refusal(folder_with(tmp_path, **{field: value}), field)


def test_experts_are_bounded_over_all_layers(tmp_path: Path) -> None:
    refusal(folder_with(tmp_path, num_experts="65536", num_hidden_layers="4096"), "num_experts.*num_hidden_layers")


def test_a_long_list_of_dense_layers_is_read_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    model = load_model_config(
        folder_with(tmp_path, mlp_only_layers=str(list(range(1, 200_000))), num_hidden_layers="4096", num_experts="2")
    )
    assert model.moe_layers == (0,)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("deep", ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP])
def test_brackets_without_end_are_a_sentence(tmp_path: Path, file: str, deep: str) -> None:
    (folder_with(tmp_path) / file).write_text(f'{{"architectures": {deep}}}')
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read as JSON"):
        load_model_config(tmp_path)
    assert model_fingerprint(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["hidden_act", "rope_scaling", "quantization_config", "num_experts", "architectures", "dtype"]
)
def test_a_value_nested_as_deeply_as_can_be_read_is_a_sentence(tmp_path: Path, name: str) -> None:
    for depth in (100, 300, 900):
        refusal(folder_with(tmp_path, **{name: "[" * depth + "]" * depth}), "config")


def test_a_file_too_large_to_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"at most {MAX_JSON_BYTES}"):
        read_object(path)


def test_numbers_beyond_the_weight_files_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """Each number by itself is possible; the files beside them are the proof that they are not so."""
    model = load_model_config(folder_with(tmp_path))
    size = least_parameters(model) * 2
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    check_size(tmp_path, model)
    for field in ("num_experts", "num_hidden_layers", "vocab_size", "hidden_size", "moe_intermediate_size"):
        folder_with(tmp_path, **{field: str(min(LIMITS[field], 4000))})
        started = time.monotonic()
        with pytest.raises(ConfigError, match=rf"config\.json describes a model of at least .* have {size:,}"):
            resolve(Config.from_flat({"model": str(tmp_path)}))
        assert time.monotonic() - started < SECONDS


def test_a_link_to_nowhere_is_no_weight_file(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "model.safetensors").symlink_to(tmp_path / "gone")
    check_size(tmp_path, load_model_config(tmp_path))
    assert model_fingerprint(str(tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_least_number_of_parameters_is_that_of_the_weights_without_norms_and_biases(
    tmp_path: Path, architecture: str
) -> None:
    transformers = pytest.importorskip("transformers")
    values = SMALL | {"architectures": [architecture], "mlp_only_layers": [], "model_type": _MODEL_TYPES[architecture]}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_local_experts": 10, "tie_word_embeddings": True}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    small = ("norm", "bias", "shared_expert_gate")
    counted = sum(p.numel() for name, p in model.named_parameters() if not any(word in name for word in small))
    assert least_parameters(load_model_config(tmp_path)) == counted


_MODEL_TYPES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
}
