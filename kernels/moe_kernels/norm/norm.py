"""RMSNorm over the last dimension, and the sum of a residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import ADD, RMS_NORM, empty, run


def rms_norm(path: str, x: Tensor, scale_n: Tensor, eps: float) -> Tensor:
    """x / rms(x) * scale, contiguous: `x` (R, n) or (R, groups, n) bfloat16, `scale_n` (n,) bfloat16.

    Rows may be apart in memory; within a row everything is contiguous. Computed in float32, rounded to bfloat16 before
    the multiplication and after it. A row's bits depend on nothing but the row, the scale and the path.
    """
    assert x.dtype == scale_n.dtype == torch.bfloat16
    assert scale_n.shape == x.shape[-1:]
    size = x.shape[-1]
    groups = x.shape[1] if x.dim() == 3 else 1
    x = x if x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == size) else x.contiguous()
    out = empty(*x.shape, dtype=x.dtype)
    if x.shape[0]:
        addresses = (x.data_ptr(), scale_n.data_ptr(), out.data_ptr())
        run(path, RMS_NORM, *addresses, x.shape[0], groups, size, x.stride(0), float(eps), 0, 0)
    return out


def add_rms_norm(path: str, x_RD: Tensor, delta_RD: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, rounded to bfloat16, and what rms_norm() makes of it: both (R, D), all bfloat16 and contiguous."""
    assert x_RD.dtype == delta_RD.dtype == scale_D.dtype == torch.bfloat16
    assert x_RD.shape == delta_RD.shape
    assert scale_D.shape == x_RD.shape[1:]
    assert x_RD.is_contiguous()
    assert delta_RD.is_contiguous()
    num_rows, size = x_RD.shape
    total, out = empty(num_rows, size, dtype=x_RD.dtype), empty(num_rows, size, dtype=x_RD.dtype)
    if num_rows:
        addresses = (x_RD.data_ptr(), scale_D.data_ptr(), out.data_ptr())
        sizes = (num_rows, 1, size, size)
        run(path, RMS_NORM, *addresses, *sizes, float(eps), delta_RD.data_ptr(), total.data_ptr())
    return total, out


def add(path: str, x: Tensor, y: Tensor) -> Tensor:
    """x + y, rounded to bfloat16: of one shape, bfloat16 and contiguous. torch's own bits; it can be recorded."""
    assert x.dtype == y.dtype == torch.bfloat16
    assert x.shape == y.shape
    assert x.is_contiguous()
    assert y.is_contiguous()
    out = empty(*x.shape, dtype=x.dtype)
    run(path, ADD, x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel())
    return out
