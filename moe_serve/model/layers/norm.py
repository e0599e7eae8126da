"""RMSNorm over the last dimension, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.norm import norm
from torch import Tensor, nn

from moe_serve.model.layers.linear import weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight, rounded to x's type before the multiplication as the checkpoints were trained."""

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device, path: str | None = None
    ) -> None:
        super().__init__()
        self.eps, self.path = eps, path
        self.weight = weight(size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.path)

    def after_sum(self, x_TD: Tensor, delta_TD: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        if self.path is not None:
            return norm.add_rms_norm(self.path, x_TD, delta_TD, self.weight, self.eps)
        total_TD = x_TD + delta_TD
        return total_TD, self(total_TD)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each head of q and of k, (T, heads, d), by scales (d,) that the heads share."""

    q_scale_d: Tensor
    k_scale_d: Tensor
    eps: float

    def __call__(self, q_THd: Tensor, k_TGd: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(q_THd, self.q_scale_d, self.eps), rms_norm(k_TGd, self.k_scale_d, self.eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float, path: str | None = None) -> Tensor:
    """RMSNorm over the last dimension, on a compiled path if there is one."""
    if path is not None:
        return norm.rms_norm(path, x, scale, eps)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * inverse).to(x.dtype) * scale


def add(x_TD: Tensor, delta_TD: Tensor, path: str | None) -> Tensor:
    """x + delta, on a compiled path if there is one: the same bits."""
    return x_TD + delta_TD if path is None else norm.add(path, x_TD, delta_TD)
