"""RMSNorm over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import RMS_NORM, run


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
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.shape[0]:
        addresses = (x.data_ptr(), scale_n.data_ptr(), out.data_ptr())
        run(path, RMS_NORM, *addresses, x.shape[0], groups, size, x.stride(0), float(eps))
    return out
