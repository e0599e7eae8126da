"""moe() by its parts in torch, for checks and for reading."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.combine import reference as combine_reference
from moe_kernels.experts import reference as experts_reference
from moe_kernels.sorting import reference as sorting_reference


def moe(
    x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, *, first_slot: int = 0
) -> Tensor:
    """As moe.moe(), with the weights as they are before packing."""
    rows, pairs, counts_e = sorting_reference.sort_rows(x_TD, slots_TK, first_slot, down.shape[0])
    return combine_reference.combine(experts_reference.experts(rows, counts_e, gate_up, down), pairs, weights_TK)
