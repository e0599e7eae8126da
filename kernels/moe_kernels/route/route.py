"""A router as a whole: scores, softmax, the K largest and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import ROUTE, empty, run


def route(
    path: str, x_TD: Tensor, weight_ED: Tensor, top_k: int, *, renormalise: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Ids (T, K) int64 of the experts that score highest, best first, of equal ones the lower, and weights (T, K).

    `x_TD` bfloat16, its rows contiguous; `weight_ED` float32, contiguous; 1 <= K <= E. Weights float32: the softmax
    over all E scores; with `renormalise` divided by their sum over the K; times `scale`. Scores as scores.scores()
    makes them, to the bit. A row that is not finite gets distinct ids and weights that are not finite. A row's bits
    depend on nothing but the row, the weight and the path.
    """
    (num_tokens, hidden), num_experts = x_TD.shape, weight_ED.shape[0]
    assert x_TD.dtype == torch.bfloat16
    assert weight_ED.dtype == torch.float32
    assert weight_ED.is_contiguous()
    assert weight_ED.shape[1] == hidden
    assert 1 <= top_k <= num_experts
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    ids = empty(num_tokens, top_k, dtype=torch.int64)
    weights = empty(num_tokens, top_k, dtype=torch.float32)
    if num_tokens:
        scratch = empty(num_tokens, num_experts, dtype=torch.float32)
        given = (x_TD.data_ptr(), weight_ED.data_ptr(), scratch.data_ptr(), ids.data_ptr(), weights.data_ptr())
        sizes = (num_tokens, num_experts, hidden, x_TD.stride(0), top_k)
        run(path, ROUTE, *given, *sizes, int(renormalise), float(scale))
    return ids, weights
