"""Every all-to-all backend against a dense oracle: ragged counts, empty ranks, missing experts, one to four ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_serve.base.tables import ALL2ALL
from moe_serve.base.topology import split_range
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.model.all2all.base import All2All, Arrived, Batched, Placed, RankMajor, Sorted
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.model.all2all.shared_memory import SharedMemoryAllToAll
from moe_serve.model.moe.experts import Experts
from tests.support.arrived import compute
from tests.support.oracle import random_experts
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
E, D, F, K = 10, 12, 8, 3
MAX_ROWS = 9
PADDED = (2, 6, 0, 5)
"""What the ragged rows lack of the largest share."""


@dataclass(frozen=True)
class Case:
    """One exchange: rows each rank brings, how experts are placed (None: cut by width), what the ids are like."""

    name: str
    rows_by_rank: tuple[int, ...]
    strategy: str | None = "linear"
    ids: str = "random"
    dtype: torch.dtype = torch.float32


CASES = [
    Case("even rows", (4, 4, 4, 4)),
    Case("ragged rows", (5, 1, 7, 2), "round_robin"),
    Case("a rank without rows", (3, 0, 6, 0)),
    Case("rows on one rank only", (0, 0, 9, 0), "round_robin"),
    Case("no rows anywhere", (0, 0, 0, 0)),
    Case("missing experts", (4, 6, 1, 3), ids="some missing"),
    Case("rows without any expert", (4, 6, 0, 3), ids="none"),
    Case("all experts of a row on one rank", (4, 2, 5, 3), ids="neighbours"),
    Case("everybody wants the same expert", (6, 3, 2, 1), ids="same"),
    Case("experts cut by width", (5, 0, 7, 2), None),
    Case("experts cut by width, some missing", (2, 3, 4, 5), None, "some missing"),
    Case("bfloat16", (5, 1, 7, 2), dtype=torch.bfloat16),
]


def batch(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank's x (T, D), logical ids (T, K) and weights (T, K); every rank can make every other's."""
    rows = case.rows_by_rank[rank]
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn((rows, D), generator=generator).to(case.dtype)
    weights_TK = torch.rand((rows, K), generator=generator)
    ids_TK = torch.rand((rows, E), generator=generator).argsort(dim=1)[:, :K]
    if case.ids == "some missing":
        ids_TK = ids_TK.masked_fill(torch.rand((rows, K), generator=generator) < 0.4, -1)
    elif case.ids == "none":
        ids_TK = torch.full_like(ids_TK, -1)
    elif case.ids == "neighbours":
        ids_TK = (torch.zeros_like(ids_TK) + torch.arange(K)).contiguous()
    elif case.ids == "same":
        ids_TK[:, 0] = 7
        ids_TK[:, 1:] = torch.tensor([1, 2])
    return x_TD, ids_TK, weights_TK


def placement_of(case: Case, ranks: int) -> Placement | None:
    if case.strategy is None:
        return None
    return initial_placement(case.strategy, num_layers=1, num_experts=E, num_ranks=ranks)


def slots_of(placement: Placement | None, ids_TK: Tensor) -> Tensor:
    """Physical slots; a missing expert stays -1."""
    if placement is None:
        return ids_TK
    first_E = torch.from_numpy(placement.first_replica(0))
    return torch.where(ids_TK < 0, -1, first_E[ids_TK.clamp(min=0)])


def experts_of(case: Case, ranks: int, rank: int) -> Experts:
    """This rank's part of the oracle's experts."""
    dense, placement = random_experts(E, D, F, seed=1), placement_of(case, ranks)
    if placement is None:
        width = split_range(F, ranks, rank)
        part = slice(width.start, width.stop)
        gate, up = dense.gate_up.chunk(2, dim=1)
        gate_up, down = torch.cat([gate[:, part], up[:, part]], dim=1), dense.down[:, :, part]
    else:
        held = placement.logical_of(0, rank)
        gate_up, down = dense.gate_up[held], dense.down[held]
    experts = Experts(gate_up.shape[0], D, down.shape[2], case.dtype, CPU)
    experts.gate_up.copy_(gate_up)
    experts.down.copy_(down)
    return experts


