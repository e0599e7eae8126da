"""sort_rows() in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_rows(x_TD: Tensor, slots_TK: Tensor, first_slot: int, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    """As sorting.sort_rows()."""
    slots = slots_TK.reshape(-1)
    ours = (slots >= first_slot) & (slots < first_slot + num_local)
    local = torch.where(ours, slots - first_slot, num_local)
    counts = torch.bincount(local, minlength=num_local + 1)
    pairs = local.argsort(stable=True)[: local.numel() - int(counts[num_local])]
    return x_TD.index_select(0, pairs // slots_TK.shape[1]), pairs, counts[:num_local]
