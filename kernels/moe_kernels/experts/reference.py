"""experts() in torch, expert after expert, in float32 but for the same two roundings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def experts(rows_RD: Tensor, counts_e: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As experts.experts(), with the weights as they are before packing."""
    out = torch.empty_like(rows_RD)
    first = 0
    for expert, count in enumerate(counts_e.tolist()):
        part, first = slice(first, first + count), first + count
        gate, up = (rows_RD[part].float() @ gate_up[expert].float().t()).chunk(2, dim=1)
        inner = (functional.silu(gate) * up).to(torch.bfloat16)
        out[part] = (inner.float() @ down[expert].float().t()).to(torch.bfloat16)
    return out