def exchange(seat: Seat, size: int, backend: str, case: Case) -> Tensor:
    """One rank's way through dispatch, experts and combine."""
    placement = placement_of(case, size)
    layout = ExpertLayout(E, None) if placement is None else ExpertLayout(placement.num_physical, placement.offsets)
    all2all = backend_of(seat, size, backend, layout, str(case.dtype).removeprefix("torch."))
    x_TD, ids_TK, weights_TK = batch(case, seat.rank)
    slots_TK = slots_of(placement, ids_TK).to(all2all.id_dtype)
    experts = experts_of(case, size, seat.rank)
    arrived = all2all.dispatch(x_TD, slots_TK, weights_TK, case.rows_by_rank[:size]).wait()
    check_form(all2all, arrived, layout.num_local(seat.rank))
    out_TD: Tensor = all2all.combine(experts(arrived), arrived).wait()
    all2all.close()
    return out_TD


def backend_of(seat: Seat, size: int, backend: str, layout: ExpertLayout, dtype: str = "float32") -> All2All:
    shape = DispatchShape(max_rows=MAX_ROWS, num_ranks=size, hidden=D, top_k=K, dtype=dtype)
    return ALL2ALL.load(backend)(seat.group(size), layout, shape)  # type: ignore[operator, no-any-return]


def check_form(all2all: All2All, arrived: Arrived, num_local: int) -> None:
    """What arrives has the form that the class declares."""
    if isinstance(all2all, SharedMemoryAllToAll) and type(arrived) is not Placed:
        assert type(arrived) is RankMajor or all2all.num_spilled or arrived.rows.shape[0] == 0
    else:
        assert type(arrived) is all2all.arrives
    if isinstance(arrived, Sorted):
        assert arrived.rows.shape == (int(arrived.counts_e.sum()), D)
    if isinstance(arrived, Batched):
        assert arrived.rows.shape[::2] == (num_local, D)
        assert int(arrived.counts_e.max()) <= arrived.rows.shape[1]
    if isinstance(arrived, Sorted | Batched):
        assert len(arrived.counts_e) == num_local
        assert (arrived.weights is None) == (all2all.applies_weights == "combine")


def exchanges(seat: Seat, size: int, backend: str) -> list[Tensor]:
    return [exchange(seat, size, backend, case) for case in CASES]


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
@pytest.mark.parametrize("backend", list(ALL2ALL))
def test_a_backend_gives_what_a_dense_computation_gives(ranks: Ranks, backend: str, size: int) -> None:
    dense = random_experts(E, D, F, seed=1)
    answers = ranks.run(exchanges, size, backend, only=size)
    for rank, outputs in enumerate(answers):
        for case, out_TD in zip(CASES, outputs, strict=True):
            expected = dense(*batch(case, rank))
            assert out_TD.shape == expected.shape, case.name
            assert out_TD.dtype == case.dtype, case.name
            tolerance = 2e-6 if case.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(
                out_TD.double(),
                expected,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, name=case.name: f"{name}: {text}",
            )


@pytest.mark.parametrize("backend", list(ALL2ALL))
def test_a_backend_counts_the_rows_that_it_really_pads_and_no_others(ranks: Ranks, backend: str) -> None:
    padded = PADDED if backend == "torch_padded" else (0, 0, 0, 0)
    assert ranks.run(padding_of, 4, backend) == [[rows, 2 * rows] for rows in padded]


@pytest.mark.parametrize("backend", [name for name in ALL2ALL if ALL2ALL.load(name).exact])  # type: ignore[attr-defined]
def test_an_exact_backend_gives_the_same_bits_wherever_experts_live(ranks: Ranks, backend: str) -> None:
    for outputs in ranks.run(under_placements, 4, backend):
        for other in outputs[1:]:
            assert torch.equal(outputs[0], other)
