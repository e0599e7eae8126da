"""A table of shard layouts, each loaded as transformers loads it: number by number."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_serve.base.errors import CheckpointError
from moe_serve.base.model_config import load_model_config
from moe_serve.base.weight_files import INDEX, SINGLE
from moe_serve.worker.loading.loader import load_weights
from tests.support.forward import all_logits, empty_decoder
from tests.support.tiny_model import tiny_model

Shards = dict[str, dict[str, Tensor]]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Layout:
    """`edit` gets the tensors by file and the index's weight_map, and changes them."""

    name: str
    edit: Callable[[Shards, dict[str, str]], object]
    tied: bool = False


def _again(shards: Shards, where: dict[str, str]) -> None:
    shards[FIRST][NORM] = shards[SECOND][NORM].clone()


def _extra(shards: Shards, where: dict[str, str]) -> None:
    shards[FIRST]["model.layers.9.mlp.gate.weight"] = torch.ones(2, 2)


def _unnamed(shards: Shards, where: dict[str, str]) -> None:
    del where[NORM]


def _elsewhere(shards: Shards, where: dict[str, str]) -> None:
    where[NORM] = FIRST


def _absent(shards: Shards, where: dict[str, str]) -> None:
    where["model.layers.9.mlp.gate.weight"] = FIRST


def _in_a_folder(shards: Shards, where: dict[str, str]) -> None:
    shards["more/rest.safetensors"] = shards.pop(SECOND)
    where |= {name: "more/rest.safetensors" for name, file in where.items() if file == SECOND}


def _other_names(shards: Shards, where: dict[str, str]) -> None:
    shards["a.safetensors"] = shards.pop(SECOND)
    where |= {name: "a.safetensors" for name, file in where.items() if file == SECOND}


def _head_of_its_own(shards: Shards, where: dict[str, str]) -> None:
    shards[FIRST][HEAD] = shards[where[EMBEDDING]][EMBEDDING] * 2 - 1
    where[HEAD] = FIRST


def _head_again(shards: Shards, where: dict[str, str]) -> None:
    shards[FIRST][HEAD] = shards[where[EMBEDDING]][EMBEDDING].clone()
    where[HEAD] = FIRST


def _only_the_head(shards: Shards, where: dict[str, str]) -> None:
    file = where.pop(EMBEDDING)
    shards[file][HEAD] = shards[file].pop(EMBEDDING)
    where[HEAD] = file


def _single_too(shards: Shards, where: dict[str, str]) -> None:
    whole = {name: tensor.clone() for held in shards.values() for name, tensor in held.items()}
    shards[SINGLE] = whole | {NORM: whole[NORM] + 1}


def _other_types(shards: Shards, where: dict[str, str]) -> None:
    shards[SECOND] = {name: tensor.to(torch.bfloat16) for name, tensor in shards[SECOND].items()}


LAYOUTS = [
    Layout("as written", lambda shards, where: None),
    Layout("a tensor in two shards", _again),
    Layout("a tensor too many in a shard", _extra),
    Layout("a tensor that the index does not name", _unnamed),
    Layout("a tensor in another shard than the index says", _elsewhere),
    Layout("an index with a tensor that no shard holds", _absent),
    Layout("a shard in a folder", _in_a_folder),
    Layout("shards of other names", _other_names),
    Layout("a single file beside an index", _single_too),
    Layout("shards of other types", _other_types),
    Layout("tied, as written", lambda shards, where: None, tied=True),
    Layout("tied, with a head of its own", _head_of_its_own, tied=True),
    Layout("tied, with the head again", _head_again, tied=True),
    Layout("tied, with nothing but the head", _only_the_head, tied=True),
]


