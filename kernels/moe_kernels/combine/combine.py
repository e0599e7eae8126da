"""What a token's experts gave, weighted and added."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import COMBINE, run


def combine(path: str, terms_RD: Tensor, pairs_R: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, D) bfloat16: for each token the sum of weight x term, in float32, in the order of k, rounded once.

    `terms_RD` bfloat16, contiguous; `pairs_R` (R,) int64, each t * K + k and none twice; `weights_TK` float32,
    contiguous. A pair without a term adds nothing. The order of the terms, hence where experts live, changes no bit.
    """
    (num_terms, hidden), (num_tokens, top_k) = terms_RD.shape, weights_TK.shape
    assert terms_RD.dtype == torch.bfloat16
    assert weights_TK.dtype == torch.float32
    assert pairs_R.dtype == torch.int64
    assert terms_RD.is_contiguous()
    assert weights_TK.is_contiguous()
    assert pairs_R.is_contiguous()
    out = torch.empty(num_tokens, hidden, dtype=terms_RD.dtype)
    place = torch.empty(num_tokens * top_k, dtype=torch.int32)
    if num_tokens:
        given = (terms_RD.data_ptr(), pairs_R.data_ptr(), weights_TK.data_ptr())
        run(path, COMBINE, *given, place.data_ptr(), out.data_ptr(), num_terms, num_tokens, top_k, hidden)
    return out
