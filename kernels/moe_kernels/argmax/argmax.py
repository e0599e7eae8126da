"""The most likely token of each row of logits, and whether the row can have one."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import ARGMAX, run


def argmax(path: str, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (S,) int64 of the largest logits, of equal ones the lowest, and (S,) bool: whether a token can be chosen.

    `logits_SV` float32, V at least 1. No token can be chosen of a row with a NaN, with +inf, or with nothing but -inf;
    its id is some id below V. One pass, whatever the row holds; the same on every path.
    """
    num_rows, vocab = logits_SV.shape
    assert logits_SV.dtype == torch.float32
    assert vocab >= 1
    logits_SV = logits_SV if logits_SV.stride(1) == 1 else logits_SV.contiguous()
    ids, sound = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
    if num_rows:
        addresses = (logits_SV.data_ptr(), ids.data_ptr(), sound.data_ptr())
        run(path, ARGMAX, *addresses, num_rows, vocab, logits_SV.stride(0))
    return ids, sound
