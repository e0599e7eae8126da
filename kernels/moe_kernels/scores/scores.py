"""A row's product with few float32 columns: what a router scores experts by."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import SCORES, empty, run


def scores(path: str, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """(T, E) float32: `x_TD` bfloat16, its rows contiguous, times `weight_ED` float32, contiguous, as it comes.

    Products and sums in float32. A row's bits depend on nothing but the row, the weight and the path.
    """
    (num_tokens, hidden), num_experts = x_TD.shape, weight_ED.shape[0]
    assert x_TD.dtype == torch.bfloat16
    assert weight_ED.dtype == torch.float32
    assert weight_ED.is_contiguous()
    assert weight_ED.shape[1] == hidden
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out = empty(num_tokens, num_experts, dtype=torch.float32)
    if num_tokens:
        addresses = (x_TD.data_ptr(), weight_ED.data_ptr(), out.data_ptr())
        run(path, SCORES, *addresses, num_tokens, num_experts, hidden, x_TD.stride(0))
    return out
