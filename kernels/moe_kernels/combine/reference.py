"""combine() in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(terms_RD: Tensor, pairs_R: Tensor | None, weights_TK: Tensor) -> Tensor:
    """As combine.combine()."""
    num_tokens, top_k = weights_TK.shape
    terms = torch.zeros(num_tokens * top_k, terms_RD.shape[1])
    terms[slice(None) if pairs_R is None else pairs_R] = terms_RD.float()
    total = torch.zeros(num_tokens, terms_RD.shape[1])
    for k in range(top_k):
        total += weights_TK[:, k : k + 1] * terms[k::top_k]
    return total.to(terms_RD.dtype)
