"""x @ weight.T + bias with a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import LINEAR, empty, run


def linear(path: str, x_RK: Tensor, packed_NK: Tensor, bias_N: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """(R, N) in bfloat16, or in float32 if `wide`.

    `x_RK` bfloat16, its rows contiguous; `packed_NK` bfloat16 after packing.pack(), N and K multiples of 16; `bias_N`
    bfloat16. R may be 0. Products and sums in float32, rounded once. A row's bits depend on nothing but the row, the
    weight and the path.
    """
    (num_rows, width), num_columns = x_RK.shape, packed_NK.shape[0]
    assert x_RK.dtype == packed_NK.dtype == torch.bfloat16
    assert packed_NK.shape[1] == width
    assert packed_NK.is_contiguous()
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    out = empty(num_rows, num_columns, dtype=torch.float32 if wide else torch.bfloat16)
    if num_rows:
        bias = 0 if bias_N is None else bias_N.data_ptr()
        addresses = (x_RK.data_ptr(), packed_NK.data_ptr(), bias, out.data_ptr())
        run(path, LINEAR, *addresses, num_rows, width, num_columns, x_RK.stride(0), int(wide))
    return out
