"""rms_norm() in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, scale_n: Tensor, eps: float) -> Tensor:
    """As norm.rms_norm()."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * scale_n
