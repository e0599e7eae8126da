"""rotary() in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.norm.reference import rms_norm


def rotary(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    k_NGd: Tensor,
    v_NGd: Tensor,
    slots_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scales_d: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """As rotary.rotary()."""
    if scales_d is not None:
        q_THd, k_TGd = rms_norm(q_THd, scales_d[0], eps), rms_norm(k_TGd, scales_d[1], eps)
    k_NGd[slots_T] = _rotated(k_TGd, cos, sin)
    v_NGd[slots_T] = v_TGd
    return _rotated(q_THd, cos, sin)


def _rotated(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, size = x_THd.shape
    halves = x_THd.reshape(tokens, heads, 2, size // 2)
    return torch.addcmul(halves * cos, halves.flip(2), sin).view(tokens, heads, size)
