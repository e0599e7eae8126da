"""Rows on their way: gaps among a row's experts filled for wires that know none."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.model.all2all.rows import fill_gaps, one_row_at_least


@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 9), st.integers(0, 10**6))
def test_gaps_become_experts_that_the_row_does_not_have_of_weight_zero(
    num_rows: int, top_k: int, more: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts = top_k + more
    ids_TK = torch.rand((num_rows, num_experts), generator=generator).argsort(dim=1)[:, :top_k].int()
    missing_TK = torch.rand((num_rows, top_k), generator=generator) < 0.5
    weights_TK = torch.rand((num_rows, top_k), generator=generator) + 1
    filled_TK, left_TK = fill_gaps(ids_TK.masked_fill(missing_TK, -1), weights_TK, num_experts)
    assert filled_TK.dtype == torch.int32
    assert torch.equal(filled_TK[~missing_TK], ids_TK[~missing_TK])
    assert torch.equal(left_TK, weights_TK.masked_fill(missing_TK, 0))
    assert not filled_TK.numel() or 0 <= int(filled_TK.min()) <= int(filled_TK.max()) < num_experts
    assert all(len(set(row)) == top_k for row in filled_TK.tolist())


def test_rows_without_any_expert_are_spread_over_all() -> None:
    filled_TK, _ = fill_gaps(torch.full((16, 2), -1), torch.ones((16, 2)), 8)
    assert torch.bincount(filled_TK.flatten(), minlength=8).tolist() == [4] * 8


def test_a_row_that_nobody_weighs_stands_in_where_there_is_none() -> None:
    nothing = torch.ones((0, 5)), torch.ones((0, 3), dtype=torch.int32), torch.ones((0, 3))
    x_TD, ids_TK, weights_TK = one_row_at_least(*nothing)
    assert (x_TD.tolist(), ids_TK.tolist(), weights_TK.tolist()) == ([[0.0] * 5], [[0, 1, 2]], [[0.0] * 3])
    assert ids_TK.dtype == torch.int32
    given_rows = torch.ones((2, 5)), torch.ones((2, 3)), torch.ones((2, 3))
    assert one_row_at_least(*given_rows) == given_rows
