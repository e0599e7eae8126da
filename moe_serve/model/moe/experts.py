"""The experts a rank holds, and their computation on the rows that arrived.

Shape letters: e local physical experts, R received rows, D hidden, F expert width (this rank's part of it).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.model.all2all.base import Routed
from moe_serve.model.layers.linear import weight

GROUPED_MM_ALIGNMENT = 16
"""Bytes; torch's grouped_mm takes no row strides between."""


class Experts(nn.Module):
    """`gate_up` (e, 2F, D), gate above up; `down` (e, D, F). down(silu(gate(x)) * up(x)) by one grouped GEMM pair."""

    def __init__(self, num_local: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = weight(num_local, 2 * width, hidden, dtype=dtype, device=device)
        self.down = weight(num_local, hidden, width, dtype=dtype, device=device)

    def forward(self, routed: Routed) -> Tensor:
        """(R, D): each row's expert's output, in the order of `routed.rows`."""
        if not routed.rows.shape[0]:
            return routed.rows
        gate, up = grouped_linear(routed.rows, self.gate_up, routed.counts_e).chunk(2, dim=-1)
        return grouped_linear(functional.silu(gate) * up, self.down, routed.counts_e)


def grouped_linear(rows: Tensor, weights: Tensor, counts_e: Tensor) -> Tensor:
    """The next counts_e[i] rows times weights[i].T: (R, in), (e, out, in) -> (R, out)."""
    if all(width * rows.dtype.itemsize % GROUPED_MM_ALIGNMENT == 0 for width in weights.shape[1:]):
        return functional.grouped_mm(rows, weights.transpose(1, 2), offs=counts_e.cumsum(0).to(torch.int32))
    out = rows.new_empty((rows.shape[0], weights.shape[1]))
    first = 0
    for matrix, count in zip(weights, counts_e.tolist(), strict=True):
        torch.mm(rows[first : first + count], matrix.t(), out=out[first : first + count])
        first += count
    return out
