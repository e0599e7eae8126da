"""Rows as 8-bit floats with a scale for each block of columns: half the bytes of bfloat16 on a wire.

Blocks of 128 and the range of a scale are those of DeepEP's kernels (https://github.com/deepseek-ai/DeepEP), which take
such rows, or make them on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
"""Of float8_e4m3fn."""
LEAST = 1e-4
"""Magnitudes below it, in a whole block, share its scale."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., D) of any float type -> rows (..., D) float8_e4m3fn and scales (..., D / 128) float32, contiguous.

    D is a multiple of 128. An element's error is at most 1/16 of it, or 2^-10 of its scale where that is more; a block
    with an infinity or what is not a number has nothing else.
    """
    assert x.shape[-1] % BLOCK == 0
    blocks = x.float().view(*x.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(dim=-1).clamp(min=LEAST) / LARGEST
    # Rounding may put the largest one a little past the type's range, which then would not be a number.
    rows = (blocks / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return rows.flatten(-2).to(torch.float8_e4m3fn), scales


def dequantise(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """quantise()'s rows (..., D) in another type, rounded once."""
    blocks = rows.float().view(*rows.shape[:-1], -1, BLOCK)
    return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)
