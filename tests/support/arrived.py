"""Made-up experts for rows in any form in which they arrive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, Batched, Placed, Sorted
from moe_serve.model.all2all.rows import sort_rows


def counts_of(arrived: Arrived, num_local: int) -> Tensor:
    """(e,) int64: how many rows each local expert has to compute."""
    if isinstance(arrived, Sorted | Batched):
        return arrived.counts_e
    assert isinstance(arrived, Placed)
    return sort_rows(arrived.rows, arrived.slots, arrived.first_slot, num_local)[2]


def compute(arrived: Arrived, num_local: int, expert: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What goes back: `expert` of rows (..., D) and of their local experts' numbers, of shape (..., 1)."""
    if isinstance(arrived, Sorted):
        numbers = torch.repeat_interleave(torch.arange(num_local), arrived.counts_e)
        return expert(arrived.rows, numbers[:, None])
    if isinstance(arrived, Batched):
        return expert(arrived.rows, torch.arange(num_local)[:, None, None])
    assert isinstance(arrived, Placed)
    rows, pairs, counts_e = sort_rows(arrived.rows, arrived.slots, arrived.first_slot, num_local)
    numbers = torch.repeat_interleave(torch.arange(num_local), counts_e)
    arrived.terms.flatten(0, 1)[pairs] = expert(rows, numbers[:, None])
    return arrived.terms
