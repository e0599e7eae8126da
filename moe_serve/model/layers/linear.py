"""Weights and plain linear maps. Whether rows or columns are a part of something larger is their owner's affair."""

from __future__ import annotations

import torch
from moe_kernels.linear.linear import linear
from moe_kernels.linear.packing import pack
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.model.kernels import path_for


def weight(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An empty parameter that the loader fills; no gradients."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """x @ weight.T + bias. On a compiled path the weight lies packed from finish_loading() on."""

    def __init__(
        self,
        columns: int,
        rows: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path_for(path, rows, columns)
        self.weight = weight(rows, columns, dtype=dtype, device=device)
        self.bias = weight(rows, dtype=dtype, device=device) if bias else None

    def finish_loading(self) -> None:
        """Once, when the weight was filled."""
        if self.path is not None:
            pack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T, columns) -> (T, rows)."""
        if self.path is not None:
            return linear(self.path, x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)
