"""Exchanges that every all-to-all backend must make right: ragged counts, empty ranks, missing experts; the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_serve.base.tables import ALL2ALL
from moe_serve.base.topology import split_range
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.model.all2all.base import All2All, Arrived, Batched, Placed, RankMajor, Sorted
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.model.all2all.shared_memory import SharedMemoryAllToAll
from moe_serve.model.moe.experts import Experts
from tests.support.oracle import random_experts
from tests.support.ranks import Seat

CPU = torch.device("cpu")
E, D, F, K = 10, 12, 8, 3
MAX_ROWS = 9


@dataclass(frozen=True)
class Case:
    """One exchange: rows each rank brings, how experts are placed (None: cut by width), what the ids are like."""

    name: str
    rows_by_rank: tuple[int, ...]
    strategy: str | None = "linear"
    ids: str = "random"
    dtype: torch.dtype = torch.float32
    num_experts: int = E


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
    ids_TK = torch.rand((rows, case.num_experts), generator=generator).argsort(dim=1)[:, :K]
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
    return initial_placement(case.strategy, num_layers=1, num_experts=case.num_experts, num_ranks=ranks)


def slots_of(placement: Placement | None, ids_TK: Tensor) -> Tensor:
    """Physical slots; a missing expert stays -1."""
    if placement is None:
        return ids_TK
    first_E = torch.from_numpy(placement.first_replica(0))
    return torch.where(ids_TK < 0, -1, first_E[ids_TK.clamp(min=0)])


def experts_of(case: Case, ranks: int, rank: int) -> Experts:
    """This rank's part of the oracle's experts."""
    dense, placement = random_experts(case.num_experts, D, F, seed=1), placement_of(case, ranks)
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
    layout = ExpertLayout(case.num_experts, None)
    if placement is not None:
        layout = ExpertLayout(placement.num_physical, placement.offsets)
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


def exchanges(seat: Seat, size: int, backend: str, cases: Sequence[Case] = CASES) -> list[Tensor]:
    return [exchange(seat, size, backend, case) for case in cases]


def compare(answers: Sequence[Sequence[Tensor]], cases: Sequence[Case]) -> None:
    """Every rank's outputs of all cases with what a dense computation gives."""
    for rank, outputs in enumerate(answers):
        for case, out_TD in zip(cases, outputs, strict=True):
            expected = random_experts(case.num_experts, D, F, seed=1)(*batch(case, rank))
            assert out_TD.shape == expected.shape, case.name
            assert out_TD.dtype == case.dtype, case.name
            tolerance = 2e-6 if case.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(
                out_TD.double(),
                expected,
                atol=tolerance,
                rtol=tolerance,
                msg=partial("{}: {}".format, case.name),
            )
