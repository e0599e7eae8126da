"""Weights from safetensors: every tensor accounted for, each rank's part in the right place, only its bytes read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError
from moe_serve.model.decoder import Decoder
from moe_serve.worker.loading.checkpoint import INDEX, SINGLE, Checkpoint
from moe_serve.worker.loading.loader import LoadingReport, load_weights
from tests.support.forward import empty_decoder
from tests.support.tiny_model import ARCHS, tiny_model

SHARD = "model-00001-of-00005.safetensors"
WORLDS: list[dict[str, object]] = [
    {},
    {"tensor_parallel_size": 2},
    {"data_parallel_size": 2, "enable_expert_parallel": True},
    {"tensor_parallel_size": 4, "enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
    {"data_parallel_size": 2, "tensor_parallel_size": 2},
]
MODELS: list[tuple[str, dict[str, object]]] = [
    *((arch, {}) for arch in ARCHS),
    ("qwen2_moe", {"mlp_only_layers": [1], "intermediate_size": 45, "num_hidden_layers": 3}),
]
NAMES = [*ARCHS, "qwen2_moe with a dense layer"]
Tensors = dict[str, Tensor]


def load(folder: Path, rank: int = 0, **options: object) -> tuple[Decoder, LoadingReport]:
    decoder = empty_decoder(folder, rank, options=options)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    return decoder, load_weights(decoder, folder)


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrite a single-file checkpoint's tensors."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def error_of(folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("options", WORLDS, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["expert by expert", "fused"])
@pytest.mark.parametrize(("arch", "fields"), MODELS, ids=NAMES)
def test_all_ranks_together_hold_every_number_and_nothing_is_left_unfilled(
    arch: str, fields: dict[str, object], fused: bool, options: dict[str, object], tmp_path: Path
) -> None:
    tiny_model(tmp_path, arch, fused=fused, **fields)
    names = set(load_file(tmp_path / SINGLE))
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused
    whole = load(tmp_path)[0].targets()
    topology = Config.from_flat(options).parallel.topology
    seen = {name: torch.zeros(view.numel(), dtype=torch.bool) for name, view in whole.items()}
    for rank in range(topology.world_size):
        decoder, _ = load(tmp_path, rank, **options)
        assert not any(parameter.isnan().any() for parameter in decoder.parameters())
        for name, view in decoder.targets().items():
            positions = torch.arange(whole[name].numel()).view(whole[name].shape)
            mine = part_of(decoder, name, positions)
            assert torch.equal(view.flatten(), whole[name].flatten()[mine.flatten()])
            seen[name][mine.flatten()] = True
    assert all(flags.all() for flags in seen.values())


def part_of(decoder: Decoder, name: str, whole: Tensor) -> Tensor:
    """The part of a whole weight this rank holds, said without the loader's rules."""
    partition = decoder.partition
    d = decoder.config.head_dim
    heads = slice(partition.heads.start * d, partition.heads.stop * d)
    kv_heads = slice(partition.kv_heads.start * d, partition.kv_heads.stop * d)
    width = partition.dense if ".dense." in name else partition.width
    if name in ("embedding.weight", "head.weight"):
        return whole[partition.vocab.start : partition.vocab.stop]
    if ".attention.o.weight" in name:
        return whole[:, heads]
    if ".experts." in name or ".dense." in name:
        rows = slice(width.start, width.stop)
        return whole[:, rows] if name.endswith("down") else whole[rows]
    if ".attention.q." in name or (".q_norm." in name and decoder.config.qk_norm == "full"):
        return whole[heads]
    if ".attention.k." in name or ".attention.v." in name or (".k_norm." in name and decoder.config.qk_norm == "full"):
        return whole[kv_heads]
    return whole


