"""Rows through the experts they want, read where they lie, and what comes out where it is awaited: added up, or not."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import MOE, empty, run


def moe(
    path: str, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, *, first_slot: int = 0
) -> Tensor:
    """(T, D) bfloat16: each row's terms of its K slots' experts, weighted and added in float32 in the order of k.

    `slots_TK` int32 or int64, contiguous: slot `first_slot` is the first expert here, a slot that is not here adds
    nothing. Otherwise sorting.sort_rows(), experts.experts() and combine.combine() one after the other, to the bit, and
    their contracts for what is given.
    """
    assert weights_TK.dtype == torch.float32
    assert slots_TK.shape == weights_TK.shape
    assert weights_TK.is_contiguous()
    out = empty(*x_TD.shape, dtype=torch.bfloat16)
    terms_TKD = empty(*slots_TK.shape, x_TD.shape[1], dtype=torch.bfloat16)
    _run(path, x_TD, slots_TK, gate_up, down, terms_TKD, first_slot, (weights_TK.data_ptr(), out.data_ptr()))
    return out


def moe_terms(
    path: str, x_TD: Tensor, slots_TK: Tensor, gate_up: Tensor, down: Tensor, terms_TKD: Tensor, *, first_slot: int = 0
) -> Tensor:
    """`terms_TKD` (T, K, D) bfloat16, contiguous: what row t's k-th slot's expert makes of the row is written there.

    Places of slots that are not here are left as they are. To the bit what experts.experts() gives, and as moe() in
    everything else.
    """
    assert terms_TKD.dtype == torch.bfloat16
    assert terms_TKD.shape == (*slots_TK.shape, x_TD.shape[1])
    assert terms_TKD.is_contiguous()
    _run(path, x_TD, slots_TK, gate_up, down, terms_TKD, first_slot, (0, 0))
    return terms_TKD


def _run(
    path: str,
    x_TD: Tensor,
    slots_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    terms_TKD: Tensor,
    first_slot: int,
    summed: tuple[int, int],
) -> None:
    """`summed`: addresses of the weights and of the sums, or zeros."""
    (num_tokens, hidden), top_k = x_TD.shape, slots_TK.shape[1]
    num_local, width = down.shape[0], down.shape[2]
    assert x_TD.dtype == gate_up.dtype == down.dtype == torch.bfloat16
    assert slots_TK.dtype in (torch.int32, torch.int64)
    assert slots_TK.shape[0] == num_tokens
    assert gate_up.shape == (num_local, 2 * width, hidden)
    assert down.shape[1] == hidden
    assert all(each.is_contiguous() for each in (slots_TK, gate_up, down))
    if not num_tokens:
        return
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    pairs = empty(num_tokens * top_k, dtype=torch.int64)
    counts = empty(num_local + 1, dtype=torch.int64)
    inner = empty(num_tokens * top_k, width, dtype=torch.bfloat16)
    given = (x_TD.data_ptr(), slots_TK.data_ptr(), summed[0], gate_up.data_ptr(), down.data_ptr(), summed[1])
    sizes = (num_tokens, top_k, hidden, width, num_local, first_slot, x_TD.stride(0))
    scratch = (pairs.data_ptr(), counts.data_ptr(), inner.data_ptr(), terms_TKD.data_ptr())
    run(path, MOE, *given, *sizes, int(slots_TK.dtype == torch.int64), *scratch)