def write(folder: Path, edit: Callable[[Shards, dict[str, str]], object], *, tied: bool = False) -> Path:
    """Two shards: the layers' tensors in the first, the others in the second."""
    tiny_model(folder, "qwen3_moe", tie_word_embeddings=tied, num_hidden_layers=1, num_experts=4)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shards: Shards = {FIRST: {}, SECOND: {}}
    for name, tensor in tensors.items():
        shards[FIRST if ".layers." in name else SECOND][name] = tensor
    where = {name: file for file, held in shards.items() for name in held}
    edit(shards, where)
    for file, held in shards.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def logits(folder: Path) -> Tensor:
    decoder = empty_decoder(folder)
    load_weights(decoder, folder)
    return all_logits(decoder, [[[1, 5, 9, 3]]])[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_loaded_as_transformers_loads_it(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path, layout.edit, tied=layout.tied)
    auto: Any = AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path).train(False)
    with torch.inference_mode():
        expected = theirs(torch.tensor([[1, 5, 9, 3]])).logits[0]
    torch.testing.assert_close(logits(tmp_path), expected, atol=2e-5, rtol=1e-4)


def test_where_shards_differ_the_index_says_which_is_right(tmp_path: Path) -> None:
    def other_norm(shards: Shards, where: dict[str, str]) -> None:
        shards[FIRST][NORM] = shards[SECOND][NORM].clone()
        shards[SECOND][NORM] += 1
        where[NORM] = FIRST

    right = logits(write(tmp_path / "a", lambda shards, where: None))
    assert torch.equal(logits(write(tmp_path / "b", other_norm)), right)


def test_a_head_that_is_not_tied_after_all_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logits(write(tmp_path, _head_of_its_own, tied=True))
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text


def test_what_an_index_names_and_no_shard_holds_is_named_if_it_is_needed(tmp_path: Path) -> None:
    def lost(shards: Shards, where: dict[str, str]) -> None:
        del shards[SECOND][NORM]

    with pytest.raises(CheckpointError) as caught:
        logits(write(tmp_path, lost))
    assert "1 tensors are missing: model.norm.weight" in str(caught.value)
    assert "the index names some that no file holds: model.norm.weight" in str(caught.value)


def test_an_unexpected_tensor_that_the_index_names_is_refused(tmp_path: Path) -> None:
    def bias(shards: Shards, where: dict[str, str]) -> None:
        _extra(shards, where)
        where["model.layers.9.mlp.gate.weight"] = FIRST

    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.9"):
        logits(write(tmp_path, bias))


DTYPES: list[tuple[dict[str, object], dict[str, object], dict[str, torch.dtype]]] = [
    ({"dtype": "bfloat16"}, {}, {}),
    ({"torch_dtype": "float16"}, {}, {}),
    ({"dtype": "float32", "torch_dtype": "bfloat16"}, {}, {}),
    ({"dtype": "torch.bfloat16"}, {}, {}),
    ({}, {}, {}),
    ({}, {}, {"": torch.bfloat16}),
    ({}, {}, {"": torch.float16, "lm_head": torch.float32}),
    ({"dtype": None, "torch_dtype": None}, {}, {"": torch.bfloat16}),
    ({}, {"dtype": "float16"}, {"": torch.bfloat16}),
    ({}, {"total_size": 5}, {"": torch.bfloat16, "input_layernorm": torch.float32}),
]


@pytest.mark.parametrize(("given", "metadata", "stored"), DTYPES, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_auto_is_the_type_that_transformers_takes(
    given: dict[str, object], metadata: dict[str, object], stored: dict[str, torch.dtype], sharded: bool, tmp_path: Path
) -> None:
    tiny_model(tmp_path, "qwen3_moe", num_hidden_layers=1, num_experts=4)
    values = json.loads((tmp_path / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(values | given))
    tensors = load_file(tmp_path / SINGLE)
    for part, dtype in stored.items():
        tensors = {name: tensor.to(dtype) if part in name else tensor for name, tensor in tensors.items()}
    if sharded:
        (tmp_path / SINGLE).unlink()
        files = {name: FIRST if ".layers." in name else SECOND for name in tensors}
        for file in (FIRST, SECOND):
            held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            save_file(held, tmp_path / file, metadata={"format": "pt"})
        (tmp_path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": files}))
    else:
        save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    auto: Any = AutoModelForCausalLM
    if given.get("dtype") == "torch.bfloat16":
        assert load_model_config(tmp_path).dtype == "bfloat16"
        return
    theirs = auto.from_pretrained(tmp_path, dtype="auto")
    assert f"torch.{load_model_config(tmp_path).dtype}" == str(theirs.dtype)
