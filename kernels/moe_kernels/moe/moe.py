"""Rows through the experts they want and added up again, in one call: where rows and experts are on one rank."""

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
    (num_tokens, hidden), top_k = x_TD.shape, slots_TK.shape[1]
    num_local, width = down.shape[0], down.shape[2]
    assert x_TD.dtype == gate_up.dtype == down.dtype == torch.bfloat16
    assert weights_TK.dtype == torch.float32
    assert slots_TK.dtype in (torch.int32, torch.int64)
    assert gate_up.shape == (num_local, 2 * width, hidden)
    assert down.shape[1] == hidden
    assert slots_TK.shape == weights_TK.shape
    assert all(each.is_contiguous() for each in (slots_TK, weights_TK, gate_up, down))
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out = empty(num_tokens, hidden, dtype=torch.bfloat16)
    if num_tokens:
        num_pairs = num_tokens * top_k
        pairs = empty(num_pairs, dtype=torch.int64)
        counts = empty(num_local + 1, dtype=torch.int64)
        inner = empty(num_pairs, width, dtype=torch.bfloat16)
        terms = empty(num_pairs, hidden, dtype=torch.bfloat16)
        given = (x_TD.data_ptr(), slots_TK.data_ptr(), weights_TK.data_ptr(), gate_up.data_ptr(), down.data_ptr())
        sizes = (num_tokens, top_k, hidden, width, num_local, first_slot, x_TD.stride(0))
        scratch = (pairs.data_ptr(), counts.data_ptr(), inner.data_ptr(), terms.data_ptr())
        run(path, MOE, *given, out.data_ptr(), *sizes, int(slots_TK.dtype == torch.int64), *scratch)
    return out
