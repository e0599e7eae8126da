"""Rows as 8-bit floats: the error that is promised, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.quantise.quantise import BLOCK, LARGEST, LEAST, dequantise, quantise
from torch import Tensor


def rows(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, 17, 3 * BLOCK), generator=generator, dtype=torch.float64)
    match kind:
        case "wide":
            x = x * torch.exp(4 * torch.randn(x.shape, generator=generator, dtype=torch.float64))
        case "small":
            x = x * LEAST / 8
        case "large":
            x = x * 1e30
        case "zeros":
            x = torch.zeros_like(x)
        case "one at the edge":
            x = torch.zeros_like(x)
            x[..., ::BLOCK] = 3.0
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "wide", "small", "large", "zeros", "one at the edge"])
def test_the_error_is_at_most_what_is_promised(kind: str, dtype: torch.dtype) -> None:
    x = rows(kind).to(dtype)
    quantised, scales = quantise(x)
    assert quantised.shape == x.shape
    assert quantised.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, 17, 3)
    assert scales.dtype == torch.float32
    assert quantised.is_contiguous()
    assert scales.is_contiguous()
    error = (dequantise(quantised, scales, torch.float64) - x.double()).abs()
    allowed = torch.maximum(x.double().abs() / 16, scales.double().repeat_interleave(BLOCK, dim=-1) / 1024)
    assert bool((error <= allowed * (1 + 1e-6)).all())
    if kind in ("plain", "wide"):
        assert float(error.max()) > 0


def test_the_largest_of_a_block_is_kept_and_no_block_knows_another() -> None:
    x = rows("plain").float()
    other = x.clone()
    other[..., :BLOCK] *= 1000
    (first, scales), (second, other_scales) = quantise(x), quantise(other)
    assert torch.equal(first[..., BLOCK:].float(), second[..., BLOCK:].float())
    assert torch.equal(scales[..., 1:], other_scales[..., 1:])
    assert float(first.float().abs().max()) == LARGEST


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_arrives_as_not_finite(wrong: float) -> None:
    x = rows("plain").float()
    x[1, 2, 5] = wrong
    back = dequantise(*quantise(x), torch.float32)
    assert not bool(back[1, 2, 5].isfinite())
    assert bool(back[1, 2, BLOCK:].isfinite().all())
    assert bool(back[0].isfinite().all())


def test_a_width_that_is_no_multiple_of_a_block_is_refused() -> None:
    with pytest.raises(AssertionError):
        quantise(torch.zeros(2, BLOCK + 1))
