"""attention() in torch: the whole softmax at once, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_THd: Tensor,
    k_NGd: Tensor,
    v_NGd: Tensor,
    blocks: Tensor,
    sequences_S4: Tensor,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    """As attention.attention()."""
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    repeats = q_THd.shape[1] // k_NGd.shape[1]
    for first, count, start, first_block in sequences_S4.tolist():
        positions = torch.arange(start + count)
        slots = blocks[first_block + positions // block_size].long() * block_size + positions % block_size
        k_NHd, v_NHd = (cache[slots].float().repeat_interleave(repeats, dim=1) for cache in (k_NGd, v_NGd))
        q_nHd = q_THd[first : first + count].float() * scale
        scores_HnN = torch.einsum("nhd,mhd->hnm", q_nHd, k_NHd)
        outside = positions[None, :] > torch.arange(start, start + count)[:, None]
        weights = scores_HnN.masked_fill(outside, float("-inf")).softmax(dim=-1)
        out[first : first + count] = torch.einsum("hnm,mhd->nhd", weights, v_NHd).to(out.dtype)
    return out
