"""linear() in torch, in float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear(x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """As linear.linear(), with the weight as it is before packing."""
    out = functional.linear(x_RK.float(), weight_NK.float(), None if bias_N is None else bias_N.float())
    return out if wide else out.to(torch.bfloat16)
