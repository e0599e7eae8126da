"""RMSNorm over the last dimension, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_serve.model.layers.linear import weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight, rounded to x's type before the multiplication as the checkpoints were trained."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = weight(size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; `scale` may span more dimensions."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).to(x.dtype) * scale
