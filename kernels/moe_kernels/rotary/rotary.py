"""What lies between the product for q, k and v and attention: norm of heads, rotation, new keys and values cached."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import ROTARY, empty, run


def rotary(
    path: str,
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
    """(T, H, d) bfloat16: q normed and rotated. k, treated likewise, and v go to row slots_T[t] of `k_NGd` and `v_NGd`.

    All bfloat16 but `slots_T` (T,) int64. q, k and v may be views of one product: heads and rows within it contiguous;
    the caches contiguous. `cos`, `sin` (T, 1, 2, d/2), the sine's first half negated: (x1, x2) of a head becomes
    (x1 cos + x2 sin, x2 cos + x1 sin), the first product rounded. With `scales_d`, q's and k's (d,), each head is
    first what norm.rms_norm() makes of it. A row's bits depend on nothing but the row and the path.
    """
    (num_tokens, heads, head_dim), kv_heads = q_THd.shape, k_TGd.shape[1]
    assert all(each.dtype == torch.bfloat16 for each in (q_THd, k_TGd, v_TGd, k_NGd, v_NGd, cos, sin))
    assert k_NGd.shape[1:] == v_NGd.shape[1:] == k_TGd.shape[1:] == v_TGd.shape[1:] == (kv_heads, head_dim)
    assert k_NGd.is_contiguous()
    assert v_NGd.is_contiguous()
    assert slots_T.dtype == torch.int64
    assert slots_T.is_contiguous()
    assert cos.shape == sin.shape == (num_tokens, 1, 2, head_dim // 2)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    q_THd, k_TGd, v_TGd = (_rows(each) for each in (q_THd, k_TGd, v_TGd))
    out = empty(num_tokens, heads, head_dim, dtype=q_THd.dtype)
    if num_tokens:
        given = (q_THd.data_ptr(), k_TGd.data_ptr(), v_TGd.data_ptr(), out.data_ptr())
        cached = (k_NGd.data_ptr(), v_NGd.data_ptr(), slots_T.data_ptr())
        scales = (0, 0) if scales_d is None else tuple(_address(each, head_dim) for each in scales_d)
        strides = (q_THd.stride(0), k_TGd.stride(0), v_TGd.stride(0))
        sizes = (num_tokens, heads, kv_heads, head_dim)
        run(path, ROTARY, *given, *cached, cos.data_ptr(), sin.data_ptr(), *scales, *sizes, *strides, float(eps))
    return out


def _rows(x_THd: Tensor) -> Tensor:
    return x_THd if x_THd.stride(2) == 1 and x_THd.stride(1) == x_THd.shape[2] else x_THd.contiguous()


def _address(scale_d: Tensor, head_dim: int) -> int:
    assert scale_d.dtype == torch.bfloat16
    assert scale_d.shape == (head_dim,)
    assert scale_d.is_contiguous()
    return scale_d.data_ptr()
