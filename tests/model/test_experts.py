"""Experts compute the same whatever form their rows arrive in, and apply the weights where these came along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_serve.model.all2all.base import Batched, Placed, RankMajor, Sorted
from moe_serve.model.moe.experts import Experts
from tests.support.oracle import random_experts

E, D, F, K = 5, 16, 8, 3
COUNTS = [3, 0, 4, 1, 2]
"""Rows of each expert; one has none."""


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def experts(request: pytest.FixtureRequest) -> Experts:
    dense = random_experts(E, D, F, seed=2)
    made = Experts(E, D, F, request.param, torch.device("cpu"))
    made.gate_up.copy_(dense.gate_up)
    made.down.copy_(dense.down)
    return made


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 2e-6 if found.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
def test_batched_rows_give_what_sorted_rows_give_whatever_lies_behind_them(experts: Experts, weighted: bool) -> None:
    rows = normal(sum(COUNTS), D, dtype=experts.gate_up.dtype)
    weights = normal(sum(COUNTS)) if weighted else None
    batched = torch.full((E, 6, D), torch.nan, dtype=rows.dtype)
    weights_eC = torch.full((E, 6), torch.nan)
    places = [(expert, place) for expert, count in enumerate(COUNTS) for place in range(count)]
    for number, place in enumerate(places):
        batched[place] = rows[number]
        weights_eC[place] = 1.0 if weights is None else weights[number]
    counts_e = torch.tensor(COUNTS)
    one = experts(Sorted(rows, counts_e, None, weights))
    other = experts(Batched(batched, counts_e, None, None if weights is None else weights_eC))
    ids_RK = torch.tensor([[expert] for expert, _ in places])
    weights_RK = torch.ones((len(rows), 1)) if weights is None else weights[:, None]
    expected = random_experts(E, D, F, seed=2)(rows, ids_RK, weights_RK)
    close(one, expected)
    close(torch.stack([other[place] for place in places]), expected)


def test_rows_in_the_order_of_ranks_come_back_weighted_and_added_up(experts: Experts) -> None:
    rows, weights_RK = normal(7, D, dtype=experts.gate_up.dtype), normal(7, K)
    chance = torch.Generator().manual_seed(3)
    ids_RK = torch.rand((7, E), generator=chance).argsort(dim=1)[:, :K]
    ids_RK = ids_RK.masked_fill(torch.rand((7, K), generator=chance) < 0.4, -1)
    close(experts(RankMajor(rows, ids_RK, weights_RK, None)), random_experts(E, D, F, seed=2)(rows, ids_RK, weights_RK))


def test_rows_that_stay_where_they_are_leave_their_terms_where_they_are_awaited(experts: Experts) -> None:
    """Experts 0 and 1 are another rank's, as are some of those behind ours."""
    rows = normal(7, D, dtype=experts.gate_up.dtype)
    chance = torch.Generator().manual_seed(3)
    slots_AK = torch.rand((7, E + 4), generator=chance).argsort(dim=1)[:, :K].to(torch.int32)
    terms = torch.full((7, K, D), 7.0, dtype=rows.dtype)
    assert experts(Placed(rows, slots_AK, 2, terms, None)) is terms
    oracle, one = random_experts(E, D, F, seed=2), torch.ones((1, 1))
    for row, slots in enumerate(slots_AK.tolist()):
        for k, slot in enumerate(slots):
            if 2 <= slot < 2 + E:
                close(terms[row, k], oracle(rows[row : row + 1], torch.tensor([[slot - 2]]), one)[0])
            else:
                assert bool((terms[row, k] == 7.0).all())


def test_no_rows_at_all(experts: Experts) -> None:
    nothing, dtype = torch.zeros(E, dtype=torch.int64), experts.gate_up.dtype
    assert experts(Sorted(torch.empty((0, D), dtype=dtype), nothing, None)).shape == (0, D)
    assert experts(Batched(torch.empty((E, 0, D), dtype=dtype), nothing, None)).shape == (E, 0, D)
    none = RankMajor(
        torch.empty((0, D), dtype=dtype), torch.empty((0, K), dtype=torch.int64), torch.empty((0, K)), None
    )
    assert experts(none).shape == (0, D)
