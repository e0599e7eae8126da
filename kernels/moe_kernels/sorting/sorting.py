"""Rows in the order of the experts that want them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import GATHER, SORT, run


def sort_rows(
    path: str, x_TD: Tensor, slots_TK: Tensor, first_slot: int, num_local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, D), pairs (R,) int64 and counts (e,) int64 of the e slots from `first_slot` on.

    A pair is t * K + k, of row t and its k-th slot; those of the first slot come first, of one slot in order of the
    batch. Other slots, also negative ones, are left out. `x_TD` of any type, each row contiguous; `slots_TK` int32 or
    int64. A counting sort: time follows T * K + e.
    """
    num_rows, top_k = slots_TK.shape
    assert x_TD.shape[0] == num_rows
    assert slots_TK.dtype in (torch.int32, torch.int64)
    slots_TK, x_TD = slots_TK.contiguous(), x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    pairs, counts = torch.empty(num_rows * top_k, dtype=torch.int64), torch.empty(num_local + 1, dtype=torch.int64)
    sizes = (num_rows * top_k, first_slot, num_local, int(slots_TK.dtype == torch.int64))
    run(path, SORT, slots_TK.data_ptr(), pairs.data_ptr(), counts.data_ptr(), *sizes)
    num_pairs, counts_e = int(counts[num_local]), counts[:num_local]
    pairs = pairs if num_pairs == len(pairs) else pairs[:num_pairs]
    rows = torch.empty(num_pairs, x_TD.shape[1], dtype=x_TD.dtype)
    if num_pairs:
        size = x_TD.element_size()
        widths = (x_TD.shape[1] * size, x_TD.stride(0) * size)
        run(path, GATHER, x_TD.data_ptr(), pairs.data_ptr(), rows.data_ptr(), num_pairs, top_k, *widths)
    return rows, pairs, counts_e
