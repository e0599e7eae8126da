"""Rotary positions: halves of each head are rotated against each other by an angle that grows with the position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """One step's angles, for all layers. Both (T, 1, 2, d/2): the cosine, and the sine with its first half negated."""

    cos: Tensor
    sin: Tensor


class Rope:
    """Knows the frequencies; `rotation()` once per step, then `rotate()` per layer."""

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.frequencies = (1.0 / theta**exponents).to(device)

    def rotation(self, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions_T[:, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(
            torch.stack((cos, cos), dim=1)[:, None].to(dtype), torch.stack((-sin, sin), dim=1)[:, None].to(dtype)
        )


def rotate(x_THd: Tensor, rotation: Rotation) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) in each head."""
    tokens, heads, size = x_THd.shape
    halves = x_THd.reshape(tokens, heads, 2, size // 2)
    return torch.addcmul(halves * rotation.cos, halves.flip(2), rotation.sin).view(tokens, heads, size)
