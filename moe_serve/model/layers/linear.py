"""Weights and plain linear maps. Whether rows or columns are a part of something larger is their owner's affair."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def weight(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An empty parameter that the loader fills; no gradients."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """x @ weight.T + bias."""

    def __init__(self, columns: int, rows: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = weight(rows, columns, dtype=dtype, device=device)
        self.bias = weight(rows, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)
