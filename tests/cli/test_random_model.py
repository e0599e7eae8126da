"""make-model writes what transformers and we both read, the same again for the same seed, and refuses what it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import load_model_config
from moe_serve.cli.main import main
from moe_serve.cli.random_model import CLASSES, PRESETS, make_model
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.worker.loading.checkpoint import INDEX, SINGLE, Checkpoint
from tests.support.forward import all_logits, alone, load_decoder

FILES = {"config.json", SINGLE, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "[]"},
    {"role": "user", "content": "And a tuple?"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_the_files_of_a_model_folder(tiny: Path) -> None:
    assert {path.name for path in tiny.iterdir()} == FILES


def test_every_file_can_be_read_by_whom_the_folder_can(tiny: Path) -> None:
    assert len({path.stat().st_mode for path in tiny.iterdir()}) == 1


@pytest.mark.parametrize("arch", list(CLASSES))
def test_transformers_loads_it_without_a_missing_or_unexpected_tensor(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "tiny", arch, dtype="float32")
    auto: Any = AutoModelForCausalLM
    oracle, info = auto.from_pretrained(folder, output_loading_info=True)
    assert type(oracle).__name__ == CLASSES[arch]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = Tokenizer(folder).encode("class Stack(list):\n    def push(self, item):")
    with torch.inference_mode():
        theirs = oracle(torch.tensor([prompt])).logits[0]
    ours = all_logits(load_decoder(folder, alone()), [[prompt]])[0]
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max() / 10)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 14), ("small", 1240)])
def test_a_preset_has_the_size_it_is_known_by(preset: str, millions: int) -> None:
    sizes = PRESETS[preset]
    attention = 2 * sizes.hidden * (sizes.heads + sizes.kv_heads) * 64
    layer = attention + sizes.experts * sizes.hidden * (3 * sizes.width + 1)
    total = 2 * sizes.vocab * sizes.hidden + sizes.layers * layer
    assert total / 1e6 == pytest.approx(millions, rel=0.04)  # published in whole millions
    assert sizes.hidden // sizes.heads == 64


def test_the_tiny_preset_is_bfloat16_and_of_its_size(tiny: Path) -> None:
    config = load_model_config(tiny)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (256, 4, 4, 2)
    assert (config.num_experts, config.top_k, config.expert_size, config.vocab_size) == (32, 4, 128, 2048)
    assert config.router.norm_topk_prob
    assert config.dtype == "bfloat16"
    tensors = load_file(tiny / SINGLE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == pytest.approx(14e6, rel=0.04)


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(tiny: Path, tmp_path: Path) -> None:
    again = contents(make_model(tmp_path / "again", seed=0))
    assert again == contents(tiny)
    other = contents(make_model(tmp_path / "other", seed=1))
    assert {name for name in FILES if other[name] != again[name]} == {SINGLE}


def test_shards_hold_the_same_weights_as_one_file(tiny: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_shards=3)
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    with Checkpoint(folder) as many, Checkpoint(tiny) as one:
        assert many.tensors.keys() == one.tensors.keys()
    whole = load_file(tiny / SINGLE)
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, whole[name])


def test_transformers_and_we_read_the_same_tokenizer_and_chat_template(tiny: Path) -> None:
    ours, theirs = Tokenizer(tiny), AutoTokenizer.from_pretrained(tiny)
    text = "def f(x):\n    return x  # naïve 漢字 🦜"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert max(ours.encode(text)) < 2048
    assert ours.eos_token == theirs.eos_token == "<|im_end|>"
    rendered = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert rendered.endswith("<|im_start|>assistant\n")
    assert ours.render_chat(CHAT) == rendered


def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    ends = tokenizer.encode("<|im_end|><|endoftext|>")
    assert list(load_model_config(tiny).eos_token_ids) == ends
    assert len(ends) == 2


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty.*--force"):
        make_model(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_force_replaces_a_model_and_keeps_other_files(tiny: Path, tmp_path: Path) -> None:
    make_model(tmp_path, arch="olmoe", num_shards=2)
    (tmp_path / "notes.txt").write_text("mine")
    make_model(tmp_path, force=True)
    assert contents(tmp_path) == contents(tiny) | {"notes.txt": b"mine"}
    assert not (tmp_path / INDEX).exists()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made a model folder"):
        make_model(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be made a model folder"):
        make_model(tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; known are: tiny, small"),
        ({"arch": "llama"}, "unknown arch 'llama'; known are: qwen3_moe, qwen2_moe, mixtral, olmoe"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"num_shards": 0}, "num_shards must be at least 1"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        make_model(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_the_command_writes_a_model_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    assert main(["make-model", str(folder), "--preset", "tiny", "--arch", "mixtral", "--seed", "3"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert main(["make-model", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "is not empty" in message
    assert "Traceback" not in message
    assert main(["make-model", str(folder), "--force"]) == 0
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.parametrize("arguments", [[], ["--preset", "huge"], ["model", "--seed", "x"], ["model", "--size", "1"]])
def test_the_command_refuses_what_it_does_not_know(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["make-model", *arguments]) == 2
    assert capsys.readouterr().err.startswith("moe-serve: ")
    assert not list(tmp_path.iterdir())
