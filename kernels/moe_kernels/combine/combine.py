"""What a token's experts gave, weighted and added."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import COMBINE, empty, run


def combine(path: str, terms_RD: Tensor, pairs_R: Tensor | None, weights_TK: Tensor) -> Tensor:
    """(T, D) bfloat16: for each token the sum of weight x term, in float32, in the order of k, rounded once.

    `terms_RD` bfloat16, contiguous; `pairs_R` (R,) int64, each t * K + k and none twice, or None where all T * K terms
    lie in their order; `weights_TK` float32, contiguous. A pair without a term adds nothing. The order of the terms,
    hence where experts live, changes no bit.
    """
    (num_terms, hidden), (num_tokens, top_k) = terms_RD.shape, weights_TK.shape
    assert terms_RD.dtype == torch.bfloat16
    assert weights_TK.dtype == torch.float32
    assert terms_RD.is_contiguous()
    assert weights_TK.is_contiguous()
    if pairs_R is None:
        assert num_terms == num_tokens * top_k
    else:
        assert pairs_R.dtype == torch.int64
        assert pairs_R.is_contiguous()
    out = empty(num_tokens, hidden, dtype=terms_RD.dtype)
    if num_tokens:
        place = None if pairs_R is None else empty(num_tokens * top_k, dtype=torch.int32)
        pairs, scratch = (0 if each is None else each.data_ptr() for each in (pairs_R, place))
        given = (terms_RD.data_ptr(), pairs, weights_TK.data_ptr(), scratch, out.data_ptr())
        run(path, COMBINE, *given, num_terms, num_tokens, top_k, hidden)
    return out
