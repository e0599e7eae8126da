"""Checkpoints loaded under placements with copies: every slot holds its expert, read once per rank that holds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.base.config import Config
from moe_serve.model.decoder import Decoder
from moe_serve.model.moe.experts import Experts
from moe_serve.worker.loading.loader import LoadingReport, load_weights
from tests.support.forward import empty_decoder
from tests.support.tiny_model import tiny_model

LAYERS, EXPERTS, RANKS = 2, 10, 4
ON_ONE_RANK = [[0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0]]
"""Thirteen slots of four ranks (ragged), with pairs, and four copies, that meet on a rank."""
RANK_OF_SLOT = [0] * 4 + [1] * 4 + [2] * 1 + [3] * 4


def options(redundant: int, **more: object) -> dict[str, object]:
    return {
        "data_parallel_size": RANKS,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": redundant},
        **more,
    }


def from_file(folder: Path) -> dict[str, object]:
    path = folder / "placement.json"
    document = {"num_ranks": RANKS, "physical_to_logical": ON_ONE_RANK, "rank_of_slot": RANK_OF_SLOT}
    path.write_text(json.dumps(document))
    return options(3, expert_placement_file=str(path))


@pytest.fixture(scope="module", params=[False, True], ids=["expert by expert", "fused"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, "qwen3_moe", fused=request.param)
    return made


def load(
    folder: Path, rank: int, values: dict[str, object], load_format: str = "auto"
) -> tuple[Decoder, LoadingReport]:
    decoder = empty_decoder(folder, rank, options=values)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))
    return decoder, load_weights(decoder, folder, load_format=load_format)


def check_slots(folder: Path, values: dict[str, object], load_format: str = "auto") -> list[list[list[int]]]:
    """Every slot of every rank holds what a single rank holds of its expert; the experts by rank and layer."""
    whole, _ = load(folder, 0, {}, load_format)
    held = []
    for rank in range(Config.from_flat(values).parallel.topology.ep):
        decoder, _ = load(folder, rank, values, load_format)
        assert not any(parameter.isnan().any() for parameter in decoder.parameters())
        held.append([decoder.partition.experts_of(layer) for layer in range(LAYERS)])
        for experts, all_experts, row in zip(decoder.moe_layers(), whole.moe_layers(), held[-1], strict=True):
            assert torch.equal(experts.experts.gate_up, all_experts.experts.gate_up[row])
            assert torch.equal(experts.experts.down, all_experts.experts.down[row])
    return held


@pytest.mark.parametrize("redundant", [1, 4, 14])
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_second_copies_are_filled_from_the_checkpoint(folder: Path, strategy: str, redundant: int) -> None:
    held = check_slots(folder, options(redundant, expert_placement_strategy=strategy))
    assert sum(len(layers[0]) for layers in held) == EXPERTS + redundant


def test_copies_that_meet_on_a_rank_are_all_filled(folder: Path) -> None:
    held = check_slots(folder, from_file(folder))
    assert held[0][0] == [0, 0, 1, 2]
    assert held[3][1] == [0, 0, 0, 0]


def test_an_expert_is_read_once_however_many_copies_a_rank_has(folder: Path) -> None:
    values = from_file(folder)
    read = [load(folder, rank, values)[1].bytes_read for rank in range(RANKS)]
    plain = [load(folder, rank, options(0))[1].bytes_read for rank in range(RANKS)]
    expert_bytes = 3 * 64 * 24 * 4
    # Different experts on rank 3: 7 8 9 in one layer, 0 in the other; without redundancy two in each.
    assert read[3] - plain[3] == (3 + 1 - 4) * expert_bytes
    assert read[0] - plain[0] == (3 + 4 - 6) * expert_bytes


def test_random_weights_are_the_same_in_every_copy(folder: Path) -> None:
    check_slots(folder, from_file(folder), load_format="dummy")


class Noting(Experts):
    """Notes, each time it is told that loading is over, whether every slot is filled."""

    def __init__(self, like: Experts) -> None:
        num_local, hidden, width = like.down.shape
        super().__init__(num_local, hidden, width, like.down.dtype, like.down.device)
        self.whole: list[bool] = []

    def finish_loading(self) -> None:
        self.whole.append(not any(parameter.isnan().any() for parameter in self.parameters()))


def test_experts_hear_once_that_loading_is_over_and_their_copies_are_filled_by_then(folder: Path) -> None:
    decoder = empty_decoder(folder, options=from_file(folder))
    notes = [Noting(moe.experts) for moe in decoder.moe_layers()]
    with torch.no_grad():
        for moe, noting in zip(decoder.moe_layers(), notes, strict=True):
            moe.experts = noting
            for parameter in noting.parameters():
                parameter.fill_(float("nan"))
    load_weights(decoder, folder)
    assert [noting.whole for noting in notes] == [[True]] * LAYERS
