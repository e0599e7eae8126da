"""Every all-to-all backend against a dense oracle: ragged counts, empty ranks, missing experts, one to four ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moe_serve.base.tables import ALL2ALL
from moe_serve.base.topology import split_range
from moe_serve.eplb.placement import Placement
from moe_serve.model.all2all.base import Batched
from moe_serve.model.all2all.limits import backends_for
from moe_serve.model.all2all.shape import ExpertLayout
from tests.support.arrived import compute
from tests.support.exchanges import CASES, E, backend_of, batch, compare, exchanges, slots_of
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
BUILT_IN = backends_for("cpu")
"""The others need libraries: tests/model/test_wires.py."""
PADDED = (2, 6, 0, 5)
"""What the ragged rows lack of the largest share."""


def scaled_sine(scale_e: Tensor, rows: Tensor, experts: Tensor) -> Tensor:
    return torch.sin(rows) * scale_e[experts]


def under_placements(seat: Seat, size: int, backend: str) -> list[Tensor]:
    """The same rows under several placements, with experts that give a row the same bits whoever computes it."""
    found = []
    for shift in range(3):
        row = torch.arange(E).roll(3 * shift).numpy()
        placement = Placement(row[None], (*(split_range(E, size, r).start for r in range(size)), E), E)
        all2all = backend_of(seat, size, backend, ExpertLayout(E, placement.offsets))
        x_TD, ids_TK, weights_TK = batch(CASES[1], seat.rank)
        slots_TK = slots_of(placement, ids_TK).to(all2all.id_dtype)
        arrived = all2all.dispatch(x_TD, slots_TK, weights_TK, CASES[1].rows_by_rank[:size]).wait()
        held = torch.from_numpy(placement.logical_of(0, seat.rank))
        outputs = compute(arrived, len(held), partial(scaled_sine, held + 0.7))
        found.append(all2all.combine(outputs, arrived).wait())
    return found


def padding_of(seat: Seat, size: int, backend: str) -> list[int]:
    """What the count says after each of two exchanges."""
    all2all = backend_of(seat, size, backend, ExpertLayout(E, None))
    x_TD, ids_TK, weights_TK = batch(CASES[1], seat.rank)
    said = []
    for _ in range(2):
        ids = ids_TK.to(all2all.id_dtype)
        arrived = all2all.dispatch(x_TD, ids, weights_TK, CASES[1].rows_by_rank[:size]).wait()
        said.append(all2all.padding_rows)
        if isinstance(arrived, Batched):
            assert arrived.rows.shape[1] == sum(CASES[1].rows_by_rank[:size]) + sum(PADDED)
    return said


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", BUILT_IN)
def test_a_backend_gives_what_a_dense_computation_gives(ranks: Ranks, backend: str, size: int) -> None:
    compare(ranks.run(exchanges, size, backend, only=size), CASES)


@pytest.mark.parametrize("backend", BUILT_IN)
def test_a_backend_counts_the_rows_that_it_really_pads_and_no_others(ranks: Ranks, backend: str) -> None:
    padded = PADDED if backend == "torch_padded" else (0, 0, 0, 0)
    assert ranks.run(padding_of, 4, backend) == [[rows, 2 * rows] for rows in padded]


@pytest.mark.parametrize("backend", [name for name in BUILT_IN if ALL2ALL.load(name).exact])  # type: ignore[attr-defined]
def test_an_exact_backend_gives_the_same_bits_wherever_experts_live(ranks: Ranks, backend: str) -> None:
    for outputs in ranks.run(under_placements, 4, backend):
        for other in outputs[1:]:
            assert torch.equal(outputs[0], other)