def test_a_rank_reads_only_the_bytes_it_holds(tmp_path: Path) -> None:
    """In float32 and with 2 KV heads on 4 ranks: what a rank reads is what its parameters take."""
    tiny_model(tmp_path, "qwen2_moe")
    total = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / SINGLE).values())
    expert_bytes = sum(
        tensor.numel() * 4 for name, tensor in load_file(tmp_path / SINGLE).items() if ".mlp.experts." in name
    )
    for options in WORLDS:
        world = Config.from_flat(options).parallel.topology.world_size
        loads = [load(tmp_path, rank, **options) for rank in range(world)]
        for decoder, report in loads:
            assert report.bytes_read == decoder.weight_bytes()
            assert report.bytes_total == total
        experts = sum(
            view.numel() * 4 for decoder, _ in loads for name, view in decoder.targets().items() if ".experts." in name
        )
        assert experts == expert_bytes, "between them the ranks hold each expert once"
    assert report.bytes_read < 0.45 * total


@pytest.mark.parametrize("fused", [False, True], ids=["expert by expert", "fused"])
def test_the_share_of_experts_read_is_the_share_held(fused: bool, tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral", fused=fused)
    one_expert = 3 * 64 * 24 * 4 * 2  # gate, up and down of both layers
    for strategy in ("linear", "round_robin"):
        options = {"data_parallel_size": 4, "enable_expert_parallel": True, "expert_placement_strategy": strategy}
        read = [load(tmp_path, rank, **options)[1].bytes_read for rank in range(4)]
        rest = load(tmp_path)[1].bytes_read - 10 * one_expert
        assert [(part - rest) / one_expert for part in read] == [3, 3, 2, 2]


@pytest.mark.parametrize("fused", [False, True], ids=["expert by expert", "fused"])
def test_a_sharded_checkpoint_gives_the_same_weights_as_a_single_file(fused: bool, tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    tiny_model(single, "qwen3_moe", fused=fused)
    tiny_model(sharded, "qwen3_moe", fused=fused, max_shard_size="150KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ours, theirs = load(sharded)[0].targets(), load(single)[0].targets()
    assert ours.keys() == theirs.keys()
    for name, view in ours.items():
        assert torch.equal(view, theirs[name])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_from_the_type_they_are_stored_in(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(tmp_path, "mixtral")
    original = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    change(tmp_path, lambda tensors: tensors.update({name: one.to(stored) for name, one in tensors.items()}))
    decoder = empty_decoder(tmp_path, dtype=wanted)
    report = load_weights(decoder, tmp_path)
    assert torch.equal(decoder.embedding.weight, original.to(stored).to(wanted))
    assert report.bytes_read == report.bytes_total
    for name, view in decoder.targets().items():
        assert view.dtype == (torch.float32 if name.endswith("router.weight") else wanted)


@pytest.mark.parametrize("options", [{}, WORLDS[3]], ids=["one rank", "four ranks"])
def test_a_missing_tensor_is_named(options: dict[str, object], tmp_path: Path) -> None:
    """Also on a rank that does not hold it."""
    tiny_model(tmp_path, "qwen3_moe")
    gone = ["model.layers.1.self_attn.k_norm.weight", "model.layers.0.mlp.experts.3.up_proj.weight"]
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in gone])
    message = error_of(tmp_path, **options)
    assert "2 tensors are missing" in message
    assert all(name in message for name in gone)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen3_moe")
    added = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(96),
        "model.layers.2.input_layernorm.weight": torch.ones(64),
    }
    change(tmp_path, lambda tensors: tensors.update(added))
    message = error_of(tmp_path)
    assert "2 tensors are unexpected" in message
    assert all(name in message for name in added)


def test_many_missing_tensors_are_counted_not_all_listed(tmp_path: Path) -> None:
    tiny_model(tmp_path, "olmoe")
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    message = error_of(tmp_path)
    assert "60 tensors are missing" in message
    assert "and 52 more" in message


def test_a_tensor_that_carries_no_weights_is_ignored(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral")
    change(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (130, 64)),
        ("model.norm.weight", (64, 1)),
        ("model.layers.1.self_attn.o_proj.weight", (64, 95)),
        ("model.layers.1.mlp.experts.9.down_proj.weight", (24, 64)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen3_moe")
    right = list(load_file(tmp_path / SINGLE)[name].shape)
    change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    message = error_of(tmp_path, data_parallel_size=4, enable_expert_parallel=True)
    assert name in message
    assert str(list(shape)) in message
    assert str(right) in message


def test_fused_experts_of_another_number_or_layout_are_misshapen(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen3_moe", fused=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}))
    assert f"{name} has shape [10, 64, 48], but config.json asks for [10, 48, 64]" in error_of(tmp_path)


def test_a_type_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral")
    name = "model.layers.0.self_attn.q_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    message = error_of(tmp_path)
    assert name in message
    assert "F8_E4M3" in message


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral")
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is truncated or not a safetensors file" in error_of(tmp_path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    save_file({"a": torch.randn(4, 4), "b.c": torch.randn(3).bfloat16(), "empty": torch.zeros(0, 2)}, folder / SINGLE)
    return folder


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 230), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_corrupt_file_is_an_error_that_names_it_or_still_readable(
    small_file: Path, damage: list[tuple[int, int]]
) -> None:
    good = (small_file / SINGLE).read_bytes()
    data = bytearray(good)
    for position, value in damage:
        data[position % len(data)] = value
    folder = small_file / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(data)
    complaint = str(folder / SINGLE)
    try:
        with Checkpoint(folder) as checkpoint:
            for name, stored in checkpoint.tensors.items():
                assert checkpoint.read(name, [range(size) for size in stored.shape]).shape == stored.shape
    except CheckpointError as error:
        complaint = str(error)
    assert str(folder / SINGLE) in complaint


def sharded(folder: Path) -> Path:
    tiny_model(folder, "mixtral", max_shard_size="150KB")
    return folder / INDEX


def test_an_index_that_names_an_absent_file_names_it(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SHARD).unlink()
    assert SHARD in error_of(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / SHARD
    path.write_bytes(path.read_bytes()[:-10])
    assert str(path) in error_of(tmp_path)


def test_an_index_that_reaches_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    index = sharded(folder)
    (folder / SHARD).rename(tmp_path / SHARD)
    values = json.loads(index.read_text())
    values["weight_map"] = {
        name: f"../{file}" if file == SHARD else file for name, file in values["weight_map"].items()
    }
    index.write_text(json.dumps(values))
    assert f"../{SHARD}" in error_of(folder)


@pytest.mark.parametrize(("now", "wrong", "unexpected"), [([0], 1, 3), ([1], 0, 3), ([], 0, 6)])
def test_a_layer_that_is_dense_in_the_weights_must_be_so_in_the_config(
    now: list[int], wrong: int, unexpected: int, tmp_path: Path
) -> None:
    """Of three layers the first two are dense in the weights."""
    tiny_model(tmp_path, "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0, 1], intermediate_size=45)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_only_layers": now}))
    message = error_of(tmp_path)
    assert f"tensors are missing: model.layers.{wrong}.mlp.experts.0." in message
    assert f"{unexpected} tensors are unexpected: model.layers.{wrong}.mlp.down_proj.weight" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    sharded(tmp_path).write_text(text)
    assert INDEX in error_of(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral")
    (tmp_path / SINGLE).unlink()
    message = error_of(tmp_path)
    assert SINGLE in message
    assert INDEX in message
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "convert" in error_of(tmp_path)


@pytest.mark.parametrize(("arch", "fields"), MODELS, ids=NAMES)
def test_random_weights_are_parts_of_one_model_however_it_is_cut(
    arch: str, fields: dict[str, object], tmp_path: Path
) -> None:
    tiny_model(tmp_path, arch, **fields)
    (tmp_path / SINGLE).unlink()

    def dummy(rank: int = 0, **options: object) -> Decoder:
        decoder = empty_decoder(tmp_path, rank, options=options)
        assert load_weights(decoder, tmp_path, load_format="dummy").bytes_read == 0
        return decoder

    whole = dummy().targets()
    for options in WORLDS[1:]:
        for rank in range(Config.from_flat(options).parallel.topology.world_size):
            decoder = dummy(rank, **options)
            for name, view in decoder.targets().items():
                assert torch.equal(view.flatten(), part_of(decoder, name, whole[name]).flatten())


def test_random_weights_do_not_repeat_and_are_finite(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen2_moe")
    decoder = empty_decoder(tmp_path)
    load_weights(decoder, tmp_path, load_format="dummy")
    sums = [round(view.double().sum().item(), 9) for view in decoder.targets().values()]
    assert all(map(math.isfinite, sums))
    assert len(set(sums)) == len(sums)
