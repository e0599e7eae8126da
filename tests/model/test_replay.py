"""Recorded decode steps: the bits of steps that run operation by operation, for as long as what is recorded fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from moe_kernels.paths import available
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.base.progress import Phase, Progress
from moe_serve.model.context import ForwardContext
from moe_serve.model.replay import MAX_ROWS, ReplayedDecoder
from tests.support.forward import all_logits, alone, load_decoder
from tests.support.ranks import Ranks, Seat
from tests.support.tiny_model import ARCHS, tiny_model

SIZES = {"expert_size": 32, "hidden_size": 64, "vocab_size": 144}
PROMPTS = [[5, 9, 2, 77, 31, 8, 100, 3, 64, 12, 7], [101, 4], list(range(3, 70)), [9]]
PATH = available()[0]


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_replayed_steps_have_the_same_bits(tmp_path: Path, arch: str, path: str) -> None:
    """Four rows, then fewer and fewer; the longest prompt outgrows the blocks there was room for several times."""
    tiny_model(tmp_path, arch, seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=path)
    replayed = ReplayedDecoder(decoder)
    expected = all_logits(decoder, [PROMPTS], chunk=1)
    got = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    steps = max(map(len, PROMPTS))
    assert steps - 12 <= replayed.num_replayed < steps - 3
    before = replayed.num_replayed  # another cache at other addresses
    again = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert replayed.num_replayed > before


@torch.inference_mode()
def test_steps_of_several_tokens_and_of_many_rows_run_as_ever(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral", seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=PATH)
    replayed = ReplayedDecoder(decoder)
    for prompts, chunk in (([[5, 9, 2, 77], [4, 3]], 2), ([[7, 9]] * (MAX_ROWS + 1), 1)):
        expected = all_logits(decoder, [prompts], chunk=chunk)
        got = all_logits(decoder, [prompts], chunk=chunk, forward=replayed.forward)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert replayed.num_replayed == 0


class Watched(Progress):
    """Remembers the phases it hears of, each with its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[tuple[Phase, int]] = []

    def enter(self, phase: Phase, *, step: int | None = None, layer: int | None = None) -> None:
        super().enter(phase, step=step, layer=layer)
        self.entered.append((phase, self.layer))


@torch.inference_mode()
@pytest.mark.parametrize("placed", [False, True])  # placed experts' rows go the way they go between ranks
def test_who_hangs_in_a_replayed_step_is_said_to_hang_in_the_right_place(tmp_path: Path, placed: bool) -> None:
    tiny_model(tmp_path, "mixtral", seed=3, **SIZES)
    options: dict[str, object] = {"enable_expert_parallel": placed}
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, options=options, path=PATH)
    replayed, told = ReplayedDecoder(decoder), []
    for forward in (decoder, replayed.forward):
        told.append(Watched())
        watch = partial(watched_forward, forward, told[-1])
        all_logits(decoder, [PROMPTS], chunk=1, forward=watch)
    assert replayed.num_replayed > 0
    assert told[0].entered == told[1].entered
    assert len({layer for _, layer in told[0].entered}) > 1


def watched_forward(
    forward: Callable[[Tensor, ForwardContext], Tensor], told: Watched, ids_T: Tensor, ctx: ForwardContext
) -> Tensor:
    return forward(ids_T, replace(ctx, progress=told))


@torch.inference_mode()
def test_in_torch_nothing_is_replayed(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral", seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16)
    replayed = ReplayedDecoder(decoder)
    all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    assert replayed.num_replayed == 0


@torch.inference_mode()
def test_a_model_with_an_operation_of_torchs_own_is_right_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a layer might be written one day."""
    tiny_model(tmp_path, "mixtral", seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=PATH)
    router = decoder.moe_layers()[1].router
    forward = router.forward
    monkeypatch.setattr(router, "forward", lambda x_TD: forward(-x_TD))
    replayed = ReplayedDecoder(decoder)
    with caplog.at_level(logging.INFO, "moe_serve.model.replay"):
        got = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    expected = all_logits(decoder, [PROMPTS], chunk=1)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert replayed.num_replayed == 0
    told = [record.message for record in caplog.records if record.name == "moe_serve.model.replay"]
    assert told == ["steps are not replayed: between its operations this model needs aten.neg.default"]


def compare_on_rank(seat: Seat, folder: Path, prompts: list[list[list[int]]], options: dict[str, object]) -> int:
    """Runs on a rank: how many steps were replayed, with the logits of steps that were not."""
    topology = Config.from_flat(options).parallel.topology
    decoder = load_decoder(
        folder, seat.groups(topology), seat.rank, dtype=torch.bfloat16, options=options, path=available()[0]
    )
    replayed = ReplayedDecoder(decoder)
    with torch.inference_mode():
        expected = all_logits(decoder, prompts, chunk=1, topology=topology, rank=seat.rank)
        got = all_logits(decoder, prompts, chunk=1, topology=topology, rank=seat.rank, forward=replayed.forward)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    return replayed.num_replayed


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "options",
    [
        {"data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "shm"},
        {"data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "torch_a2a"},
        {"data_parallel_size": 2, "all2all_backend": "allgather_reducescatter"},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "shm"},
    ],
    ids=["shm", "torch_a2a", "cut by width", "tp"],
)
def test_exchanges_stand_between_what_is_replayed(
    tmp_path: Path, ranks: Ranks, arch: str, options: dict[str, object]
) -> None:
    """The engines have other numbers of rows in each step, one of them none in the end."""
    tiny_model(tmp_path, arch, seed=3, **SIZES)
    prompts = [PROMPTS, [[9, 8, 7, 6, 5, 4, 3, 2, 1] * 2, [4, 4]]]
    if options.get("tensor_parallel_size"):
        prompts = [PROMPTS]
    counts = ranks.run(compare_on_rank, tmp_path, prompts, options, only=2)
    assert all(count > 5 for count in counts)
